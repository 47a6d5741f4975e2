"""Tiny random models of every family: two layers, width 32, made in milliseconds."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mariotte import architectures
from mariotte.models.load import LOADED_BY
from mariotte.models.model import Model
from mariotte.models.step import Step

VOCAB = 64

_FITTING = 16
"""Divides the usual widths."""

_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 8},
    "gpt_oss": {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
"""What a family has that a method might forget, in a size at which a model of two layers and short texts shows it."""


@torch.no_grad()
def tiny(
    model_type: str,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 48,
    vocab: int = VOCAB,
    tied: bool = False,
    experts: int = 4,
    active: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **settings: Any,
) -> Model:
    """A random model of one family.

    Parameters
    ----------
    model_type : a family of ``architectures/families.py``
    experts, active : of a mixture, its MLPs and how many of them a token takes
    hidden, layers, heads, kv_heads, head_dim, ffn, vocab, tied : sizes; `head_dim` None takes ``hidden // heads``. A
        family whose config has no key for one of them goes without; an encoder is made like the decoder
    dtype : of its weights
    seed : of its weights
    settings : anything else that its config should say

    Notes
    -----
    Weights are larger than at an initialisation, and norms and biases random: at the usual 0.02 logits hardly differ
    from zero, and a norm of ones or a bias of zeros would hide that a method forgets it.
    """
    entry = architectures.find(model_type)
    sizes: dict[Any, Any] = {"max_position_embeddings": 128}
    for stack in entry.stacks:
        sizes |= {
            stack.hidden: hidden,
            stack.layers: layers,
            stack.heads: heads,
            stack.kv_heads: kv_heads,
            stack.head_dim: head_dim or hidden // heads,
            stack.ffn: ffn,
            stack.vocab: vocab,
            stack.tied: tied,
            stack.embedding: hidden,
        }
        if stack.experts:
            sizes |= {stack.expert_count: experts, stack.active_experts: active}
    sizes = {key: value for key, value in sizes.items() if isinstance(key, str) and key}
    if entry.kind != "causal":
        # RoBERTa counts positions from its padding token, and T5 begins to write with it.
        sizes |= {"pad_token_id": 0, "decoder_start_token_id": 0}
    stated = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **sizes}
    stated |= {**_SETTINGS.get(model_type, {}), **settings}
    config = AutoConfig.for_model(model_type, **stated)
    make = LOADED_BY[entry.kind].from_config
    made = make(config, attn_implementation=entry.kernel, dtype=torch.float32)
    hf = cast(PreTrainedModel, made).eval()
    generator = torch.Generator().manual_seed(seed)
    flipped = {id(module.weight) for module in hf.modules() if isinstance(module, Conv1D)}
    for name, parameter in hf.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise)
        else:
            inputs = parameter.shape[0 if id(parameter) in flipped else 1]
            if parameter.ndim == 3:
                inputs = parameter.shape[1 if entry.experts_transposed else 2]
            parameter.copy_(noise * (1.0 if parameter.shape[0] == vocab else 1.5 / inputs**0.5))
    hf.to(dtype)  # pyright: ignore[reportArgumentType]
    hf.config.dtype = dtype
    model = Model(hf, None, name=f"tiny-{model_type}", fingerprint="", stored_dtype=dtype)
    model.fingerprint = weights_hash(model)
    return model


def sizes_for(step: Step) -> dict[str, Any]:
    """Sizes of `tiny` whose widths the groups of a step divide; none where the usual ones do."""
    group = cast("int | None", getattr(step, "group", None))
    return {} if group is None or _FITTING % group == 0 else {"hidden": group, "ffn": 2 * group}


def to_ask(family: str, step: Step | None = None, **settings: Any) -> Model:
    """A tiny model, of the widths that a step asks for, which is made once and must not be changed."""
    sizes = {} if step is None else sizes_for(step)
    return _made(family, tuple(sorted({**sizes, **settings}.items())))


@functools.cache
def _made(family: str, sizes: tuple[tuple[str, Any], ...]) -> Model:
    return tiny(family, **dict(sizes))


def weights_hash(model: Model) -> str:
    """SHA-256 over config and weights: two models have the same one only if they are the same to the bit."""
    found = hashlib.sha256(model.hf.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.hf.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def random_tokens(rows: int = 16, length: int = 24, *, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """Uniform token ids, (rows, length)."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))

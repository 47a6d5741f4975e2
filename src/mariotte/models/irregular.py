"""Models whose sizes their family's config cannot state: how they are made from ordinary ones, and loaded.

Their classes are in ``modeling_mariotte.py`` and ``modeling_mariotte_heads.py``, which transformers copies beside the
weights when such a model is saved.
Here they are made known to transformers, so that a process that has imported Mariotte never runs the folder's copy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mariotte.models.dynamic import restore_
from mariotte.models.model import Model
from mariotte.models.modeling_mariotte import (
    MariotteGraniteConfig,
    MariotteGraniteForCausalLM,
    MariotteLlamaConfig,
    MariotteLlamaForCausalLM,
    MariotteMistralConfig,
    MariotteMistralForCausalLM,
    MariotteQwen2Config,
    MariotteQwen2ForCausalLM,
    MariotteQwen3Config,
    MariotteQwen3ForCausalLM,
    MariotteSmolLM3Config,
    MariotteSmolLM3ForCausalLM,
    Shortcut,
)
from mariotte.models.modeling_mariotte_heads import (
    MariotteFalconConfig,
    MariotteFalconForCausalLM,
    MariotteGPT2Config,
    MariotteGPT2LMHeadModel,
    MariotteGPTNeoXConfig,
    MariotteGPTNeoXForCausalLM,
    MariotteOPTConfig,
    MariotteOPTForCausalLM,
)

CLASSES: Mapping[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (MariotteLlamaConfig, MariotteLlamaForCausalLM),
    "qwen2": (MariotteQwen2Config, MariotteQwen2ForCausalLM),
    "mistral": (MariotteMistralConfig, MariotteMistralForCausalLM),
    "qwen3": (MariotteQwen3Config, MariotteQwen3ForCausalLM),
    "smollm3": (MariotteSmolLM3Config, MariotteSmolLM3ForCausalLM),
    "granite": (MariotteGraniteConfig, MariotteGraniteForCausalLM),
}
"""Config and model of every family that can be irregular."""

HEADS: Mapping[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "opt": (MariotteOPTConfig, MariotteOPTForCausalLM),
    "gpt2": (MariotteGPT2Config, MariotteGPT2LMHeadModel),
    "gpt_neox": (MariotteGPTNeoXConfig, MariotteGPTNeoXForCausalLM),
    "falcon": (MariotteFalconConfig, MariotteFalconForCausalLM),
}
"""Config and model of the families that become irregular only by heads whose size is not tied to the hidden size."""

_OF_THE_CLASS = ("model_type", "architectures", "auto_map", "transformers_version")
"""What a config says of its class and not of the model."""

for _config, _model in (*CLASSES.values(), *HEADS.values()):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class("AutoConfig")
    _model.register_for_auto_class("AutoModelForCausalLM")


def skeleton(model: Model, sizes: Mapping[str, Any]) -> PreTrainedModel:
    """An irregular model of a family, its parameters still to be given.

    Parameters
    ----------
    model : of the same family, irregular or not
    sizes : what its config must say otherwise than that of `model`

    Returns
    -------
    In eval mode, parameters on the meta device, buffers copies of `model`'s, where those are; those that
    `model` does not have, or not in this size, are on the meta device too
    """
    make_config, make_model = {**CLASSES, **HEADS}[model.entry.model_type]
    stated = {key: value for key, value in model.config.items() if key not in _OF_THE_CLASS}
    config = make_config(**{**stated, **sizes})
    with torch.device("meta"):
        made = cast(Any, make_model)._from_config(config, attn_implementation=model.entry.kernel, dtype=model.hf.dtype)
    hf = cast(PreTrainedModel, made).eval()
    hf.generation_config = copy.deepcopy(model.hf.generation_config)
    buffers, saved = dict(model.hf.named_buffers()), set(hf.state_dict())
    for name, _ in list(hf.named_buffers()):
        path, _, leaf = name.rpartition(".")
        module = hf.get_submodule(path)
        new, old = cast(Tensor, getattr(module, leaf)), buffers.get(name)
        if old is not None and old.shape == new.shape:
            module.register_buffer(leaf, old.clone(), persistent=name in saved)
    restore_(hf)
    return hf


def freeze_shortcuts_(hf: nn.Module) -> None:
    """Say of shortcuts that they are not trained: transformers forgets it when it loads them."""
    for module in hf.modules():
        if isinstance(module, Shortcut):
            module.weight.requires_grad_(False)

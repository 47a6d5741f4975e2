"""OPT, GPT-2, GPT-NeoX and Falcon models with fewer heads: the size of a head is stated beside the hidden size.

This file is written beside the weights of such a checkpoint and needs nothing but torch and transformers. It is read
by ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

What its configs add to those of the family:

* ``head_dim``: width of a head; None takes the hidden size over the number of heads, as the family does

All else is as in the family, and is its own code: attention, positions, cache, generation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D


@strict
class MariotteOPTConfig(OPTConfig):
    """The config of an OPT model with heads of a stated size."""

    model_type = "mariotte_opt"

    head_dim: int | None = None


@strict
class MariotteGPT2Config(GPT2Config):
    """The config of a GPT-2 model with heads of a stated size."""

    model_type = "mariotte_gpt2"

    head_dim: int | None = None


@strict
class MariotteGPTNeoXConfig(GPTNeoXConfig):
    """The config of a GPT-NeoX model with heads of a stated size."""

    model_type = "mariotte_gpt_neox"

    head_dim: int | None = None

    def validate_architecture(self) -> None:
        """Nothing: the number of heads need not divide the hidden size."""


@strict
class MariotteFalconConfig(FalconConfig):
    """The config of a Falcon model with heads of a stated size."""

    model_type = "mariotte_falcon"

    head_dim: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType] a property there


def _resize_(module: Any, name: str, inputs: int, outputs: int) -> None:
    """Give a matrix of an attention module other sizes."""
    old = getattr(module, name)
    if isinstance(old, Conv1D):
        setattr(module, name, Conv1D(outputs, inputs))
    else:
        setattr(module, name, type(old)(inputs, outputs, bias=old.bias is not None))


def _opt_(attention: Any, config: Any, width: int) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        _resize_(attention, name, config.hidden_size, width)
    _resize_(attention, "out_proj", width, config.hidden_size)
    attention.num_heads = config.num_attention_heads


def _gpt2_(attention: Any, config: Any, width: int) -> None:
    _resize_(attention, "c_attn", config.hidden_size, 3 * width)
    _resize_(attention, "c_proj", width, config.hidden_size)
    attention.num_heads, attention.split_size = config.num_attention_heads, width


def _gpt_neox_(attention: Any, config: Any, width: int) -> None:
    _resize_(attention, "query_key_value", config.hidden_size, 3 * width)
    _resize_(attention, "dense", width, config.hidden_size)


def _falcon_(attention: Any, config: Any, width: int) -> None:
    keys = attention.num_kv_heads * attention.head_dim
    _resize_(attention, "query_key_value", config.hidden_size, width + 2 * keys)
    _resize_(attention, "dense", width, config.hidden_size)
    attention.num_heads = config.num_attention_heads


_ATTENTION: dict[str, tuple[str, Callable[[Any, Any, int], None]]] = {
    "mariotte_opt": ("OPTAttention", _opt_),
    "mariotte_gpt2": ("GPT2Attention", _gpt2_),
    "mariotte_gpt_neox": ("GPTNeoXAttention", _gpt_neox_),
    "mariotte_falcon": ("FalconAttention", _falcon_),
}
"""By model type, what its attention is called, and what gives it the sizes that the config states."""


def _made(model: Any, config: Any, make: Callable[[Any], None]) -> None:
    """Make a model with as many heads as the hidden size holds, which its code insists on; then with those stated."""
    stated = config.num_attention_heads
    if config.head_dim is None:
        make(config)
        return
    config.num_attention_heads = config.hidden_size // config.head_dim
    make(config)
    for each in (config, model.config):
        each.num_attention_heads = stated
    name, resize_ = _ATTENTION[config.model_type]
    for module in list(model.modules()):
        if type(module).__name__ == name:
            resize_(module, config, stated * config.head_dim)
        elif isinstance(getattr(module, "num_heads", None), int):
            module.num_heads = stated
    model.post_init()


class MariotteOPTForCausalLM(OPTForCausalLM):
    """An OPT model with heads of a stated size."""

    config_class = MariotteOPTConfig

    def __init__(self, config: MariotteOPTConfig) -> None:
        _made(self, config, super().__init__)


class MariotteGPT2LMHeadModel(GPT2LMHeadModel):
    """A GPT-2 model with heads of a stated size."""

    config_class = MariotteGPT2Config

    def __init__(self, config: MariotteGPT2Config) -> None:
        _made(self, config, super().__init__)


class MariotteGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    """A GPT-NeoX model with heads of a stated size."""

    config_class = MariotteGPTNeoXConfig

    def __init__(self, config: MariotteGPTNeoXConfig) -> None:
        _made(self, config, super().__init__)


class MariotteFalconForCausalLM(FalconForCausalLM):
    """A Falcon model with heads of a stated size."""

    config_class = MariotteFalconConfig

    def __init__(self, config: MariotteFalconConfig) -> None:
        _made(self, config, super().__init__)

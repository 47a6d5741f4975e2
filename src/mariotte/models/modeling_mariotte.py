"""Llama and Qwen2 models whose sizes an ordinary config cannot state: sliced streams, widths and heads by layer.

This file is written beside the weights of such a checkpoint and needs nothing but torch and transformers. It is read
by ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

What its configs add to those of the family:

* ``ffn_sizes``: feed-forward width of every layer; None where all are ``intermediate_size``
* ``head_sizes``: query and key-value heads of every layer; None where all have as many as the family's config says
* ``output_biases``: the matrices that write to the stream, the last of attention and the last of the MLP, have biases
* ``shortcuts``: every block hands its input on through a matrix of its own instead of adding it as it is, and norms
  have no weights (they are folded into the matrices behind them). After attention, and again after the MLP:
  ``stream = shortcut(stream) + sublayer(norm(stream))``. Shortcuts are not trained
* ``norm_size``: number by which a norm divides the sum of squares, that of the uncut stream; None takes ``hidden_size``
* ``final_size``: width of the stream that the last block writes, which the last norm and the head read; None takes
  ``hidden_size``

All else is as in the family, and is its own code: attention, rotary embeddings, cache, generation.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer


@strict  # checks what this class says of validity, and not what its parent says
class MariotteLlamaConfig(LlamaConfig):
    """The config of a Llama model with irregular sizes; see the top of this file."""

    model_type = "mariotte_llama"

    ffn_sizes: list[int] | None = None
    head_sizes: list[list[int]] | None = None
    output_biases: bool = False
    shortcuts: bool = False
    norm_size: int | None = None
    final_size: int | None = None

    def validate_architecture(self) -> None:
        """Nothing: a sliced stream need not be a multiple of the heads, whose size is stated by itself."""


@strict
class MariotteQwen2Config(Qwen2Config):
    """The config of a Qwen2 model with irregular sizes; see the top of this file."""

    model_type = "mariotte_qwen2"

    ffn_sizes: list[int] | None = None
    head_sizes: list[list[int]] | None = None
    output_biases: bool = False
    shortcuts: bool = False
    norm_size: int | None = None
    final_size: int | None = None


class StreamRMSNorm(nn.Module):
    """RMSNorm without weights, whose mean is taken over a stated number of dimensions."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size = size
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The stream over the root of its mean square."""
        # At least float32, as in the family's own norm: squares of bfloat16 lose too much.
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mean = wide.square().sum(-1, keepdim=True) / self.size
        return (wide * torch.rsqrt(mean + self.variance_epsilon)).to(hidden_states.dtype)


class Shortcut(nn.Linear):
    """A matrix through which a block hands on its input; fixed, whoever trains the model around it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """The stream in the basis of the next norm."""
        # Detached too: loading gives every parameter back as one to be trained.
        return nn.functional.linear(input, self.weight.detach())


def _shape_(layer: Any, config: Any, index: int) -> None:
    """Give a decoder layer of the family the sizes that the config states for it."""
    written = config.hidden_size
    if index == config.num_hidden_layers - 1 and config.final_size:
        written = config.final_size
    ffn = config.intermediate_size if config.ffn_sizes is None else config.ffn_sizes[index]
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.head_sizes is not None:
        heads, groups = config.head_sizes[index]
    attention, mlp = layer.self_attn, layer.mlp
    mlp.intermediate_size = ffn
    attention.num_key_value_groups = heads // groups
    query, keys = heads * attention.head_dim, groups * attention.head_dim
    for module, name, inputs, outputs, writes in (
        (attention, "q_proj", config.hidden_size, query, False),
        (attention, "k_proj", config.hidden_size, keys, False),
        (attention, "v_proj", config.hidden_size, keys, False),
        (attention, "o_proj", query, config.hidden_size, True),
        (mlp, "gate_proj", config.hidden_size, ffn, False),
        (mlp, "up_proj", config.hidden_size, ffn, False),
        (mlp, "down_proj", ffn, written, True),
    ):
        old = getattr(module, name)
        bias = old.bias is not None or (writes and config.output_biases)
        if old.weight.shape != (outputs, inputs) or bias != (old.bias is not None):
            setattr(module, name, nn.Linear(inputs, outputs, bias=bias))
    if config.shortcuts:
        size = config.norm_size or config.hidden_size
        layer.input_layernorm = StreamRMSNorm(size, config.rms_norm_eps)
        layer.post_attention_layernorm = StreamRMSNorm(size, config.rms_norm_eps)
        layer.attention_shortcut = Shortcut(config.hidden_size, config.hidden_size)
        layer.mlp_shortcut = Shortcut(config.hidden_size, written)
    else:
        layer.attention_shortcut = layer.mlp_shortcut = nn.Identity()


def _forward(layer: Any, hidden_states: Tensor, position_embeddings: Any = None, **settings: Any) -> Tensor:
    """A decoder layer's pass: the family's, with the stream handed on through the shortcuts."""
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden_states), position_embeddings=position_embeddings, **settings
    )
    hidden_states = layer.attention_shortcut(hidden_states) + attended
    return layer.mlp_shortcut(hidden_states) + layer.mlp(layer.post_attention_layernorm(hidden_states))


def _shape_ends_(model: Any, config: Any) -> None:
    """Give the last norm of a body the size that the config states."""
    if config.shortcuts:
        model.norm = StreamRMSNorm(config.norm_size or config.hidden_size, config.rms_norm_eps)


class MariotteLlamaDecoderLayer(LlamaDecoderLayer):
    """A Llama block of stated sizes."""

    def __init__(self, config: MariotteLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        _shape_(self, config, layer_idx)

    def forward(self, hidden_states: Tensor, **settings: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] the family's arguments, whatever they are in a version
        """The stream behind the block."""
        return _forward(self, hidden_states, **settings)


class MariotteQwen2DecoderLayer(Qwen2DecoderLayer):
    """A Qwen2 block of stated sizes."""

    def __init__(self, config: MariotteQwen2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        _shape_(self, config, layer_idx)

    def forward(self, hidden_states: Tensor, **settings: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] the family's arguments, whatever they are in a version
        """The stream behind the block."""
        return _forward(self, hidden_states, **settings)


class MariotteLlamaModel(LlamaModel):
    """The body of a Llama model with irregular sizes."""

    config_class = MariotteLlamaConfig

    def __init__(self, config: MariotteLlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MariotteLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        _shape_ends_(self, config)
        self._no_split_modules = {"MariotteLlamaDecoderLayer"}  # and not the blocks that were replaced
        self.post_init()


class MariotteQwen2Model(Qwen2Model):
    """The body of a Qwen2 model with irregular sizes."""

    config_class = MariotteQwen2Config

    def __init__(self, config: MariotteQwen2Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MariotteQwen2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        _shape_ends_(self, config)
        self._no_split_modules = {"MariotteQwen2DecoderLayer"}  # and not the blocks that were replaced
        self.post_init()


class MariotteLlamaForCausalLM(LlamaForCausalLM):
    """A Llama model with irregular sizes."""

    config_class = MariotteLlamaConfig

    def __init__(self, config: MariotteLlamaConfig) -> None:
        super().__init__(config)
        self.model = MariotteLlamaModel(config)
        self.lm_head = nn.Linear(config.final_size or config.hidden_size, config.vocab_size, bias=False)
        self._no_split_modules = {"MariotteLlamaDecoderLayer"}  # and not the blocks that were replaced
        self.post_init()


class MariotteQwen2ForCausalLM(Qwen2ForCausalLM):
    """A Qwen2 model with irregular sizes."""

    config_class = MariotteQwen2Config

    def __init__(self, config: MariotteQwen2Config) -> None:
        super().__init__(config)
        self.model = MariotteQwen2Model(config)
        self.lm_head = nn.Linear(config.final_size or config.hidden_size, config.vocab_size, bias=False)
        self._no_split_modules = {"MariotteQwen2DecoderLayer"}  # and not the blocks that were replaced
        self.post_init()

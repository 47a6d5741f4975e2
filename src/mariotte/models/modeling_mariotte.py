"""Models of six families whose sizes an ordinary config cannot state: sliced streams, widths by layer, factors.

This file is written beside the weights of such a checkpoint and needs nothing but torch and transformers. It is read
by ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

What its configs add to those of the family:

* ``ffn_sizes``: feed-forward width of every layer; None where all are ``intermediate_size``
* ``head_sizes``: query and key-value heads of every layer; None where all have as many as the family's config says
* ``width_sizes``: of every layer the width of a head's queries and keys, and that of its values; None where all are
  ``head_dim``. Queries and keys keep some of the pairs of dimensions that rotary embeddings turn, each at its own
  frequency: those that the buffer ``pairs`` of the layer's attention names, for each key-value head
* ``ranks``: for every layer, which of its matrices are products of two, and the rank of these: the path of the matrix
  from the layer, and a number; None where there are none
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
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer


@strict  # checks what this class says of validity, and not what its parent says
class MariotteLlamaConfig(LlamaConfig):
    """The config of a Llama model with irregular sizes; see the top of this file."""

    model_type = "mariotte_llama"

    ffn_sizes: list[int] | None = None
    head_sizes: list[list[int]] | None = None
    width_sizes: list[list[int]] | None = None
    ranks: list[dict[str, int]] | None = None
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
    width_sizes: list[list[int]] | None = None
    ranks: list[dict[str, int]] | None = None
    output_biases: bool = False
    shortcuts: bool = False
    norm_size: int | None = None
    final_size: int | None = None


@strict
class MariotteMistralConfig(MistralConfig):
    """The config of a Mistral model with irregular sizes; see the top of this file."""

    model_type = "mariotte_mistral"

    ffn_sizes: list[int] | None = None
    head_sizes: list[list[int]] | None = None
    width_sizes: list[list[int]] | None = None
    ranks: list[dict[str, int]] | None = None
    output_biases: bool = False
    shortcuts: bool = False
    norm_size: int | None = None
    final_size: int | None = None


@strict
class MariotteQwen3Config(Qwen3Config):
    """The config of a Qwen3 model with irregular sizes; see the top of this file."""

    model_type = "mariotte_qwen3"

    ffn_sizes: list[int] | None = None
    head_sizes: list[list[int]] | None = None
    width_sizes: list[list[int]] | None = None
    ranks: list[dict[str, int]] | None = None
    output_biases: bool = False
    shortcuts: bool = False
    norm_size: int | None = None
    final_size: int | None = None


@strict
class MariotteSmolLM3Config(SmolLM3Config):
    """The config of a SmolLM3 model with irregular sizes; see the top of this file."""

    model_type = "mariotte_smollm3"

    ffn_sizes: list[int] | None = None
    head_sizes: list[list[int]] | None = None
    width_sizes: list[list[int]] | None = None
    ranks: list[dict[str, int]] | None = None
    output_biases: bool = False
    shortcuts: bool = False
    norm_size: int | None = None
    final_size: int | None = None


@strict
class MariotteGraniteConfig(GraniteConfig):
    """The config of a Granite model with irregular sizes; see the top of this file."""

    model_type = "mariotte_granite"

    ffn_sizes: list[int] | None = None
    head_sizes: list[list[int]] | None = None
    width_sizes: list[list[int]] | None = None
    ranks: list[dict[str, int]] | None = None
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


class LowRank(nn.Module):
    """A linear layer whose matrix is the product of two: ``outer(inner(x))``."""

    def __init__(self, inputs: int, rank: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, rank, bias=False)
        self.outer = nn.Linear(rank, outputs, bias=bias)

    @property
    def weight(self) -> Tensor:
        """The product, outputs x inputs: to look at; what is trained and saved are the factors."""
        return self.outer.weight @ self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        """Added at the end."""
        return self.outer.bias

    def forward(self, input: Tensor) -> Tensor:
        """What the product makes of an input."""
        return self.outer(self.inner(input))


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys, (B, heads, T, 2 pairs), each pair turned by its angle; cos and sin are (B, heads, T, pairs)."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class NarrowAttention(nn.Module):
    """Attention of a family without norms of queries and keys, with pairs of dimensions of its own.

    Parameters
    ----------
    whole : the family's attention, which is replaced
    heads, groups : query and key-value heads
    width, value_width : of a head's queries and keys, a multiple of 2, and of its values
    """

    pairs: Tensor
    """(groups, width / 2): of every key-value head the pairs that are kept, as numbers of frequencies."""

    def __init__(self, whole: Any, config: Any, heads: int, groups: int, width: int, value_width: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = whole.layer_idx
        self.head_dim, self.value_dim = width, value_width
        self.num_key_value_groups = heads // groups
        self.scaling = whole.scaling  # that of the uncut head: the scores are those of its kept part
        self.attention_dropout = whole.attention_dropout
        self.is_causal = True
        self.turns = bool(getattr(whole, "use_rope", True))
        self.sliding_window = getattr(whole, "sliding_window", getattr(config, "sliding_window", None))
        self.register_buffer("pairs", torch.arange(width // 2).repeat(groups, 1))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = whole.q_proj, whole.k_proj, whole.v_proj, whole.o_proj

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What attention adds to the stream, and its weights where they were asked for."""
        places = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*places, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*places, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*places, -1, self.value_dim).transpose(1, 2)
        if self.turns:
            # (B, T, dimensions), the same frequencies twice: (B, groups, T, pairs) of those that are kept.
            cos, sin = (angles[..., self.pairs].transpose(1, 2) for angles in position_embeddings)
            key = _turned(key, cos, sin)
            shared = self.num_key_value_groups
            query = _turned(query, cos.repeat_interleave(shared, 1), sin.repeat_interleave(shared, 1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        kernels: Any = ALL_ATTENTION_FUNCTIONS
        attend = kernels.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **settings,
        )
        return self.o_proj(attended.reshape(*places, -1).contiguous()), weights


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
    width = value_width = attention.head_dim
    if config.width_sizes is not None:
        width, value_width = config.width_sizes[index]
    for module, name, inputs, outputs, writes in (
        (attention, "q_proj", config.hidden_size, heads * width, False),
        (attention, "k_proj", config.hidden_size, groups * width, False),
        (attention, "v_proj", config.hidden_size, groups * value_width, False),
        (attention, "o_proj", heads * value_width, config.hidden_size, True),
        (mlp, "gate_proj", config.hidden_size, ffn, False),
        (mlp, "up_proj", config.hidden_size, ffn, False),
        (mlp, "down_proj", ffn, written, True),
    ):
        old = getattr(module, name)
        bias = old.bias is not None or (writes and config.output_biases)
        if old.weight.shape != (outputs, inputs) or bias != (old.bias is not None):
            setattr(module, name, nn.Linear(inputs, outputs, bias=bias))
    if config.width_sizes is not None:
        layer.self_attn = NarrowAttention(attention, config, heads, groups, width, value_width)
    ranks: dict[str, int] = {} if config.ranks is None else config.ranks[index]
    for path, rank in ranks.items():
        parent, _, name = path.rpartition(".")
        old = layer.get_submodule(path)
        new = LowRank(old.in_features, rank, old.out_features, bias=old.bias is not None)
        setattr(layer.get_submodule(parent), name, new)
    if config.shortcuts:
        size = config.norm_size or config.hidden_size
        layer.input_layernorm = StreamRMSNorm(size, config.rms_norm_eps)
        layer.post_attention_layernorm = StreamRMSNorm(size, config.rms_norm_eps)
        layer.attention_shortcut = Shortcut(config.hidden_size, config.hidden_size)
        layer.mlp_shortcut = Shortcut(config.hidden_size, written)
    else:
        layer.attention_shortcut = layer.mlp_shortcut = nn.Identity()


class _Layer(nn.Module):
    """What the blocks of all families have of this file; the family's class stands behind it."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        _shape_(self, config, layer_idx)

    def forward(self, hidden_states: Tensor, *_: Any, **settings: Any) -> Any:
        """The stream behind the block: the family's pass, with the stream handed on through the shortcuts."""
        block: Any = self
        # Some families multiply what a block adds.
        times: float = getattr(block, "residual_multiplier", 1.0)
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **settings)
        hidden_states = block.attention_shortcut(hidden_states) + _times(attended, times)
        return block.mlp_shortcut(hidden_states) + _times(
            block.mlp(block.post_attention_layernorm(hidden_states)), times
        )


def _times(added: Tensor, times: float) -> Tensor:
    return added if times == 1.0 else added * times


class _Body(nn.Module):
    """Likewise of the bodies."""

    layer_class: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        body: Any = self
        body.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        if config.shortcuts:
            body.norm = StreamRMSNorm(config.norm_size or config.hidden_size, config.rms_norm_eps)
        body._no_split_modules = {self.layer_class.__name__}  # and not the blocks that were replaced
        body.post_init()


class _CausalLM(nn.Module):
    """Likewise of the whole models."""

    body_class: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        model: Any = self
        model.model = self.body_class(config)
        model.lm_head = nn.Linear(config.final_size or config.hidden_size, config.vocab_size, bias=False)
        model._no_split_modules = {self.body_class.layer_class.__name__}
        model.post_init()


class MariotteLlamaDecoderLayer(_Layer, LlamaDecoderLayer):
    """A Llama block of stated sizes."""


class MariotteLlamaModel(_Body, LlamaModel):
    """The body of a Llama model with irregular sizes."""

    config_class = MariotteLlamaConfig
    layer_class = MariotteLlamaDecoderLayer


class MariotteLlamaForCausalLM(_CausalLM, LlamaForCausalLM):
    """A Llama model with irregular sizes."""

    config_class = MariotteLlamaConfig
    body_class = MariotteLlamaModel


class MariotteQwen2DecoderLayer(_Layer, Qwen2DecoderLayer):
    """A Qwen2 block of stated sizes."""


class MariotteQwen2Model(_Body, Qwen2Model):
    """The body of a Qwen2 model with irregular sizes."""

    config_class = MariotteQwen2Config
    layer_class = MariotteQwen2DecoderLayer


class MariotteQwen2ForCausalLM(_CausalLM, Qwen2ForCausalLM):
    """A Qwen2 model with irregular sizes."""

    config_class = MariotteQwen2Config
    body_class = MariotteQwen2Model


class MariotteMistralDecoderLayer(_Layer, MistralDecoderLayer):
    """A Mistral block of stated sizes."""


class MariotteMistralModel(_Body, MistralModel):
    """The body of a Mistral model with irregular sizes."""

    config_class = MariotteMistralConfig
    layer_class = MariotteMistralDecoderLayer


class MariotteMistralForCausalLM(_CausalLM, MistralForCausalLM):
    """A Mistral model with irregular sizes."""

    config_class = MariotteMistralConfig
    body_class = MariotteMistralModel


class MariotteQwen3DecoderLayer(_Layer, Qwen3DecoderLayer):
    """A Qwen3 block of stated sizes."""


class MariotteQwen3Model(_Body, Qwen3Model):
    """The body of a Qwen3 model with irregular sizes."""

    config_class = MariotteQwen3Config
    layer_class = MariotteQwen3DecoderLayer


class MariotteQwen3ForCausalLM(_CausalLM, Qwen3ForCausalLM):
    """A Qwen3 model with irregular sizes."""

    config_class = MariotteQwen3Config
    body_class = MariotteQwen3Model


class MariotteSmolLM3DecoderLayer(_Layer, SmolLM3DecoderLayer):
    """A SmolLM3 block of stated sizes."""


class MariotteSmolLM3Model(_Body, SmolLM3Model):
    """The body of a SmolLM3 model with irregular sizes."""

    config_class = MariotteSmolLM3Config
    layer_class = MariotteSmolLM3DecoderLayer


class MariotteSmolLM3ForCausalLM(_CausalLM, SmolLM3ForCausalLM):
    """A SmolLM3 model with irregular sizes."""

    config_class = MariotteSmolLM3Config
    body_class = MariotteSmolLM3Model


class MariotteGraniteDecoderLayer(_Layer, GraniteDecoderLayer):
    """A Granite block of stated sizes."""


class MariotteGraniteModel(_Body, GraniteModel):
    """The body of a Granite model with irregular sizes."""

    config_class = MariotteGraniteConfig
    layer_class = MariotteGraniteDecoderLayer


class MariotteGraniteForCausalLM(_CausalLM, GraniteForCausalLM):
    """A Granite model with irregular sizes."""

    config_class = MariotteGraniteConfig
    body_class = MariotteGraniteModel

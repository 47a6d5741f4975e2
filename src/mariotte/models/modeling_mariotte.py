"""Models of fifteen families whose sizes an ordinary config cannot state: sliced streams, widths by layer, factors.

This file is written beside the weights of such a checkpoint and needs nothing but torch and transformers. It is read
by ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

What its configs add to those of the family:

* ``ffn_sizes``: feed-forward width of every layer; None where all have the one that the family's config states
* ``head_sizes``: query and key-value heads of every layer; None where all have as many as the family's config says
* ``head_dim``: width of a head, also in families that take it from the hidden size, which None does there
* ``width_sizes``: of every layer the width of a head's queries and keys, and that of its values; None where all are
  ``head_dim``. Queries and keys keep some of the pairs of dimensions that rotary embeddings turn, each at its own
  frequency: those that the buffer ``pairs`` of the layer's attention names, for each key-value head. Dimensions that
  the family does not turn are pairs behind those, at no frequency. One matrix that holds query, key and value then
  holds all queries, all keys, all values, whatever its order in the family
* ``ranks``: for every layer, which of its matrices are products of two, and the rank of these: the path of the matrix
  from the layer, and a number; None where there are none
* ``output_biases``: the matrices that write to the stream, the last of attention and the last of the MLP, have biases
* ``input_biases``: the matrices that read the stream have biases, and so has the head
* ``shortcuts``: every block hands its input on through a matrix of its own instead of adding it as it is, and norms
  are RMSNorms without weights (these, and what LayerNorms do besides, are folded into the matrices around them). After
  attention, and again after the MLP: ``stream = shortcut(stream) + sublayer(norm(stream))``; once where the family has
  both side by side. Shortcuts are not trained, and there is no dropout
* ``norm_size``: number by which a norm divides the sum of squares, that of the uncut stream; None takes ``hidden_size``
* ``final_size``: width of the stream that the last block writes, which the last norm and the head read; None takes
  ``hidden_size``

All else is as in the family, and is its own code: attention, positions, cache, generation. The classes are made from
the table FAMILIES: of ``LlamaConfig`` and ``LlamaForCausalLM`` comes ``MariotteLlamaConfig``, which adds the above, and
``MariotteLlamaForCausalLM``, which makes the family's model and gives its modules the sizes that the config states.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.pytorch_utils import Conv1D


class Family(NamedTuple):
    """A family's classes, and where it keeps what may have other sizes; the defaults are those of Llama.

    Parameters
    ----------
    config, model : its classes
    blocks, final_norm, positions : from the model: its blocks, the norm behind them, and a table of learned positions
    attention_norm, mlp_norm : from a block: the norms that feed its two parts; of several names the first there is
    query, key, value, output : from a block: the matrices of attention
    fused : the one in place of the first three
    gate, up, down : from a block: the matrices of the MLP
    fused_mlp : the one in place of the first two
    act : from a block: what is between `up` and `down`, where they stand in the block itself
    embedding : what it calls the width of the embeddings, where that is a size of its own
    head_dim : what it calls the width of a head; empty where it takes it from the hidden size
    whole_norms : the norms of queries and keys take all heads together
    parallel : attention and MLP read the same stream; or what the config calls that
    one_count : attention reads the number of heads from the config, where all layers have the same
    tuples : a block gives the weights of attention too
    """

    config: Any
    model: Any
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    positions: str = ""
    attention_norm: tuple[str, ...] = ("input_layernorm",)
    mlp_norm: tuple[str, ...] = ("post_attention_layernorm",)
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    fused: str = ""
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    fused_mlp: str = ""
    act: str = ""
    embedding: str = ""
    head_dim: str = "head_dim"
    whole_norms: bool = False
    parallel: str | bool = False
    one_count: bool = False
    tuples: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaConfig, LlamaForCausalLM),
    "mistral": Family(MistralConfig, MistralForCausalLM),
    "qwen2": Family(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": Family(Qwen3Config, Qwen3ForCausalLM),
    "smollm3": Family(SmolLM3Config, SmolLM3ForCausalLM),
    "granite": Family(GraniteConfig, GraniteForCausalLM),
    "gemma2": Family(Gemma2Config, Gemma2ForCausalLM, mlp_norm=("pre_feedforward_layernorm",)),
    "gemma3_text": Family(Gemma3TextConfig, Gemma3ForCausalLM, mlp_norm=("pre_feedforward_layernorm",)),
    "olmo2": Family(
        Olmo2Config,
        Olmo2ForCausalLM,
        attention_norm=("post_attention_layernorm",),
        mlp_norm=("post_feedforward_layernorm",),
        whole_norms=True,
    ),
    "phi": Family(
        PhiConfig,
        PhiForCausalLM,
        final_norm="model.final_layernorm",
        mlp_norm=("input_layernorm",),
        output="self_attn.dense",
        gate=None,
        up="mlp.fc1",
        down="mlp.fc2",
        parallel=True,
    ),
    "phi3": Family(
        Phi3Config, Phi3ForCausalLM, fused="self_attn.qkv_proj", fused_mlp="mlp.gate_up_proj", one_count=True
    ),
    "falcon": Family(
        FalconConfig,
        FalconForCausalLM,
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention_norm=("ln_attn", "input_layernorm"),
        mlp_norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
        fused="self_attention.query_key_value",
        output="self_attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        head_dim="",
        parallel="parallel_attn",
        tuples=True,
    ),
    "gpt2": Family(
        GPT2Config,
        GPT2LMHeadModel,
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        positions="transformer.wpe",
        attention_norm=("ln_1",),
        mlp_norm=("ln_2",),
        fused="attn.c_attn",
        output="attn.c_proj",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        head_dim="",
    ),
    "opt": Family(
        OPTConfig,
        OPTForCausalLM,
        blocks="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        positions="model.decoder.embed_positions",
        attention_norm=("self_attn_layer_norm",),
        mlp_norm=("final_layer_norm",),
        output="self_attn.out_proj",
        gate=None,
        up="fc1",
        down="fc2",
        act="activation_fn",
        embedding="word_embed_proj_dim",
        head_dim="",
    ),
    "gpt_neox": Family(
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        fused="attention.query_key_value",
        output="attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        head_dim="",
        parallel="use_parallel_residual",
    ),
}
"""By model type; a family more is an entry more."""


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


class NarrowAttention(nn.Module):
    """Attention of any of the families, with heads of its own number and width, and pairs of dimensions of its own.

    Parameters
    ----------
    whole : the family's attention, which is replaced
    names : of its matrices: query, key, value or the one that holds them, and last the output
    heads, groups : query and key-value heads
    width, value_width : of a head's queries and keys, a multiple of 2, and of its values
    chosen : pairs are stated; else they are all of a head's, in its own order
    """

    pairs: Tensor | None
    """(groups, width / 2): of every key-value head the pairs that are kept, as numbers of frequencies."""

    def __init__(
        self,
        whole: Any,
        config: Any,
        names: tuple[str, ...],
        heads: int,
        groups: int,
        width: int,
        value_width: int,
        chosen: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = whole.layer_idx
        self.names = names
        self.heads, self.groups = heads, groups
        self.head_dim, self.value_dim = width, value_width
        self.whole_dim = _first(whole, "head_dim", "head_size")
        self.num_key_value_groups = heads // groups
        # That of the uncut head: the scores are those of its kept part.
        self.scaling = _first(whole, "scaling", "inv_norm_factor")
        self.attention_dropout = float(getattr(config, "attention_dropout", getattr(config, "attn_pdrop", 0.0)))
        self.is_causal = whole.is_causal
        self.turns = bool(getattr(whole, "use_rope", True))
        self.sliding_window = getattr(whole, "sliding_window", getattr(config, "sliding_window", None))
        self.softcap = getattr(whole, "attn_logit_softcapping", None)
        # Without a kernel of their own some families have their eager code in this function.
        self.eager = getattr(sys.modules[type(whole).__module__], "eager_attention_forward", eager_attention_forward)
        self.register_buffer("pairs", torch.arange(width // 2).repeat(groups, 1) if chosen else None)
        for name in (*names, *(norm for norm in ("q_norm", "k_norm") if hasattr(whole, norm))):
            setattr(self, name, getattr(whole, name))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What attention adds to the stream, and its weights where they were asked for."""
        places = hidden_states.shape[:-1]
        *reads, output = (getattr(self, name) for name in self.names)
        if len(reads) == 1:
            sizes = (self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.value_dim)
            query, key, value = reads[0](hidden_states).split(sizes, dim=-1)
        else:
            query, key, value = (read(hidden_states) for read in reads)
        query, key = self._normed(query, "q_norm", self.heads), self._normed(key, "k_norm", self.groups)
        value = value.view(*places, self.groups, self.value_dim).transpose(1, 2)
        if self.turns and position_embeddings is not None:
            cos, sin = position_embeddings
            query, key = self._rotated(query, cos, sin), self._rotated(key, cos, sin)
        cache = past_key_values if layer_past is None else layer_past
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        kernels: Any = ALL_ATTENTION_FUNCTIONS
        attend = kernels.get_interface(self.config._attn_implementation, self.eager)
        if self.softcap is not None:
            settings["softcap"] = self.softcap
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
        return output(attended.reshape(*places, -1).contiguous()), weights

    def _normed(self, states: Tensor, name: str, heads: int) -> Tensor:
        """Queries or keys by heads, (B, heads, T, width), behind their norm if there is one."""
        norm: Any = getattr(self, name, None)
        if norm is not None and norm.weight.shape[-1] == states.shape[-1]:  # of all heads together
            states, norm = norm(states), None
        states = states.view(*states.shape[:-1], heads, -1).transpose(1, 2)
        return states if norm is None else norm(states)

    def _rotated(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys, turned; cos and sin are (B, T, turned dimensions), the same frequencies twice."""
        frequencies = cos.shape[-1] // 2
        cos, sin = cos[..., :frequencies], sin[..., :frequencies]
        if self.pairs is None:
            turned, still = states[..., : 2 * frequencies], states[..., 2 * frequencies :]
            return torch.cat((_turned(turned, cos.unsqueeze(1), sin.unsqueeze(1)), still), dim=-1)
        # Pairs behind those that the family turns stay as they are: (B, heads, T, pairs), those that are kept.
        behind = (0, self.whole_dim // 2 - frequencies)
        shared = states.shape[1] // len(self.pairs)
        cos, sin = (
            nn.functional.pad(angles, behind, value=unturned)[..., self.pairs]
            .transpose(1, 2)
            .repeat_interleave(shared, 1)
            for angles, unturned in ((cos, 1.0), (sin, 0.0))
        )
        return _turned(states, cos, sin)


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys, (B, heads, T, 2 pairs), each pair turned by its angle; cos and sin are (B, heads, T, pairs)."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _first(module: Any, *names: str) -> Any:
    """What the first of these names stands for that a module has."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _there(layer: nn.Module, names: tuple[str, ...]) -> str:
    """The first of these names that a block has a module for."""
    return next(name for name in names if hasattr(layer, name))


class Sliced:
    """What the blocks of sliced models have of this file; the family's class stands behind it."""

    family: Family
    parallel: bool
    given: list[str]

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """What the MLP makes of the normalised stream."""
        layer: Any = self
        if self.family.act:
            between = getattr(layer, self.family.act)
            return layer.get_submodule(self.family.down)(between(layer.get_submodule(self.family.up)(hidden_states)))
        return layer.get_submodule(self.family.down.rpartition(".")[0])(hidden_states)

    def forward(self, hidden_states: Tensor, *others: Any, **settings: Any) -> Any:
        """The stream behind the block: the family's pass, with the stream handed on through the shortcuts."""
        layer: Any = self
        family = self.family
        # Some families multiply what a block adds.
        times: float = getattr(layer, "residual_multiplier", 1.0)
        settings |= zip(layer.given, others, strict=False)  # some families hand them over without names
        normed = getattr(layer, _there(layer, family.attention_norm))(hidden_states)
        attention = layer.get_submodule(family.output.rpartition(".")[0])
        attended, weights = attention(hidden_states=normed, **settings)
        if self.parallel:
            normed = getattr(layer, _there(layer, family.mlp_norm))(hidden_states)
            added = attended + self.feed_forward(normed)
            hidden_states = layer.attention_shortcut(hidden_states) + _times(added, times)
        else:
            hidden_states = layer.attention_shortcut(hidden_states) + _times(attended, times)
            normed = getattr(layer, _there(layer, family.mlp_norm))(hidden_states)
            hidden_states = layer.mlp_shortcut(hidden_states) + _times(self.feed_forward(normed), times)
        return (hidden_states, weights) if family.tuples else hidden_states


def _times(added: Tensor, times: float) -> Tensor:
    return added if times == 1.0 else added * times


@functools.cache
def _sliced(layer: type, family: Family) -> type:
    """The class of a family's sliced blocks."""
    forward: Any = getattr(layer, "forward")  # noqa: B009
    _, _, *given = inspect.signature(forward).parameters
    return type(
        f"Mariotte{layer.__name__}", (Sliced, layer), {"family": family, "given": given, "__module__": __name__}
    )


def _sizes(matrix: Any) -> tuple[int, int]:
    """Inputs and outputs of a matrix."""
    first, second = matrix.weight.shape
    return (first, second) if isinstance(matrix, Conv1D) else (second, first)


def _put_(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _resize_(block: nn.Module, path: str, inputs: int, outputs: int, bias: bool) -> None:
    """Give a matrix other sizes, and biases if it has none and is to have them."""
    old: Any = block.get_submodule(path)
    bias = bias or old.bias is not None
    if _sizes(old) != (inputs, outputs) or bias != (old.bias is not None):
        new = Conv1D(outputs, inputs) if isinstance(old, Conv1D) else type(old)(inputs, outputs, bias=bias)
        _put_(block, path, new)


def _narrow_norm_(block: nn.Module, path: str, size: int, config: Any) -> None:
    """Give a norm the size of sliced streams, which have turned its weights into those of the matrices behind it."""
    old = block.get_submodule(path)
    _put_(block, path, StreamRMSNorm(config.norm_size or size, _first(old, "variance_epsilon", "eps")))


def _shape_(layer: Any, config: Any, family: Family, index: int, parallel: bool) -> None:
    """Give a block of the family the sizes that the config states for it."""
    hidden = written = config.hidden_size
    if index == config.num_hidden_layers - 1 and config.final_size:
        written = config.final_size
    between = written if parallel else hidden
    where = family.output.rpartition(".")[0]
    attention, mlp = layer.get_submodule(where), layer.get_submodule(family.down.rpartition(".")[0])
    ffn = _sizes(layer.get_submodule(family.down))[0] if config.ffn_sizes is None else config.ffn_sizes[index]
    heads = config.num_attention_heads
    groups = getattr(attention, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None) or heads
    if config.head_sizes is not None:
        heads, groups = config.head_sizes[index]
    width = value_width = _first(attention, "head_dim", "head_size")
    if config.width_sizes is not None:
        width, value_width = config.width_sizes[index]
    reads = {family.query: heads * width, family.key: groups * width, family.value: groups * value_width}
    if family.fused:
        reads = {family.fused: sum(reads.values())}
    ins = (
        {path: ffn for path in (family.gate, family.up) if path}
        if not family.fused_mlp
        else {family.fused_mlp: 2 * ffn}
    )
    for path, outputs in {**reads, **ins}.items():
        _resize_(layer, path, hidden, outputs, config.input_biases)
    _resize_(layer, family.output, heads * value_width, between, config.output_biases)
    _resize_(layer, family.down, ffn, written, config.output_biases)
    for name, size in (("q_norm", heads * width), ("k_norm", groups * width)) if family.whole_norms else ():
        norm = getattr(attention, name)
        if norm.weight.shape != (size,):
            setattr(attention, name, type(norm)(size, norm.variance_epsilon))
    # What the family's code asks its modules for.
    for module, found in (
        (mlp, {"intermediate_size": ffn}),
        (
            attention,
            {
                "num_heads": heads,
                "num_key_value_heads": groups,
                "num_kv_heads": groups,
                "num_key_value_groups": heads // groups,
                "split_size": heads * width,
            },
        ),
    ):
        for name, value in found.items():
            if hasattr(module, name):
                setattr(module, name, value)
    chosen = config.width_sizes is not None
    if chosen or (config.head_sizes is not None and family.one_count):
        names = tuple(path.rpartition(".")[2] for path in (*reads, family.output))
        _put_(layer, where, NarrowAttention(attention, config, names, heads, groups, width, value_width, chosen))
    ranks: dict[str, int] = {} if config.ranks is None else config.ranks[index]
    for path, rank in ranks.items():
        old = layer.get_submodule(path)
        inputs, outputs = _sizes(old)
        _put_(layer, path, LowRank(inputs, rank, outputs, bias=old.bias is not None))
    layer.attention_shortcut = layer.mlp_shortcut = nn.Identity()
    if config.shortcuts:
        for path in {_there(layer, family.attention_norm), _there(layer, family.mlp_norm)}:
            _narrow_norm_(layer, path, hidden, config)
        layer.attention_shortcut = Shortcut(hidden, between)
        if not parallel:
            layer.mlp_shortcut = Shortcut(hidden, written)
        layer.__class__ = _sliced(layer.__class__, family)
        layer.parallel = parallel


def _made(model: Any, config: Any, family: Family, make: Callable[[Any], None]) -> None:
    """Make the family's model, of sizes that it insists on; then give its modules those that the config states."""
    keys = ("hidden_size", "num_attention_heads", *filter(None, (family.embedding,)))
    stated = {key: getattr(config, key) for key in keys}
    if not family.head_dim and config.head_dim is not None:
        # A width that is a multiple of the heads, which are as wide as stated.
        for key in ("hidden_size", family.embedding) if config.shortcuts else ():
            if key:
                setattr(config, key, config.norm_size or config.hidden_size)
        config.num_attention_heads = config.hidden_size // config.head_dim
    make(config)
    for each in (config, model.config):
        for key, value in stated.items():
            setattr(each, key, value)
    parallel = (
        getattr(config, family.parallel) if isinstance(family.parallel, str) and family.parallel else family.parallel
    )
    layers = model.get_submodule(family.blocks)
    for index, layer in enumerate(layers):
        _shape_(layer, config, family, index, bool(parallel))
    if config.shortcuts:
        _narrow_norm_(model, family.final_norm, config.hidden_size, config)
        table = model.get_input_embeddings()
        if table.embedding_dim != config.hidden_size:
            size = (config.vocab_size, config.hidden_size)
            model.set_input_embeddings(type(table)(*size, padding_idx=table.padding_idx))
        if family.positions:
            table = model.get_submodule(family.positions)
            rows = table.num_embeddings - getattr(table, "offset", 0)
            _put_(model, family.positions, type(table)(rows, config.hidden_size))
        head = model.get_output_embeddings()
        wide, bias = config.final_size or config.hidden_size, head.bias is not None or config.input_biases
        model.set_output_embeddings(nn.Linear(wide, config.vocab_size, bias=bias))
        names = {type(layer).__name__ for layer in layers}
        for part in model.modules():
            if isinstance(part, PreTrainedModel):  # what is not to be split are these blocks, not the family's own
                part._no_split_modules = names  # pyright: ignore[reportPrivateUsage]
    model.post_init()


_ADDED: dict[str, tuple[Any, Any]] = {
    "ffn_sizes": (list[int] | None, None),
    "head_sizes": (list[list[int]] | None, None),
    "width_sizes": (list[list[int]] | None, None),
    "ranks": (list[dict[str, int]] | None, None),
    "output_biases": (bool, False),
    "input_biases": (bool, False),
    "shortcuts": (bool, False),
    "norm_size": (int | None, None),
    "final_size": (int | None, None),
}
"""What configs have more than their family's: type and default; see the top of this file."""


def _unchecked(config: Any) -> None:
    """Of what families ask of sizes, nothing: that heads divide the stream; their size is stated by itself."""


@functools.cache
def classes(name: str) -> tuple[Any, Any]:
    """The config and the model of a family with irregular sizes."""
    family = FAMILIES[name]
    added = _ADDED if family.head_dim else {**_ADDED, "head_dim": (int | None, None)}
    stated = {
        "__module__": __name__,
        "__doc__": f"The config of a {name} model with irregular sizes; see the top of this file.",
        "__annotations__": {key: kind for key, (kind, _) in added.items()},
        "model_type": f"mariotte_{name}",
        "validate_architecture": _unchecked,
        **{key: default for key, (_, default) in added.items()},
    }
    # `strict` checks what this class says of validity, and not what its parent says.
    config_of = strict(type(f"Mariotte{family.config.__name__}", (family.config,), stated))

    class Irregular(family.model):
        config_class = config_of

        def __init__(self, config: Any) -> None:
            _made(self, config, family, super().__init__)  # pyright: ignore[reportUnknownArgumentType] of a table's class

    Irregular.__name__ = Irregular.__qualname__ = f"Mariotte{family.model.__name__}"
    Irregular.__doc__ = f"A {name} model with irregular sizes; see the top of this file."
    return config_of, Irregular


for _name in FAMILIES:
    # By their names in this module: there `from_pretrained` looks for them.
    globals().update({_class.__name__: _class for _class in classes(_name)})

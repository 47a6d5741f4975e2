"""One declarative entry a model family: where its parts are and what its config calls them.

An entry is data, and is tested as data: a tiny random model of each family is built and every path looked up. A family
that is not described here is refused by name; it never borrows another's entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from mariotte.errors import ModelError, unknown

Kind = Literal["causal", "masked", "seq2seq"]
"""What a family predicts: the next token, masked tokens on both sides, or the output of an encoder's input."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a family keeps its parts, and what its config calls their sizes.

    Parameters
    ----------
    model_type : as ``config.model_type``; of an irregular model, that of the family it comes from
    kind : what it predicts
    blocks, embeddings, final_norm, head : dotted paths from the model
    attention_norm, mlp_norm : dotted paths from a block to the norm that feeds attention and MLP
    query, key, value, output : projections of attention, from a block
    gate, up, down : projections of the MLP, from a block; `gate` is None for an MLP without one
    attention_shortcut, mlp_shortcut : matrices through which a block hands on its input, from a block, if it has any
    hidden, layers, heads, kv_heads, head_dim, ffn, vocab, tied : keys of the config
    attention_bias : the config's key that says whether the attention projections carry biases, or the fact itself
    output_bias : likewise for the output projection of attention
    mlp_bias : likewise for the projections of the MLP
    rms_norm : norms are RMSNorms: no mean subtracted, no bias
    norm_first : each norm feeds its sublayer (pre-norm), so that it can be folded into the matrices it feeds
    hidden_multiple_of_heads : the family's config validator asks that heads divide the hidden size
    irregular : sizes may be such as the family's own config cannot state; the class of such models is
        ``models/modeling_mariotte.py``
    """

    model_type: str
    kind: Kind = "causal"
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_shortcut: str = "attention_shortcut"
    mlp_shortcut: str = "mlp_shortcut"
    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    ffn: str = "intermediate_size"
    vocab: str = "vocab_size"
    tied: str = "tie_word_embeddings"
    attention_bias: str | bool = False
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    rms_norm: bool = True
    norm_first: bool = True
    hidden_multiple_of_heads: bool = False
    irregular: bool = False


FAMILIES: Mapping[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        Architecture(
            model_type="llama",
            attention_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
            hidden_multiple_of_heads=True,
        ),
        # Qwen2 has biases on query, key and value whatever its config says, and none on the output.
        Architecture(model_type="qwen2", attention_bias=True),
    )
}


IRREGULAR = "mariotte_"
"""Before a family's name, the ``config.model_type`` of its models with irregular sizes."""


def find(model_type: str) -> Architecture:
    """The entry of a family, or of its models with irregular sizes.

    Raises
    ------
    UnknownNameError
        When the family is not described; the message lists those that are.
    """
    family = model_type.removeprefix(IRREGULAR)
    if family != model_type and family in FAMILIES:
        return replace(FAMILIES[family], irregular=True, hidden_multiple_of_heads=False)
    if model_type not in FAMILIES:
        raise unknown("model type", model_type, FAMILIES, hint="; see docs/extend.md for describing a family")
    return FAMILIES[model_type]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model: what its accounting needs and its surgery checks against.

    All sizes are counts: L `layers`, D `hidden`, N `heads`, K `kv_heads`, H `head_dim`, F `ffn`, V `vocab`.

    The last three are of irregular models alone.

    Parameters
    ----------
    ffns : F of every layer, where they differ
    shortcuts : blocks hand on their input through matrices, and norms have no weights
    final : width of the stream that the last block writes and the head reads, where it is not D
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    gated: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    ffns: tuple[int, ...] | None = None
    shortcuts: bool = False
    final: int | None = None

    def ffn_of(self, layer: int) -> int:
        """Feed-forward width of one layer."""
        return self.ffn if self.ffns is None else self.ffns[layer]

    @property
    def final_size(self) -> int:
        """Width of the stream that the head reads."""
        return self.final or self.hidden

    def written_by(self, layer: int) -> int:
        """Width of the stream behind one layer."""
        return self.final_size if layer == self.layers - 1 else self.hidden


def shape(config: Mapping[str, Any]) -> Shape:
    """The sizes that a config states.

    Parameters
    ----------
    config : the content of ``config.json``

    Raises
    ------
    UnknownNameError
        When the config's family is not described.
    ModelError
        When the config lacks a size.
    """
    if "model_type" not in config:
        raise ModelError(
            "a config must state its model_type, got none; is this the config.json of a transformers model?"
        )
    entry = find(str(config["model_type"]))

    def size(key: str, default: int | None = None) -> int:
        found = config.get(key)
        found = default if found is None else found
        if not isinstance(found, int) or found < 1:
            raise ModelError(f"the {entry.model_type} config must state {key} as a positive integer, got {found!r}")
        return found

    def fact(key: str | bool) -> bool:
        return key if isinstance(key, bool) else bool(config.get(key, False))

    hidden, heads, layers = size(entry.hidden), size(entry.heads), size(entry.layers)
    ffns = cast("list[int] | None", config.get("ffn_sizes")) if entry.irregular else None
    if ffns is not None and len(ffns) != layers:
        raise ModelError(f"ffn_sizes must hold a width for each of the {layers} layers, got {len(ffns)}")
    final = size("final_size", hidden) if entry.irregular else hidden
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=size(entry.kv_heads, heads),
        head_dim=size(entry.head_dim, hidden // heads),
        ffn=size(entry.ffn),
        vocab=size(entry.vocab),
        tied=fact(entry.tied),
        gated=entry.gate is not None,
        attention_bias=fact(entry.attention_bias),
        output_bias=fact(entry.output_bias),
        mlp_bias=fact(entry.mlp_bias),
        ffns=None if ffns is None else tuple(ffns),
        shortcuts=entry.irregular and fact("shortcuts"),
        final=None if final == hidden else final,
    )

"""The sizes of a model, read from its config as its family's entry says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from mariotte.architectures.entry import Architecture
from mariotte.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model: what its accounting needs and its surgery checks against.

    All sizes are counts: L `layers`, D `hidden`, N `heads`, K `kv_heads`, H `head_dim`, F `ffn`, V `vocab`.

    Parameters
    ----------
    ffns : F of every layer, where they differ; like the next six of irregular models alone
    attentions : N and K of every layer, where they differ
    widths : H of queries and keys, and of values, of every layer, where they are not `head_dim`
    ranks : of every layer those of its matrices, attention's and then the MLP's, that are products of two, and 0 of
        those that are whole, where there are any
    fused, fused_mlp : query, key and value are one matrix, and so are gate and up
    parallel : attention and MLP read the same stream
    up_bias : of the MLP's projections all but the last have biases
    down_bias : of the MLP's projections the last alone has a bias
    shortcuts : blocks hand on their input through matrices, and norms have no weights
    final : width of the stream that the last block writes and the head reads, where it is not D
    stored : blocks, where layers share them
    norms : of the width of the stream, in each block
    head_norms : parameters of norms of queries and keys: of each head by itself, of all heads together, or none
    sinks : there is a number for each head beside its scores
    experts, active : MLPs of each block, and how many of them a token takes; 0 and 0 of a block with a single MLP
    cross : blocks attend to what an encoder read, too
    norm_bias : norms have biases
    final_norm : there is a norm behind the last block
    relative : parameters of the table of relative positions
    embedding : width E of the embeddings, where it is not D
    tables : parameters of the tables of positions and token types
    embedding_norm : the sum of the embeddings is normalised
    map_in, map_out, map_bias : matrices from E to D before the blocks, from D to E behind them, and their biases
    transform : a matrix, with a bias, and a norm stand before the head
    head_biases : biases of the head
    copies : tables of embeddings besides the first
    encoder : the sizes of the encoder that an encoder-decoder has beside the decoder described here
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
    attentions: tuple[tuple[int, int], ...] | None = None
    widths: tuple[tuple[int, int], ...] | None = None
    ranks: tuple[tuple[int, ...], ...] | None = None
    fused: bool = False
    fused_mlp: bool = False
    parallel: bool = False
    up_bias: bool = False
    down_bias: bool = False
    shortcuts: bool = False
    final: int | None = None
    stored: int | None = None
    norms: int = 2
    head_norms: Literal["each", "all"] | None = None
    sinks: bool = False
    experts: int = 0
    active: int = 0
    cross: bool = False
    norm_bias: bool = False
    final_norm: bool = True
    relative: int = 0
    embedding: int | None = None
    tables: int = 0
    embedding_norm: bool = False
    map_in: bool = False
    map_out: bool = False
    map_bias: bool = False
    transform: bool = False
    head_biases: int = 0
    copies: int = 0
    encoder: Shape | None = None

    @property
    def blocks(self) -> int:
        """Blocks that there are; a shared one counts once."""
        return self.stored or self.layers

    @property
    def embedding_size(self) -> int:
        """Width of the embeddings."""
        return self.embedding or self.hidden

    def ffn_of(self, layer: int) -> int:
        """Feed-forward width of one layer."""
        return self.ffn if self.ffns is None else self.ffns[layer]

    def heads_of(self, layer: int) -> tuple[int, int]:
        """Query and key-value heads of one layer."""
        return (self.heads, self.kv_heads) if self.attentions is None else self.attentions[layer]

    def widths_of(self, layer: int) -> tuple[int, int]:
        """Width of a head's queries and keys, and of its values, in one layer."""
        return (self.head_dim, self.head_dim) if self.widths is None else self.widths[layer]

    @property
    def final_size(self) -> int:
        """Width of the stream that the head reads."""
        return self.final or self.hidden

    def written_by(self, layer: int) -> int:
        """Width of the stream behind one layer."""
        return self.final_size if layer == self.layers - 1 else self.hidden

    def attended_by(self, layer: int) -> int:
        """Width of what the attention of one layer writes."""
        return self.written_by(layer) if self.parallel else self.hidden


def stack_shape(config: Mapping[str, Any], entry: Architecture) -> Shape:
    """The sizes of one stack of blocks, with what is before and behind it.

    Parameters
    ----------
    config : the content of ``config.json``
    entry : of the stack; see `Architecture.stacks`

    Raises
    ------
    ModelError
        When the config lacks a size.
    """
    config = entry.stated(config)

    def size(key: str, default: int | None = None) -> int:
        found = config.get(key) if key else None
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
    attentions = cast("list[list[int]] | None", config.get("head_sizes")) if entry.irregular else None
    if attentions is not None and [len(sizes) for sizes in attentions] != [2] * layers:
        raise ModelError(f"head_sizes must hold two numbers of heads for each of the {layers} layers, got {attentions}")
    widths = cast("list[list[int]] | None", config.get("width_sizes")) if entry.irregular else None
    if widths is not None and [len(sizes) for sizes in widths] != [2] * layers:
        raise ModelError(f"width_sizes must hold two widths of heads for each of the {layers} layers, got {widths}")
    ranks = cast("list[dict[str, int]] | None", config.get("ranks")) if entry.irregular else None
    paths = (*entry.attention_paths, *entry.ffn_paths)
    if ranks is not None and (len(ranks) != layers or any(set(some) - set(paths) for some in ranks)):
        raise ModelError(f"ranks must name matrices of the block for each of the {layers} layers, got {ranks}")
    added = entry.irregular and fact("output_biases")
    folded = entry.irregular and fact("input_biases")
    final = size("final_size", hidden) if entry.irregular else hidden
    embedding = size(entry.embedding, hidden)
    mapped, tied = entry.always_mapped or embedding != hidden, fact(entry.tied)
    positions = size(entry.position_count) + entry.position_offset if entry.positions else 0
    types = size(entry.type_count) if entry.types else 0
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=entry.kv_heads if isinstance(entry.kv_heads, int) else size(entry.kv_heads, heads),
        head_dim=size(entry.head_dim, hidden // heads),
        ffn=size(entry.ffn, None if entry.ffn_multiple is None else entry.ffn_multiple * hidden),
        vocab=size(entry.vocab),
        tied=tied,
        gated=entry.gate is not None,
        norms=len({entry.attention_norm, entry.mlp_norm, *entry.outer_norms, *filter(None, (entry.cross_norm,))}),
        head_norms=None if not entry.head_norms else "all" if entry.whole_norms else "each",
        sinks=bool(entry.sinks),
        experts=size(entry.expert_count) if entry.experts else 0,
        active=size(entry.active_experts) if entry.experts else 0,
        attention_bias=fact(entry.attention_bias) or folded,
        output_bias=fact(entry.output_bias) or added,
        mlp_bias=fact(entry.mlp_bias),
        ffns=None if ffns is None else tuple(ffns),
        attentions=None if attentions is None else tuple((heads, groups) for heads, groups in attentions),
        widths=None if widths is None else tuple((width, value) for width, value in widths),
        ranks=None if ranks is None else tuple(tuple(some.get(path, 0) for path in paths) for some in ranks),
        fused=bool(entry.fused),
        fused_mlp=bool(entry.fused_mlp),
        parallel=entry.parallel,
        up_bias=folded and not fact(entry.mlp_bias),
        down_bias=added and not fact(entry.mlp_bias),
        shortcuts=entry.irregular and fact("shortcuts"),
        final=None if final == hidden else final,
        stored=size(entry.stored) if entry.stored else None,
        cross=bool(entry.cross),
        norm_bias=not entry.rms_norm,
        final_norm=bool(entry.final_norm),
        relative=size(entry.buckets) * heads if entry.relative else 0,
        embedding=None if embedding == hidden else embedding,
        tables=positions * (hidden if entry.positions_behind_map else embedding) + types * embedding,
        embedding_norm=bool(entry.embedding_norm),
        map_in=bool(entry.map_in) and mapped,
        map_out=bool(entry.map_out) and mapped,
        map_bias=entry.map_bias,
        transform=bool(entry.transform),
        # Like the head itself, copies of the embeddings and a second name of the bias are shared only when it is tied.
        copies=0 if tied else len(entry.copies),
        head_biases=min(len(entry.head_biases), 1) if tied else max(len(entry.head_biases), int(folded)),
    )

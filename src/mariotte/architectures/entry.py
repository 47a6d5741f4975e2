"""What an entry says of a model family: where its parts are, and what its config calls them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mariotte.architectures.sizes import Shape

Kind = Literal["causal", "masked", "seq2seq"]
"""What a family predicts: the next token, tokens masked anywhere, or a text from another that an encoder has read."""

Need = Literal["causal", "one text", "linear", "separate", "pre-norm", "rms-norm", "sequential", "gated", "dense"]
"""What a method may need of a family; see `Architecture.lacking`."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a family keeps its parts, and what its config calls their sizes.

    An empty path or key says that the family has no such part; the defaults are those of Llama.

    Parameters
    ----------
    model_type : as ``config.model_type``; of an irregular model, that of the family it comes from
    kind : what it predicts
    blocks, embeddings, final_norm, head : dotted paths from the model; of an encoder-decoder, those of the decoder
    positions, types : tables of learned positions and of token types, from the model
    embedding_norm : norm of the sum of the embeddings, from the model
    map_in, map_out : matrices between the width of the embeddings and that of the stream, from the model
    transform, head_norm : what the final stream passes before the head, from the model
    head_biases : parameters that are the head's bias, from the model: one, or as many when the head is not tied
    copies : parameters that are the embeddings under another name, and tables of their own when the head is not tied
    attention_norm, mlp_norm, cross_norm : dotted paths from a block to the norms of attention, MLP and cross attention;
        they feed these parts, or take what they add where the family is post-norm
    query, key, value, output : projections of attention, from a block
    fused : matrix that holds query, key and value together, from a block, in place of those three: all queries, then
        all keys, then all values
    grouped : `fused` goes by key-value heads instead: of each its queries, its key, its value
    head_norms : norms of queries and of keys, from a block
    whole_norms : these take all heads together and not each by itself
    sinks : a number for each head, beside its scores, from a block
    slopes : scores depend on the place of a head among the others (ALiBi)
    cross : query, key, value and output of the attention to what an encoder read, from a block
    relative : table of relative positions, from the first block of a stack
    gate, up, down : projections of the MLP, from a block; `gate` is None for an MLP without one
    fused_mlp : matrix that holds gate and up together, in this order, from a block, in place of those two
    outer_norms : norms of what attention and MLP add, from a block, where there are others that feed them
    experts : module that holds the MLPs of a mixture, stacked, from a block; none where a block has a single MLP
    router : what says which of them a token takes, from a block
    expert_count, active_experts : keys of the config: how many there are, and how many a token takes
    experts_transposed : their matrices are held as inputs x outputs, rows of gate and up in turn
    attention_shortcut, mlp_shortcut : matrices through which a block hands on its input, from a block, if it has any
    hidden, layers, heads, kv_heads, head_dim, ffn, vocab, tied : keys of the config; kv_heads may be the number itself
    residual : key of the number with which what a block adds to the stream is multiplied
    stored : the config's key that says how many blocks there are where layers share them
    embedding, position_count, type_count, buckets : keys of the config: width of the embeddings, rows of their tables
    position_offset : rows before the first position, beside those that the config counts
    positions_behind_padding : the first position is the row behind that of the padding token, among those counted
    positions_behind_map : positions are as wide as the stream and not as the embeddings
    always_mapped : there is a map also between equal widths
    map_bias : maps carry biases
    ffn_multiple : width of an MLP whose width the config does not state, in hidden sizes
    attention_bias : the config's key that says whether the attention projections carry biases, or the fact itself
    output_bias : likewise for the output projection of attention
    mlp_bias : likewise for the projections of the MLP, or of experts and what chooses among them
    rms_norm : norms are RMSNorms: no mean subtracted, no bias
    norm_first : a norm feeds each sublayer (pre-norm), so that it can be folded into the matrices it feeds
    parallel : attention and MLP read the same stream, neither what the other adds
    transposed : the blocks' matrices are held as inputs x outputs (Conv1D)
    hidden_multiple_of_heads : the family's config validator asks that heads divide the hidden size
    kernel : what transformers computes attention with: eager for families whose scores sdpa cannot compute
    irregular : sizes may be such as the family's own config cannot state; the class of such models is
        ``models/modeling_mariotte.py``
    encoder : fields that are otherwise in the encoder of an encoder-decoder
    variants : fields that are otherwise where the config says so, by ``key=value``, in which ``*`` stands for anything,
        and a dot leads into a key of a key
    defaults : what the config means when it leaves a key out: a value, or the name of the key in whose place it stands
    assumes : what the config must say, as models with another value are not described here
    ignored : patterns of weights in published checkpoints that the model has no use for
    """

    model_type: str
    kind: Kind = "causal"
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    positions: str = ""
    types: str = ""
    embedding_norm: str = ""
    map_in: str = ""
    map_out: str = ""
    final_norm: str = "model.norm"
    transform: str = ""
    head_norm: str = ""
    head: str = "lm_head"
    head_biases: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    cross_norm: str = ""
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    fused: str = ""
    grouped: bool = False
    head_norms: tuple[str, ...] = ()
    whole_norms: bool = False
    sinks: str = ""
    slopes: bool = False
    cross: tuple[str, ...] = ()
    relative: str = ""
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    fused_mlp: str = ""
    outer_norms: tuple[str, ...] = ()
    experts: str = ""
    router: str = ""
    expert_count: str = ""
    active_experts: str = "num_experts_per_tok"
    experts_transposed: bool = False
    attention_shortcut: str = "attention_shortcut"
    mlp_shortcut: str = "mlp_shortcut"
    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    stored: str = ""
    heads: str = "num_attention_heads"
    kv_heads: str | int = "num_key_value_heads"
    head_dim: str = "head_dim"
    ffn: str = "intermediate_size"
    vocab: str = "vocab_size"
    tied: str = "tie_word_embeddings"
    residual: str = ""
    embedding: str = ""
    position_count: str = "max_position_embeddings"
    position_offset: int = 0
    positions_behind_padding: bool = False
    positions_behind_map: bool = False
    always_mapped: bool = False
    map_bias: bool = False
    type_count: str = "type_vocab_size"
    buckets: str = ""
    ffn_multiple: int | None = None
    attention_bias: str | bool = False
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    rms_norm: bool = True
    norm_first: bool = True
    parallel: bool = False
    transposed: bool = False
    hidden_multiple_of_heads: bool = False
    kernel: str = "sdpa"
    irregular: bool = False
    encoder: Mapping[str, Any] = field(default_factory=dict[str, Any])
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    assumes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ignored: tuple[str, ...] = ()

    @property
    def attention_paths(self) -> tuple[str, ...]:
        """The matrices of attention, from a block: query, key, value or the one that holds them, output, cross."""
        read = (self.fused,) if self.fused else (self.query, self.key, self.value)
        return (*read, self.output, *self.cross)

    @property
    def ffn_paths(self) -> tuple[str, ...]:
        """The matrices of the MLP, from a block: gate if there is one, up, or the one that holds both, down.

        Of a mixture, those that hold the gates and ups, and the downs, of all experts.
        """
        if self.experts:
            return (f"{self.experts}.gate_up_proj", f"{self.experts}.down_proj")
        if self.fused_mlp:
            return (self.fused_mlp, self.down)
        return (*(() if self.gate is None else (self.gate,)), self.up, self.down)

    @property
    def turns(self) -> bool:
        """Whether the stream can be rotated, so that no logit changes: norms commute with it, and feed matrices."""
        return self.rms_norm and self.norm_first and not self.outer_norms

    def rows(self, shape: Shape) -> tuple[list[int], list[int], list[int]]:
        """Rows of the fused matrix that make queries, keys and values, heads in their order."""
        width, heads, groups = shape.head_dim, shape.heads, shape.kv_heads
        if not self.grouped:
            ends = (heads * width, (heads + groups) * width, (heads + 2 * groups) * width)
            return list(range(ends[0])), list(range(ends[0], ends[1])), list(range(ends[1], ends[2]))
        of_group = [
            list(range(at, at + (heads // groups + 2) * width))
            for at in range(0, (heads + 2 * groups) * width, (heads // groups + 2) * width)
        ]
        flat = [
            [row for rows in part for row in rows]
            for part in (
                [rows[: -2 * width] for rows in of_group],
                [rows[-2 * width : -width] for rows in of_group],
                [rows[-width:] for rows in of_group],
            )
        ]
        return flat[0], flat[1], flat[2]

    @property
    def stacks(self) -> tuple[Architecture, ...]:
        """The entries of the stacks of blocks, from input to output: of an encoder if there is one, and its own."""
        if not self.encoder:
            return (self,)
        return (replace(self, **{"cross": (), "cross_norm": "", "encoder": {}, **self.encoder}), self)

    def stated(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with what it leaves out."""
        stated = {key: value for key, value in config.items() if value is not None}
        for key, value in self.defaults.items():
            if key not in stated and (found := stated.get(value) if isinstance(value, str) else value) is not None:
                stated[key] = found
        return stated

    def longest(self, config: Mapping[str, Any]) -> int | None:
        """Tokens that a model reads at most, or None where its config sets no bound.

        Examples
        --------
        >>> from mariotte.architectures import find
        >>> find("roberta").longest({"max_position_embeddings": 514, "pad_token_id": 1})
        512
        """
        config = self.stated(config)
        counted = config.get(self.position_count)
        if not isinstance(counted, int):
            return None
        return counted - (int(config["pad_token_id"]) + 1 if self.positions_behind_padding else 0)

    def lacking(self, needs: Iterable[Need]) -> str | None:
        """The first of these needs that the family does not meet, with the reason, in a clause; None when it meets all.

        Examples
        --------
        >>> from mariotte.architectures import find
        >>> find("gpt2").lacking(["causal", "linear"])
        'needs linear layers, and gpt2 holds its matrices transposed (Conv1D)'
        """
        for need in needs:
            met, wanted, found = {
                "causal": (self.kind == "causal", "a causal decoder", f"predicts otherwise: it is {self.kind}"),
                "one text": (
                    self.kind != "seq2seq",
                    "a model that reads one text",
                    "reads one and writes another, which calibration text does not tell apart",
                ),
                "linear": (not self.transposed, "linear layers", "holds its matrices transposed (Conv1D)"),
                "separate": (not self.fused, "separate query, key and value", "holds them in one matrix"),
                "dense": (not self.experts, "one MLP a block", "is a mixture of experts"),
                "pre-norm": (
                    self.norm_first and not self.outer_norms,
                    "norms before attention and MLP alone",
                    "has them behind, too" if self.norm_first else "has them behind (post-norm)",
                ),
                "rms-norm": (self.rms_norm, "RMSNorm", "has LayerNorm, which subtracts the mean and adds a bias"),
                "sequential": (not self.parallel, "an MLP behind attention", "has both side by side"),
                "gated": (self.gate is not None, "a gated MLP", "has one without a gate"),
            }[need]
            if not met:
                return f"needs {wanted}, and {self.model_type} {found}"
        return None

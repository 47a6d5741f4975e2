"""One declarative entry a model family: where its parts are and what its config calls them.

An entry is data, and is tested as data: a tiny random model of each family is built and every path looked up. A family
that is not described here is refused by name; it never borrows another's entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

from mariotte.errors import ModelError, unknown

Kind = Literal["causal", "masked", "seq2seq"]
"""What a family predicts: the next token, tokens masked anywhere, or a text from another that an encoder has read."""

Need = Literal["causal", "linear", "separate", "pre-norm", "rms-norm", "sequential", "gated", "dense"]
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
        >>> FAMILIES["roberta"].longest({"max_position_embeddings": 514, "pad_token_id": 1})
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
        >>> FAMILIES["gpt2"].lacking(["causal", "linear"])
        'needs linear layers, and gpt2 holds its matrices transposed (Conv1D)'
        """
        for need in needs:
            met, wanted, found = {
                "causal": (self.kind == "causal", "a causal decoder", f"predicts otherwise: it is {self.kind}"),
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


_BERT = Architecture(
    model_type="bert",
    kind="masked",
    blocks="bert.encoder.layer",
    embeddings="bert.embeddings.word_embeddings",
    positions="bert.embeddings.position_embeddings",
    types="bert.embeddings.token_type_embeddings",
    embedding_norm="bert.embeddings.LayerNorm",
    final_norm="",
    transform="cls.predictions.transform.dense",
    head_norm="cls.predictions.transform.LayerNorm",
    head="cls.predictions.decoder",
    head_biases=("cls.predictions.bias", "cls.predictions.decoder.bias"),
    attention_norm="attention.output.LayerNorm",
    mlp_norm="output.LayerNorm",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    gate=None,
    up="intermediate.dense",
    down="output.dense",
    kv_heads="",
    head_dim="",
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    rms_norm=False,
    norm_first=False,
    hidden_multiple_of_heads=True,
    defaults={"tie_word_embeddings": True, "type_vocab_size": 2},
    assumes={"is_decoder": False, "add_cross_attention": False},
    ignored=("*.pooler.*", "cls.seq_relationship.*", "*.position_ids"),
)


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
        Architecture(model_type="mistral"),
        # Qwen2 has biases on query, key and value whatever its config says, and none on the output.
        Architecture(model_type="qwen2", attention_bias=True),
        Architecture(
            model_type="qwen3",
            head_norms=("self_attn.q_norm", "self_attn.k_norm"),
            attention_bias="attention_bias",
            output_bias="attention_bias",
            defaults={"head_dim": 128},
        ),
        Architecture(
            model_type="smollm3",
            attention_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
            defaults={"tie_word_embeddings": True},
        ),
        Architecture(
            model_type="granite",
            residual="residual_multiplier",
            attention_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
        ),
        Architecture(
            model_type="gemma2",
            kernel="eager",
            mlp_norm="pre_feedforward_layernorm",
            outer_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            attention_bias="attention_bias",
            output_bias="attention_bias",
            hidden_multiple_of_heads=True,
            defaults={"tie_word_embeddings": True, "head_dim": 256},
        ),
        Architecture(
            model_type="gemma3_text",
            head_norms=("self_attn.q_norm", "self_attn.k_norm"),
            mlp_norm="pre_feedforward_layernorm",
            outer_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            attention_bias="attention_bias",
            output_bias="attention_bias",
            hidden_multiple_of_heads=True,
            defaults={"tie_word_embeddings": True, "head_dim": 256},
        ),
        Architecture(
            model_type="olmo2",
            head_norms=("self_attn.q_norm", "self_attn.k_norm"),
            whole_norms=True,
            attention_norm="post_attention_layernorm",
            mlp_norm="post_feedforward_layernorm",
            norm_first=False,
            attention_bias="attention_bias",
            output_bias="attention_bias",
        ),
        # Attention and MLP read the same norm.
        Architecture(
            model_type="phi",
            final_norm="model.final_layernorm",
            head_biases=("lm_head.bias",),
            mlp_norm="input_layernorm",
            output="self_attn.dense",
            gate=None,
            up="mlp.fc1",
            down="mlp.fc2",
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
            rms_norm=False,
            parallel=True,
            assumes={"qk_layernorm": False},
        ),
        Architecture(
            model_type="phi3",
            query="",
            key="",
            value="",
            fused="self_attn.qkv_proj",
            fused_mlp="mlp.gate_up_proj",
            # Its config counts the factors of a stretched rotation against the hidden size over the heads.
            variants={"rope_parameters.rope_type=longrope": {"head_dim": ""}},
        ),
        Architecture(
            model_type="falcon",
            blocks="transformer.h",
            embeddings="transformer.word_embeddings",
            final_norm="transformer.ln_f",
            mlp_norm="input_layernorm",
            query="",
            key="",
            value="",
            fused="self_attention.query_key_value",
            output="self_attention.dense",
            gate=None,
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            kv_heads=1,
            head_dim="",
            ffn="ffn_hidden_size",
            ffn_multiple=4,
            attention_bias="bias",
            output_bias="bias",
            mlp_bias="bias",
            rms_norm=False,
            parallel=True,
            hidden_multiple_of_heads=True,
            # In this order: the newest layout ignores what the config says of the others.
            variants={
                "alibi=True": {"slopes": True},
                "multi_query=False": {"kv_heads": "num_kv_heads", "grouped": True},
                "parallel_attn=False": {"parallel": False, "mlp_norm": "post_attention_layernorm"},
                "new_decoder_architecture=True": {
                    "kv_heads": "num_kv_heads",
                    "grouped": True,
                    "parallel": True,
                    "attention_norm": "ln_attn",
                    "mlp_norm": "ln_mlp",
                },
                "num_ln_in_parallel_attn=1": {"attention_norm": "input_layernorm", "mlp_norm": "input_layernorm"},
            },
            defaults={"tie_word_embeddings": True},
        ),
        # Mixtures of experts.
        Architecture(
            model_type="mixtral",
            experts="mlp.experts",
            router="mlp.gate",
            expert_count="num_local_experts",
        ),
        Architecture(
            model_type="qwen3_moe",
            head_norms=("self_attn.q_norm", "self_attn.k_norm"),
            experts="mlp.experts",
            router="mlp.gate",
            expert_count="num_local_experts",
            ffn="moe_intermediate_size",
            attention_bias="attention_bias",
            output_bias="attention_bias",
            defaults={"num_local_experts": "num_experts", "head_dim": 128},
            assumes={"mlp_only_layers": [], "decoder_sparse_step": 1},
        ),
        Architecture(
            model_type="gpt_oss",
            kernel="eager",
            sinks="self_attn.sinks",
            experts="mlp.experts",
            router="mlp.router",
            expert_count="num_local_experts",
            experts_transposed=True,
            attention_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias=True,
            defaults={"head_dim": 64, "attention_bias": True},
        ),
        Architecture(
            model_type="gpt2",
            blocks="transformer.h",
            embeddings="transformer.wte",
            positions="transformer.wpe",
            final_norm="transformer.ln_f",
            attention_norm="ln_1",
            mlp_norm="ln_2",
            query="",
            key="",
            value="",
            fused="attn.c_attn",
            output="attn.c_proj",
            gate=None,
            up="mlp.c_fc",
            down="mlp.c_proj",
            hidden="n_embd",
            layers="n_layer",
            heads="n_head",
            kv_heads="",
            head_dim="",
            ffn="n_inner",
            ffn_multiple=4,
            position_count="n_positions",
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
            rms_norm=False,
            transposed=True,
            hidden_multiple_of_heads=True,
            defaults={"tie_word_embeddings": True},
            assumes={"add_cross_attention": False},
            ignored=("*.attn.bias", "*.attn.masked_bias"),
        ),
        Architecture(
            model_type="opt",
            blocks="model.decoder.layers",
            embeddings="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            map_in="model.decoder.project_in",
            map_out="model.decoder.project_out",
            final_norm="model.decoder.final_layer_norm",
            attention_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
            output="self_attn.out_proj",
            gate=None,
            up="fc1",
            down="fc2",
            kv_heads="",
            head_dim="",
            ffn="ffn_dim",
            embedding="word_embed_proj_dim",
            position_offset=2,
            positions_behind_map=True,
            attention_bias="enable_bias",
            output_bias="enable_bias",
            mlp_bias="enable_bias",
            rms_norm=False,
            hidden_multiple_of_heads=True,
            # Of the published sizes only 350m is post-norm.
            variants={"do_layer_norm_before=False": {"norm_first": False, "final_norm": ""}},
            defaults={"tie_word_embeddings": True, "enable_bias": True},
            assumes={"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
        ),
        Architecture(
            model_type="gpt_neox",
            blocks="gpt_neox.layers",
            embeddings="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            query="",
            key="",
            value="",
            fused="attention.query_key_value",
            grouped=True,
            output="attention.dense",
            gate=None,
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            kv_heads="",
            head_dim="",
            attention_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias=True,
            rms_norm=False,
            parallel=True,
            hidden_multiple_of_heads=True,
            variants={"use_parallel_residual=False": {"parallel": False}},
            defaults={"attention_bias": True},
            ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
        ),
        _BERT,
        replace(
            _BERT,
            model_type="roberta",
            blocks="roberta.encoder.layer",
            embeddings="roberta.embeddings.word_embeddings",
            positions="roberta.embeddings.position_embeddings",
            types="roberta.embeddings.token_type_embeddings",
            embedding_norm="roberta.embeddings.LayerNorm",
            transform="lm_head.dense",
            head_norm="lm_head.layer_norm",
            head="lm_head.decoder",
            head_biases=("lm_head.bias", "lm_head.decoder.bias"),
            positions_behind_padding=True,
            defaults={**_BERT.defaults, "pad_token_id": 1},
        ),
        replace(
            _BERT,
            model_type="distilbert",
            blocks="distilbert.transformer.layer",
            embeddings="distilbert.embeddings.word_embeddings",
            positions="distilbert.embeddings.position_embeddings",
            types="",
            embedding_norm="distilbert.embeddings.LayerNorm",
            transform="vocab_transform",
            head_norm="vocab_layer_norm",
            head="vocab_projector",
            head_biases=("vocab_projector.bias",),
            attention_norm="sa_layer_norm",
            mlp_norm="output_layer_norm",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            output="attention.out_lin",
            up="ffn.lin1",
            down="ffn.lin2",
            hidden="dim",
            layers="n_layers",
            heads="n_heads",
            ffn="hidden_dim",
        ),
        # One block, or a few, of which each serves many layers.
        replace(
            _BERT,
            model_type="albert",
            blocks="albert.encoder.albert_layer_groups",
            embeddings="albert.embeddings.word_embeddings",
            positions="albert.embeddings.position_embeddings",
            types="albert.embeddings.token_type_embeddings",
            embedding_norm="albert.embeddings.LayerNorm",
            map_in="albert.encoder.embedding_hidden_mapping_in",
            transform="predictions.dense",
            head_norm="predictions.LayerNorm",
            head="predictions.decoder",
            head_biases=("predictions.bias", "predictions.decoder.bias"),
            attention_norm="albert_layers.0.attention.LayerNorm",
            mlp_norm="albert_layers.0.full_layer_layer_norm",
            query="albert_layers.0.attention.query",
            key="albert_layers.0.attention.key",
            value="albert_layers.0.attention.value",
            output="albert_layers.0.attention.dense",
            up="albert_layers.0.ffn",
            down="albert_layers.0.ffn_output",
            stored="num_hidden_groups",
            embedding="embedding_size",
            always_mapped=True,
            map_bias=True,
            defaults={**_BERT.defaults, "num_hidden_groups": 1},
            assumes={"inner_group_num": 1},
            ignored=("*.pooler.*", "sop_classifier.*", "*.position_ids"),
        ),
        # Also Flan-T5, whose MLPs are gated and whose head is not tied.
        Architecture(
            model_type="t5",
            kind="seq2seq",
            blocks="decoder.block",
            embeddings="shared",
            final_norm="decoder.final_layer_norm",
            attention_norm="layer.0.layer_norm",
            cross_norm="layer.1.layer_norm",
            mlp_norm="layer.2.layer_norm",
            query="layer.0.SelfAttention.q",
            key="layer.0.SelfAttention.k",
            value="layer.0.SelfAttention.v",
            output="layer.0.SelfAttention.o",
            cross=tuple(f"layer.1.EncDecAttention.{part}" for part in "qkvo"),
            relative="layer.0.SelfAttention.relative_attention_bias",
            gate=None,
            up="layer.2.DenseReluDense.wi",
            down="layer.2.DenseReluDense.wo",
            hidden="d_model",
            layers="num_decoder_layers",
            heads="num_heads",
            kv_heads="",
            head_dim="d_kv",
            ffn="d_ff",
            buckets="relative_attention_num_buckets",
            encoder={
                "blocks": "encoder.block",
                "final_norm": "encoder.final_layer_norm",
                "mlp_norm": "layer.1.layer_norm",
                "up": "layer.1.DenseReluDense.wi",
                "down": "layer.1.DenseReluDense.wo",
                "layers": "num_layers",
            },
            variants={
                "feed_forward_proj=gated-*": {
                    "gate": "layer.2.DenseReluDense.wi_0",
                    "up": "layer.2.DenseReluDense.wi_1",
                    "encoder": {
                        "gate": "layer.1.DenseReluDense.wi_0",
                        "up": "layer.1.DenseReluDense.wi_1",
                    },
                }
            },
            defaults={
                "tie_word_embeddings": True,
                "num_decoder_layers": "num_layers",
                "relative_attention_num_buckets": 32,
            },
            ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        ),
        Architecture(
            model_type="bart",
            kind="seq2seq",
            blocks="model.decoder.layers",
            embeddings="model.shared",
            copies=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
            positions="model.decoder.embed_positions",
            embedding_norm="model.decoder.layernorm_embedding",
            final_norm="",
            attention_norm="self_attn_layer_norm",
            cross_norm="encoder_attn_layer_norm",
            mlp_norm="final_layer_norm",
            output="self_attn.out_proj",
            cross=tuple(f"encoder_attn.{part}_proj" for part in ("q", "k", "v", "out")),
            gate=None,
            up="fc1",
            down="fc2",
            hidden="d_model",
            layers="decoder_layers",
            heads="decoder_attention_heads",
            kv_heads="",
            head_dim="",
            ffn="decoder_ffn_dim",
            position_offset=2,
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
            rms_norm=False,
            norm_first=False,
            hidden_multiple_of_heads=True,
            encoder={
                "blocks": "model.encoder.layers",
                "positions": "model.encoder.embed_positions",
                "embedding_norm": "model.encoder.layernorm_embedding",
                "layers": "encoder_layers",
                "heads": "encoder_attention_heads",
                "ffn": "encoder_ffn_dim",
            },
            defaults={"tie_word_embeddings": True},
            ignored=("encoder.version", "decoder.version", "model.encoder.version", "model.decoder.version"),
        ),
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
        known = FAMILIES[family]
        head_dim = known.head_dim or "head_dim"
        return replace(known, irregular=True, hidden_multiple_of_heads=False, head_dim=head_dim)
    if model_type not in FAMILIES:
        raise unknown("model type", model_type, FAMILIES, hint="; see docs/extend.md for describing a family")
    return FAMILIES[model_type]


def of(config: Mapping[str, Any]) -> Architecture:
    """The entry of a config: its family's, in the variant that it states.

    Parameters
    ----------
    config : the content of ``config.json``

    Raises
    ------
    UnknownNameError
        When the config's family is not described.
    ModelError
        When the config states no family, or a variant that the entry does not describe.
    """
    if not config.get("model_type"):
        raise ModelError(
            "a config must state its model_type, got none; is this the config.json of a transformers model?"
        )
    entry = find(str(config["model_type"]))
    stated = entry.stated(config)
    for key, value in entry.assumes.items():
        if stated.get(key, value) != value:
            raise ModelError(
                f"of {entry.model_type} models only those with {key}={value} are described, got {stated[key]!r}; "
                "see docs/extend.md for describing others"
            )
    for condition, otherwise in entry.variants.items():
        key, _, wanted = condition.partition("=")
        found: Any = stated
        for part in key.split("."):
            found = cast("Mapping[str, Any]", found).get(part) if isinstance(found, Mapping) else None
        if fnmatchcase(str(found), wanted):
            encoder = {**entry.encoder, **otherwise.get("encoder", {})}
            entry = replace(entry, **{**otherwise, "encoder": encoder})
    return entry


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
    entry = of(config)
    *encoder, decoder = (_shape(config, stack) for stack in entry.stacks)
    return replace(decoder, encoder=encoder[0]) if encoder else decoder


def _shape(config: Mapping[str, Any], entry: Architecture) -> Shape:
    """The sizes of one stack of blocks, with what is before and behind it."""
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
        attention_bias=fact(entry.attention_bias),
        output_bias=fact(entry.output_bias) or added,
        mlp_bias=fact(entry.mlp_bias),
        ffns=None if ffns is None else tuple(ffns),
        attentions=None if attentions is None else tuple((heads, groups) for heads, groups in attentions),
        widths=None if widths is None else tuple((width, value) for width, value in widths),
        ranks=None if ranks is None else tuple(tuple(some.get(path, 0) for path in paths) for some in ranks),
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
        head_biases=min(len(entry.head_biases), 1) if tied else len(entry.head_biases),
    )

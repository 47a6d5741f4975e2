"""Parameters, bytes and FLOPs from a config's shapes alone: no weights, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mariotte.architectures import Shape, shape
from mariotte.errors import ChainError, ModelError

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes a parameter, by the dtype's name in a config."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a model of a given shape costs.

    Parameters
    ----------
    n_params : parameters, a tied embedding and a block that layers share counted once
    n_params_non_embedding : of the blocks and the norms behind them: without the embeddings and the head, tied or not
    n_bytes : bytes of the parameters in the stated dtype
    flops_per_token : forward FLOPs a token (a multiply and an add are two), output head included, embedding look-up
        not; of an encoder-decoder those of one token read and one written
    attention, ffn, embeddings : parameters of all attention projections, of all MLPs, and of what is before the blocks
        and behind their final norm: all embeddings, the head, and maps and transforms beside them
    shortcuts : of the matrices through which the blocks of a sliced model hand on their input
    """

    n_params: int
    n_params_non_embedding: int
    n_bytes: int
    flops_per_token: float
    attention: int
    ffn: int
    embeddings: int
    shortcuts: int = 0


def count(config: Mapping[str, Any], *, context: int = 0, dtype: str | None = None) -> Counts:
    """Count a model from its config.

    Parameters
    ----------
    config : the content of ``config.json``
    context : tokens already in the cache; each adds the cost of attending to it
    dtype : name of the parameters' dtype; None takes the config's own, float32 if it states none

    Raises
    ------
    ModelError
        When the family is not described, a size is missing or the dtype has no known size.

    Notes
    -----
    FLOPs follow the usual ``2 n`` for every matrix a token passes (in a mixture those of the experts that it takes, and
    what chooses them), plus ``4 L N H context`` for scores and weighted
    sum.
    Norms, rotary embeddings and softmax are left out: below one percent for any width in use.
    """
    name = dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in BYTES:
        raise ModelError(f"dtype must be one of {', '.join(BYTES)}, got {name!r}")
    return count_shape(shape(config), context=context, bytes_per_param=BYTES[name])


def count_shape(s: Shape, *, context: int = 0, bytes_per_param: float = 4) -> Counts:
    """Count a model from its sizes; see `count`."""
    stacks = (s,) if s.encoder is None else (s.encoder, s)
    counted = [_count_stack(stack) for stack in stacks]
    attention, ffn, others, shortcuts = (sum(each) for each in zip(*(c[:4] for c in counted), strict=True))
    passed, attended = (sum(each) for each in zip(*(c[4:] for c in counted), strict=True))
    width, wide = s.embedding_size, s.final_size
    maps_in, maps_out = (s.hidden * width * there for there in (s.map_in, s.map_out))
    transform = wide * width * s.transform
    # The head of a family with embeddings of another width reads that width, all others the final stream.
    read = width if s.transform or s.map_out else wide
    head = s.vocab * read
    embeddings = (
        s.vocab * width * (1 + s.copies)
        + (0 if s.tied else head)
        + s.vocab * s.head_biases
        + sum(stack.tables + (1 + stack.norm_bias) * width * stack.embedding_norm for stack in stacks)
        + maps_in
        + maps_out
        + (s.hidden * s.map_in + width * s.map_out) * s.map_bias
        + transform
        + (width + (1 + s.norm_bias) * width) * s.transform
    )
    non_embedding = attention + ffn + others + shortcuts
    return Counts(
        n_params=non_embedding + embeddings,
        n_params_non_embedding=non_embedding,
        n_bytes=round((non_embedding + embeddings) * bytes_per_param),
        flops_per_token=2.0 * (passed + maps_in + maps_out + transform + head) + 2.0 * attended * context,
        attention=attention,
        ffn=ffn,
        embeddings=embeddings,
        shortcuts=shortcuts,
    )


def _count_stack(s: Shape) -> tuple[int, int, int, int, int, int]:
    """Of one stack of blocks: parameters of attention, MLPs, norms and shortcuts; weights passed, widths attended.

    The widths are those of queries, with which scores are made, and of values, which are summed.

    A token passes a shared block as often as there are layers of it.
    """
    attentions = 1 + s.cross
    heads = [s.heads_of(layer) for layer in range(s.layers)]
    factored = [_factored(s, layer) for layer in range(s.layers)]
    sizes = [s.widths_of(layer) for layer in range(s.layers)]
    attended = [query * (width + value) for (query, _), (width, value) in zip(heads, sizes, strict=True)]
    # Of query, key and value together, and of the output.
    read = [(query + keys) * width + keys * value for (query, keys), (width, value) in zip(heads, sizes, strict=True)]
    behind = [s.attended_by(layer) for layer in range(s.layers)]
    attention_matrices = [
        (s.hidden * rows + query * value * wide) * attentions + more
        for rows, (query, _), (_, value), wide, (more, _) in zip(read, heads, sizes, behind, factored, strict=True)
    ]
    attention_biases = [
        (rows * s.attention_bias + wide * s.output_bias) * attentions for rows, wide in zip(read, behind, strict=True)
    ]
    ins = 2 if s.gated else 1
    widths = [(s.ffn_of(layer), s.written_by(layer)) for layer in range(s.layers)]
    one = [ffn * (ins * s.hidden + written) + more for (ffn, written), (_, more) in zip(widths, factored, strict=True)]
    # What chooses among experts is a matrix too, which all tokens pass.
    ffn_matrices = [weights * (s.experts or 1) + s.hidden * s.experts for weights in one]
    ffn_passed = [weights * (s.active or 1) + s.hidden * s.experts for weights in one]
    ffn_biases = [
        (ins * ffn * (s.mlp_bias or s.up_bias) + written * (s.mlp_bias or s.down_bias)) * (s.experts or 1)
        + s.experts * s.mlp_bias
        for ffn, written in widths
    ]
    # Norms have weights, or are folded into the matrices behind them.
    norms = s.norms * s.hidden * s.blocks + s.final_size * s.final_norm
    of_heads = sum(
        {None: 0, "each": 2 * s.head_dim, "all": (query + keys) * s.head_dim}[s.head_norms] + query * s.sinks
        for query, keys in heads[: s.blocks]
    )
    # One beside attention, and one beside the MLP, unless the two stand side by side.
    shortcuts = sum(s.hidden * (written + s.hidden * (not s.parallel)) for _, written in widths) * s.shortcuts
    return (
        sum(attention_matrices[: s.blocks]) + sum(attention_biases[: s.blocks]),
        sum(ffn_matrices[: s.blocks]) + sum(ffn_biases[: s.blocks]),
        (0 if s.shortcuts else norms * (1 + s.norm_bias)) + of_heads + s.relative,
        shortcuts,
        sum(attention_matrices) + sum(ffn_passed) + shortcuts,
        sum(attended) * attentions,
    )


def matrices(s: Shape, layer: int) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Outputs and inputs of a block's matrices: query, key, value, output; gate if there is one, up, down.

    Where a family holds query, key and value in one, or gate and up, that one in their place.
    """
    (heads, groups), (width, value), ffn = s.heads_of(layer), s.widths_of(layer), s.ffn_of(layer)
    reads = [(heads * width, s.hidden), (groups * width, s.hidden), (groups * value, s.hidden)]
    ins = [(ffn, s.hidden)] * (2 if s.gated else 1)
    if s.fused:
        reads = [(sum(outputs for outputs, _ in reads), s.hidden)]
    if s.fused_mlp:
        ins = [(2 * ffn, s.hidden)]
    return (*reads, (s.attended_by(layer), heads * value)), (*ins, (s.written_by(layer), ffn))


def _factored(s: Shape, layer: int) -> tuple[int, int]:
    """Weights that attention and the MLP of one layer have more, as a rule fewer, because matrices are products."""
    if s.ranks is None:
        return 0, 0
    more = [0, 0]
    ranks = iter(s.ranks[layer])
    for part, some in enumerate(matrices(s, layer)):
        more[part] = sum(
            rank * (outputs + inputs) - outputs * inputs
            for (outputs, inputs), rank in zip(some, ranks, strict=False)
            if rank
        )
    return more[0], more[1]


def rounding(width: int, round_to: int | None = None, *, multiple_of: int = 1, at: int | None = None) -> int:
    """The multiple to which a cut width is rounded.

    Parameters
    ----------
    width : the uncut width
    round_to : asked for; None takes 128 in models at least 1024 wide, so that later quantization in groups of 32 or 128
        divides it, and 8 in smaller ones
    multiple_of : a multiple that the family insists on
    at : the model's hidden size; None when it is `width` itself

    Returns
    -------
    The smallest common multiple of the two. Without `round_to`, where that would leave fewer than eight widths to
    choose from, the general rounding gives way to its largest divisor that leaves them: a model with 5 heads, 80 wide,
    is rounded to 10 and not to 40.
    """
    if round_to is not None:
        return math.lcm(round_to, multiple_of)
    general = 128 if (at or width) >= 1024 else 8
    coarsest = max(general, width // 8)
    divisors = [d for d in range(general, 0, -1) if general % d == 0]
    return next((m for d in divisors if (m := math.lcm(d, multiple_of)) <= coarsest), multiple_of)


def check_round_to(step: str, round_to: int | None, *, of: str) -> None:
    """Refuse a `round_to` to which nothing can be rounded.

    Parameters
    ----------
    step : whose field it is, as the message calls it
    round_to : as asked for; None is `rounding`'s own choice
    of : what is rounded, such as "neurons"

    Raises
    ------
    ChainError
        When it is below one.
    """
    if round_to is not None and round_to < 1:
        raise ChainError(f"{step}: round_to must be a positive number of {of}, got {round_to}")


def cut_width(width: int, amount: float, multiple: int) -> int:
    """What is kept of a width when `amount` of it should go: the nearest multiple, or the width itself.

    At least one multiple is kept; of two equally near the larger one, so that nothing is removed without being asked.
    """
    asked = width * (1 - amount)
    below = math.floor(asked / multiple) * multiple
    choices = {max(below, multiple), below + multiple, width}
    return min((c for c in choices if c <= width), key=lambda c: (round(abs(c - asked), 9), -c))

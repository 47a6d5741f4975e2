"""Ranks of factored matrices, and widths of neurons and within heads by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from mariotte import accounting
from mariotte.accounting import rounding
from mariotte.architectures import Shape
from mariotte.cuts.common import IRREGULAR, PARTS, Sizes, whole


def refuse_low_rank(model: Sizes) -> str | None:
    """Why matrices of `model` cannot become products of two, or None when they can."""
    if model.entry.model_type not in IRREGULAR:
        return (
            f"needs a class for models of factors, and {model.entry.model_type} has none; "
            f"{', '.join(IRREGULAR)} have one: take ffn, or magnitude"
        )
    return None


def refuse_narrowing(model: Sizes, scope: str, *, plain: bool) -> str | None:
    """Why blocks of `model` cannot get widths of their own, of neurons and within heads, or None when they can.

    Parameters
    ----------
    plain : all blocks get the same width of neurons, and nothing else changes
    """
    entry, shape = model.entry, model.shape
    if entry.model_type not in IRREGULAR and not plain:
        return (
            f"needs a class for widths by layer, and {entry.model_type} has none; {', '.join(IRREGULAR)} have "
            "one: take ffn, or heads"
        )
    if shape.shortcuts or shape.ranks is not None or shape.attentions is not None:
        return (
            "needs blocks that are alike, and those of this model have shortcuts, factors or numbers of heads of "
            "their own: do it before the step that gave them"
        )
    if scope == "ffn":
        return None
    if entry.slopes:
        return (
            f"needs heads that do not depend on their place, and this {entry.model_type} has scores that do (ALiBi): "
            "take the scope ffn"
        )
    if shape.widths is None and shape.head_dim % 2:
        return f"needs heads of pairs of dimensions, and these have {shape.head_dim}: take the scope ffn"
    return None


TURN_IN_PART = ("phi", "phi3", "gpt_neox")
"""Families whose code lets rotary embeddings turn a part of each head, if the config says so."""


def turned_dimensions(model: Sizes, config: Mapping[str, Any]) -> int:
    """Dimensions of each head that rotary embeddings turn, which are its first, as a config says."""
    stated = cast("dict[str, Any]", config.get("rope_parameters") or {})
    # Configs of earlier transformers state it beside the others.
    part = stated.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    return int(model.shape.head_dim * (part if model.entry.model_type in TURN_IN_PART else 1))


def rank_left(outputs: int, inputs: int, rank: int, amount: float) -> int:
    """The rank at which a matrix has lost `amount` of its weights: the largest that has lost as much, at least 1.

    Parameters
    ----------
    rank : of the two factors that it is now; 0 of a matrix that is whole
    amount : in [0, 1)

    Returns
    -------
    0 for a matrix that stays whole: when nothing should go, or two factors of rank 1 would not be smaller
    """
    if not amount or (not rank and outputs + inputs >= outputs * inputs):
        return rank
    weights = rank * (outputs + inputs) if rank else outputs * inputs
    # 0.9 x 80 in floats may lie below 72.
    return max(1, int(weights * (1 - amount) / (outputs + inputs) + 1e-9))


def ranks_left(shape: Shape, amount: float, scope: str) -> tuple[tuple[int, ...], ...]:
    """Of every layer the ranks of its matrices after a cut, attention's first, 0 of those that are whole."""
    found: list[tuple[int, ...]] = []
    for layer in range(shape.layers):
        sizes = accounting.matrices(shape, layer)
        before = iter((0,) * sum(map(len, sizes)) if shape.ranks is None else shape.ranks[layer])
        here: list[int] = []
        for part, some in zip(("attention", "ffn"), sizes, strict=True):
            cut = amount if part in PARTS[scope] else 0.0
            here += [rank_left(*size, next(before), cut) for size in some]
        found.append(tuple(here))
    return tuple(found)


_HEAD_MULTIPLE = 8
"""Of a head's widths, which attention kernels want, where heads are wide enough to leave a choice."""


Spread = Callable[[int, Sequence[int]], Sequence[int]]
"""How a number of units that go is shared by parts that can give so many each."""


def evenly(gone: int, free: Sequence[int]) -> list[int]:
    """The spread in which all parts give the same share."""
    return whole([gone / sum(free)] * len(free), free, gone)


def kept_of_all(sizes: Sequence[int], share: float, multiple: int, spread: Spread = evenly) -> list[int]:
    """What is left of a size of every block when a share of all of them goes.

    Parameters
    ----------
    sizes : of every block
    share : of their sum, in [0, 1]
    multiple : of which the kept sizes are; at least one is kept of each block
    spread : over the blocks

    Returns
    -------
    As many, whose sum depends on nothing but sizes, share and multiple. Nothing goes where that is nearer to the share
    """
    units = [size // multiple for size in sizes]
    # A block smaller than the multiple stays as it is; what others have above one goes first.
    above = sum(size % multiple for size, unit in zip(sizes, units, strict=True) if unit)
    free = [max(unit - 1, 0) for unit in units]
    asked = share * sum(sizes)
    gone = min(max(round((asked - above) / multiple), 0), sum(free))
    if asked <= abs(above + gone * multiple - asked):
        return list(sizes)
    counts = list(spread(gone, free)) if gone else [0] * len(sizes)
    return [(unit - lost) * multiple if unit else size for size, unit, lost in zip(sizes, units, counts, strict=True)]


def multiples_of_widths(shape: Shape, round_to: int | None) -> tuple[int, int, int]:
    """Multiples of neurons, of pairs of dimensions that rotary embeddings turn, and of the width of a head's values."""
    heads = math.gcd(_HEAD_MULTIPLE, round_to or _HEAD_MULTIPLE)
    while heads > 1 and heads * 8 > shape.head_dim:
        heads //= 2
    return rounding(shape.ffn, round_to, at=shape.hidden), max(heads // 2, 1), heads


def widths_left(
    shape: Shape, amount: float, scope: str, *, queries: float, round_to: int | None, spread: Spread = evenly
) -> tuple[list[int], list[int], list[int]]:
    """Neurons, pairs and width of values that every block keeps when a share of the weights in scope goes.

    Parameters
    ----------
    amount : of the weights in scope, in [0, 1)
    scope : all, attention or ffn
    queries : share of what the others lose that queries and keys do; where these have norms of their own, they lose
        nothing
    round_to : multiple of neurons, see `multiples_of_widths`
    spread : of what goes over the blocks
    """
    layers = range(shape.layers)
    ffns = [shape.ffn_of(layer) for layer in layers]
    pairs, values = zip(*((width // 2, value) for width, value in map(shape.widths_of, layers)), strict=True)
    # Weights for each neuron, pair, and dimension of values.
    costs = ((3 if shape.gated else 2), 2 * (shape.heads + shape.kv_heads), shape.heads + shape.kv_heads)
    weights = [cost * sum(sizes) for cost, sizes in zip(costs, (ffns, pairs, values), strict=True)]
    mlp, scores, mixed = (
        weight * (part in PARTS[scope]) for weight, part in zip(weights, ("ffn", "attention", "attention"), strict=True)
    )
    # Norms of queries and keys divide by the mean over all that is there, so that no score would be what it was.
    whole_scores = shape.head_norms is not None
    queries = 0.0 if whole_scores else queries
    wanted = amount * (mlp + scores + mixed)
    share = wanted / (mlp + mixed + queries * scores)
    of_queries = queries * share
    if share > 1:
        share, of_queries = 1.0, 0.0 if whole_scores else (wanted - mlp - mixed) / scores
    found = [
        kept_of_all(sizes, part if weight else 0.0, multiple, spread)
        for sizes, part, weight, multiple in zip(
            (ffns, pairs, values),
            (share, of_queries, share),
            (mlp, scores, mixed),
            multiples_of_widths(shape, round_to),
            strict=True,
        )
    ]
    return found[0], found[1], found[2]


def with_widths(shape: Shape, ffns: Sequence[int], pairs: Sequence[int], values: Sequence[int]) -> Shape:
    """The sizes of a model whose blocks keep so many neurons, pairs of queries and keys, and width of values."""
    widths = tuple((2 * pair, value) for pair, value in zip(pairs, values, strict=True))
    return replace(shape, ffns=tuple(ffns), widths=widths)

"""Groups, which are neurons, and query heads with the key-value head that they share: what stays of them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mariotte import accounting
from mariotte.accounting import rounding
from mariotte.architectures import Shape
from mariotte.cuts.common import PARTS, Sizes, refuse_irregular
from mariotte.cuts.heads import kept_counts, possible_counts, refuse_heads
from mariotte.cuts.neurons import refuse_unequal_widths
from mariotte.cuts.ranks import evenly


def refuse_groups(model: Sizes, scope: str) -> str | None:
    """Why equally many groups cannot be taken from blocks of `model`, or None when they can."""
    heads = None if scope == "ffn" else refuse_heads(model)
    if heads and scope == "all":
        heads = f"{heads}, or neurons alone with the scope ffn"
    return heads or (None if scope == "attention" else refuse_unequal_widths(model))


def refuse_flap(model: Sizes, scope: str, *, uniform: bool) -> str | None:
    """Why groups cannot be taken from `model` wherever they stand, or as many from each block; None when they can."""
    if uniform:
        return refuse_groups(model, scope)
    if reason := refuse_irregular(model):
        return f"{reason}: ask for uniform=true"
    if scope != "ffn" and model.entry.slopes:
        return (
            f"needs heads that do not depend on their place, and this {model.entry.model_type} has scores that do "
            "(ALiBi): take the scope ffn"
        )
    if model.shape.shortcuts:
        return "needs one stream through all blocks, and this one goes through shortcut matrices: take flap first"
    if model.shape.widths is not None or model.shape.ranks is not None:
        return "needs matrices that are whole, and some of these are factors or narrow heads: take flap first"
    return None


def refuse_pruner(model: Sizes, scope: str, pruned: range) -> str | None:
    """Why as many groups cannot be taken from each of some blocks of `model`, or None when they can."""
    if reason := refuse_groups(model, scope):
        return reason
    layers = model.shape.layers
    if not pruned:
        return f"spares all {layers} blocks of this model: ask for fewer with first and last"
    if len(pruned) < layers and (reason := refuse_irregular(model)):
        return f"spares {layers - len(pruned)} blocks, so that it {reason}: ask for first=0 and last=0"
    return None


def equal_shape(
    model: Sizes, amount: float, scope: str, round_to: int | None, *, irregular: bool = False
) -> tuple[Shape, float]:
    """The sizes of a model whose blocks all lose a share of their heads and of their neurons, the nearest there is.

    Parameters
    ----------
    amount : share of the parameters of both, as far as they are in scope, in [0, 1)
    scope : all, attention or ffn
    round_to : multiple to which neurons are rounded, as in `neuron_width`
    irregular : take numbers of heads that the family's config may refuse, too

    Returns
    -------
    The shape, and how far a share may be from the one asked for
    """
    shape = model.shape
    kept = kept_counts(shape, "groups") if irregular else possible_counts(model, "groups")
    multiple = rounding(shape.ffn, round_to, at=shape.hidden)
    choices = tuple(_equal_cuts(shape, tuple(kept), multiple, scope))
    removed = [share for share, _ in choices]
    nearest = min(range(len(choices)), key=lambda place: (round(abs(removed[place] - amount), 9), place))
    heads, groups, ffn = choices[nearest][1]
    off = max((after - before for before, after in itertools.pairwise([*removed, 1.0])), default=1.0)
    return replace(shape, heads=heads, kv_heads=groups, ffn=ffn), off


_FAR = 0.02
"""Between a share that was asked for and the nearest there is, from which on it is said."""


def said_when_far(amount: float, obtained: float) -> dict[str, Any]:
    """A sentence, for the facts of a result, where the nearest cut is far from the one that was asked for."""
    if abs(obtained - amount) <= _FAR:
        return {}
    return {
        "warning": f"{obtained:.1%} went and not {amount:.1%}: whole heads and multiples of neurons are coarse in a "
        "model of this shape, and no other number of them comes nearer"
    }


@functools.cache
def _equal_cuts(
    shape: Shape, kept: tuple[tuple[int, int], ...], multiple: int, scope: str
) -> tuple[tuple[float, tuple[int, int, int]], ...]:
    """What equal cuts of all blocks remove, a share of the parameters in scope, and what they leave, the mildest first.

    Heads are few and neurons many. Each number of heads serves the amounts that it is the nearest to, and neurons make
    up for the rest: so the order is one, and what goes never falls as more is asked.
    """
    numbers = kept if scope != "ffn" else kept[:1]
    # Widths that a cut may leave, the widest first.
    widths = (
        [shape.ffn, *range((shape.ffn - 1) // multiple * multiple, 0, -multiple)]
        if scope != "attention"
        else [shape.ffn]
    )
    ends = [1 - (above + below) / 2 / shape.heads for (above, _), (below, _) in itertools.pairwise(numbers)]
    neuron = removed_share(shape, replace(shape, ffn=shape.ffn - 1), scope) if len(widths) > 1 else 0.0
    found: list[tuple[float, tuple[int, int, int]]] = []
    for (heads, groups), low, high in zip(numbers, [-1.0, *ends], [*ends, 2.0], strict=True):
        alone = removed_share(shape, replace(shape, heads=heads, kv_heads=groups), scope)
        for width in widths:
            share = alone + neuron * (shape.ffn - width)
            # A multiple beyond its own amounts, so that between two numbers of heads no amount is left out.
            if scope == "attention" or (low <= share + neuron * multiple and share - neuron * multiple < high):
                found.append((share, (heads, groups, width)))
    return tuple(sorted(found, key=lambda cut: cut[0]))


def removed_share(before: Shape, after: Shape, scope: str) -> float:
    """Share of the parameters of attention and MLPs, as far as they are in scope, that went."""
    old, new = accounting.count_shape(before), accounting.count_shape(after)
    total = (old.attention if scope != "ffn" else 0) + (old.ffn if scope != "attention" else 0)
    return (old.attention - new.attention + old.ffn - new.ffn) / total


def sizes_by_block(shape: Shape, kept: Mapping[int, Shape]) -> Shape:
    """The sizes of a model some of whose blocks have the sizes of others.

    Parameters
    ----------
    shape : of the model
    kept : by the number of a block a shape that says how many heads and neurons it has now
    """
    heads = [(kept[i].heads, kept[i].kv_heads) if i in kept else shape.heads_of(i) for i in range(shape.layers)]
    ffns = [kept[i].ffn if i in kept else shape.ffn_of(i) for i in range(shape.layers)]
    return replace(shape, attentions=tuple(heads), ffns=tuple(ffns))


def heads_at_once(shape: Shape, layer: int) -> int:
    """Query heads of a block that go together: those of a key-value head, or each alone where all share one."""
    heads, groups = shape.heads_of(layer)
    return heads // groups if groups > 1 else 1


def group_sizes(shape: Shape, layer: int) -> tuple[int, int]:
    """Parameters that go with a group of heads of a block, and with a neuron."""
    heads, groups = shape.heads_of(layer)
    at_once = heads_at_once(shape, layer)
    alone = replace(shape, layers=1, attentions=None, ffns=None, heads=heads, kv_heads=groups, ffn=shape.ffn_of(layer))
    one, two = (replace(alone, heads=at_once * n, kv_heads=n if groups > 1 else 1) for n in (1, 2))
    narrow, wide = (replace(alone, ffn=n) for n in (1, 2))
    counts = [accounting.count_shape(s).n_params for s in (one, two, narrow, wide)]
    return counts[1] - counts[0], counts[3] - counts[2]


def bounds_of_groups(shape: Shape, scope: str, round_to: int | None) -> tuple[int, int, int]:
    """Parameters of all groups in scope, of those of which one stays in each block, and of the largest part.

    Neurons go by multiples, as in `neuron_width`, and one of these is a part.
    """
    multiple = rounding(shape.ffn, round_to, at=shape.hidden)
    total = stays = largest = 0
    for layer in range(shape.layers):
        head, neuron = group_sizes(shape, layer)
        ffn, heads = shape.ffn_of(layer), shape.heads_of(layer)[0]
        for part, size, count, at_once in (
            ("attention", head, heads // heads_at_once(shape, layer), 1),
            ("ffn", neuron, ffn, min(multiple, ffn)),
        ):
            if part in PARTS[scope]:
                total += size * count
                stays += size * at_once
                largest = max(largest, size * at_once)
    return total, stays, largest


def removed_of_groups(
    shape: Shape, amount: float, scope: str, round_to: int | None, *, biases: bool
) -> tuple[int, int]:
    """Parameters that go when groups do, wherever they stand, and by how many that may be off.

    Parameters
    ----------
    amount : share of the parameters of all groups in scope; see `bounds_of_groups`
    biases : matrices that write to the stream get biases where they have none
    """
    total, stays, largest = bounds_of_groups(shape, scope, round_to)
    there = shape.output_bias + (shape.mlp_bias or shape.down_bias)
    added = shape.layers * shape.hidden * (2 - there) if biases else 0
    target = min(round(total * amount), total - stays)
    return (target - added if target else 0), largest + added


def alike(
    shape: Shape, share: float, target: int, scope: str, multiple: int
) -> tuple[list[tuple[int, int]], list[int]]:
    """Heads and neurons of every block if all blocks lost alike, and as many parameters as go wherever they stand.

    Parameters
    ----------
    share, target : of the parameters of all groups in scope, and how many these are
    scope : all, attention or ffn
    multiple : of neurons, by which they go
    """
    layers = range(shape.layers)
    sizes = [group_sizes(shape, layer) for layer in layers]
    at_once = [heads_at_once(shape, layer) for layer in layers]
    counts = [shape.heads_of(layer)[0] // each for layer, each in zip(layers, at_once, strict=True)]
    lost = [0] * shape.layers
    if scope == "attention":
        free = [count - 1 for count in counts]
        lost = _nearest(target / sizes[0][0], free)
    elif scope == "all":
        lost = [min(round(share * count), count - 1) for count in counts]
    attentions = [
        (heads - each * gone, groups - gone if groups > 1 else 1)
        for (heads, groups), each, gone in zip(map(shape.heads_of, layers), at_once, lost, strict=True)
    ]
    ffns = [shape.ffn_of(layer) for layer in layers]
    if scope == "attention":
        return attentions, ffns
    rest = target - sum(head * gone for (head, _), gone in zip(sizes, lost, strict=True))
    units = _nearest(rest / (sizes[0][1] * multiple), [max(math.ceil(ffn / multiple) - 1, 0) for ffn in ffns])
    # The first multiple that goes is the one that is not whole.
    return attentions, [ffn - max(unit * multiple - -ffn % multiple, 0) for ffn, unit in zip(ffns, units, strict=True)]


def _nearest(wanted: float, free: Sequence[int]) -> list[int]:
    """The whole number of units nearest to one that is wanted, shared evenly by parts that can give so many each."""
    gone = min(max(round(wanted), 0), sum(free))
    return evenly(gone, free) if gone else [0] * len(free)


SPARED_FIRST, SPARED_LAST = 8, 16
"""Of so many blocks one is spared at the beginning and at the end: of 32 the published four and two."""


def spared_blocks(layers: int, first: int | None, last: int | None) -> range:
    """The blocks that are not spared at the beginning and at the end; None spares an eighth and a sixteenth."""
    first = layers // SPARED_FIRST if first is None else first
    last = layers // SPARED_LAST if last is None else last
    return range(first, layers - last)

"""What sizes alone say of a step: what it would keep of a model, and why it cannot work on one; no weights, no torch.

Methods ask here before and while they cut, plans and forecasts instead of cutting: one arithmetic for both. Reasons are
clauses after a step's name, None where there is none; as `mariotte.models.step.Step.refuse`.

Shapes: D model width, N query heads, K key-value heads, H head width, F neurons of a block, L blocks, O outputs and I
inputs of a matrix, R rank.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from mariotte import accounting
from mariotte.accounting import cut_width, rounding
from mariotte.architectures import FAMILIES, Architecture, Need, Shape


class Sizes(Protocol):
    """What is asked of a model: its family's entry and its sizes. Loaded models have them, and so do configs."""

    @property
    def entry(self) -> Architecture:
        """Of its family."""
        ...

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        ...


IRREGULAR = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma2", "gemma3_text", "olmo2"),
    *("phi", "phi3", "falcon", "gpt2", "opt", "gpt_neox"),
)
"""Families for which there is a class of ours whose blocks have sizes of their own: `mariotte.models.irregular`."""

PARTS = {"all": {"attention", "ffn"}, "attention": {"attention"}, "ffn": {"ffn"}, "head": {"head"}}
"""What each scope covers: the head is no part of the blocks, and of no other scope."""


# What methods of a kind have in common.


def refuse_by_family(
    model: Sizes, needs: Iterable[Need], *, mixtures: bool, cuts_widths: bool, scope: str
) -> str | None:
    """Why a step cannot work on a model, whatever else it may say.

    Parameters
    ----------
    needs : of the family; see `Architecture.lacking`
    mixtures : whether the step knows what to do with the MLPs of a mixture of experts
    cuts_widths : whether it takes rows and columns of matrices away, so that these must be whole
    scope : that it works on
    """
    if reason := model.entry.lacking(needs):
        return f"{reason}: take a model of another family, or magnitude, which works on all of them"
    if model.entry.experts and not mixtures and scope not in ("attention", "head"):
        return (
            f"needs one MLP a block, and {model.entry.model_type} is a mixture of experts: take experts, "
            "expert-ffn, shortgpt or magnitude"
        )
    if cuts_widths and model.shape.ranks is not None:
        return "needs whole matrices, and this model holds some as products of two: do it before svd-llm"
    return None


def refuse_irregular(model: Sizes) -> str | None:
    """Why blocks of `model` cannot get sizes of their own, in a clause without its end; None when they can."""
    if model.entry.model_type not in IRREGULAR:
        return f"needs a class for blocks of different sizes, and {model.entry.model_type} has none"
    return None


def whole(amounts: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Amounts of parts in whole parameters that add up to `total`.

    Parameters
    ----------
    amounts : of each part, in [0, 1)
    sizes : parameters of each part
    total : what they come to; within the number of parts of sum(amounts · sizes)

    Returns
    -------
    Parameters of each part, at most one away from its amount: those with the largest remainders are rounded up
    """
    wanted = [amount * size for amount, size in zip(amounts, sizes, strict=True)]
    counts = [int(parameters) for parameters in wanted]
    missing = total - sum(counts)
    # Rounded before they are compared: of remainders that differ by float error the first goes up.
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-round(wanted[i] - counts[i], 6), i))
    possible = [i for i in by_remainder if counts[i] < sizes[i]]
    assert 0 <= missing <= len(possible), (missing, amounts, sizes, total)
    for i in possible[:missing]:
        counts[i] += 1
    return counts


# Neurons.


def neuron_width(model: Sizes, amount: float, round_to: int | None) -> tuple[int, int]:
    """The neurons that are kept in each block, and the multiple to which they are rounded.

    Parameters
    ----------
    amount : share of the neurons to remove, in [0, 1)
    round_to : asked for; None takes 128 in models at least 1024 wide, 8 in smaller ones
    """
    shape = model.shape
    multiple = rounding(shape.ffn, round_to, at=shape.hidden)
    return cut_width(shape.ffn, amount, multiple), multiple


def refuse_unequal_widths(model: Sizes) -> str | None:
    """Why a method that keeps one width cannot work on `model`, or None when it can."""
    if model.shape.ffns is not None:
        return (
            "removes the same number of neurons from each block, and the blocks of this model differ in width: "
            "take heads or magnitude"
        )
    return None


def refuse_dense(model: Sizes) -> str | None:
    """Why experts cannot be taken from `model`, or None when they can."""
    if not model.entry.experts:
        return f"needs a mixture of experts, and {model.entry.model_type} has one MLP a block: take ffn"
    return None


# The stream.


def refuse_slice(model: Sizes) -> str | None:
    """Why the hidden size of `model` cannot be reduced under one rotation of the stream, or None when it can."""
    entry, shape = model.entry, model.shape
    # Where every matrix behind a norm has biases, and the head, these hold the norm's: then it may subtract the mean.
    held = shape.attention_bias and shape.mlp_bias and bool(shape.head_biases) and bool(entry.head_dim)
    if not (held and entry.norm_first and not entry.outer_norms) and (reason := cannot_turn(entry)):
        return reason
    if not entry.head_dim:
        return (
            f"needs a config that states head_dim, and {entry.model_type} ties the head size to the hidden size: "
            "take ffn or shortgpt"
        )
    if model.shape.shortcuts:
        return "needs one stream through all blocks, and this one goes through shortcut matrices: slice first"
    return None


ONE_WIDTH = ("gpt2",)
"""Families whose code takes the stream behind the blocks to be as wide as the embeddings."""


def refuse_slicegpt(model: Sizes) -> str | None:
    """Why the stream of `model` cannot be reduced under a rotation for each norm, or None when it can."""
    entry = model.entry
    if not entry.norm_first or entry.outer_norms:
        return (
            f"needs norms that feed the matrices, and {entry.model_type} has norms after them, whose weights no "
            "rotation passes: take ffn or shortgpt"
        )
    if entry.model_type not in IRREGULAR:
        return (
            f"needs a class for sliced models, and {entry.model_type} has none; {', '.join(IRREGULAR)} have one: "
            "take slice"
        )
    if model.shape.map_in or model.shape.map_out:
        return "needs embeddings as wide as the stream, and these are mapped to it: take ffn or shortgpt"
    if entry.slopes:
        return (
            f"needs scores that do not depend on the hidden size, and those of this {entry.model_type} do (ALiBi): "
            "take ffn or shortgpt"
        )
    if entry.model_type in ONE_WIDTH:
        return (
            f"needs a last block that may write more than the first reads, and the code of {entry.model_type} takes "
            "both to be as wide: take ffn or shortgpt"
        )
    if FAMILIES[entry.model_type].head_dim and not entry.head_dim:
        return (
            f"needs a config that states head_dim, and this {entry.model_type} counts the factors of its rotation "
            "against the hidden size over the heads: take ffn or shortgpt"
        )
    return None


def sliced_width(shape: Shape, amount: float, round_to: int) -> int:
    """The hidden size that is kept: rounded down, but at least one multiple; all of it when nothing should go."""
    if not amount:
        return shape.hidden
    asked = int(shape.hidden * (1 - amount) + 1e-9)  # 0.9 x 80 in floats may lie below 72
    return min(max(asked - asked % round_to, round_to), shape.hidden)


def sliced(shape: Shape, width: int, *, always: bool = False) -> Shape:
    """The shape of a sliced model; a cut of nothing leaves it as it was, unless it is made `always`."""
    if width == shape.hidden and not always:
        return shape
    final = shape.final_size
    if shape.norm_bias:  # LayerNorms become RMSNorms, and their biases those of the matrices behind them
        shape = replace(
            shape,
            norm_bias=False,
            attention_bias=True,
            up_bias=not shape.mlp_bias,
            head_biases=max(shape.head_biases, 1),
        )
    return replace(
        shape,
        hidden=width,
        tied=False,
        shortcuts=True,
        final=None if final == width else final,
        tables=shape.tables // shape.hidden * width,
    )


def cannot_turn(entry: Architecture) -> str | None:
    """Why the stream of a family cannot be rotated, in a clause after a method's name; None when it can."""
    if not entry.rms_norm:
        other = "ffn or shortgpt" if entry.model_type in ONE_WIDTH else "slicegpt, whose class does without, or ffn"
        return (
            "needs RMSNorm, or LayerNorm in front of matrices that all have biases, the head among them, and a config "
            f"that states head_dim, and {entry.model_type} has neither: take {other}"
        )
    if not entry.turns:
        return (
            f"needs norms that feed the matrices, and {entry.model_type} has norms after them, whose weights no "
            "rotation passes: take ffn or shortgpt"
        )
    return None


# Blocks.


def kept_blocks(model: Sizes, amount: int | float, spared: int = 0) -> int:
    """How many blocks stay when a share of them should go: at least one, and as many as are spared."""
    return max(cut_width(model.shape.layers, amount, 1), spared)


def refuse_unlike_blocks(model: Sizes) -> str | None:
    """Why a method that counts blocks cannot work on `model`, or None when it can."""
    shape = model.shape
    if shape.shortcuts:
        return "needs one stream through all blocks, and this one goes through shortcut matrices: remove blocks first"
    if shape.ffns is not None and len(set(shape.ffns)) > 1:
        return "counts blocks of one size, and these have feed-forward widths of their own: remove blocks first"
    if shape.attentions is not None and len(set(shape.attentions)) > 1:
        return "counts blocks of one size, and these have numbers of heads of their own: remove blocks first"
    if any(sizes is not None and len(set(sizes)) > 1 for sizes in (shape.widths, shape.ranks)):
        return "counts blocks of one size, and these have widths of heads or ranks of their own: remove blocks first"
    return None


def refuse_merging(model: Sizes, rule: str) -> str | None:
    """Why blocks of `model` cannot be merged, or None when they can.

    Parameters
    ----------
    rule : difference, which adds what matrices are more than others; last, which takes one block as it is
    """
    if reason := refuse_unlike_blocks(model):
        return reason
    if rule == "difference" and model.shape.ranks is not None:
        return (
            "adds differences of matrices, and of products of two the factors' sums make another product than the "
            "sum: do it before svd-llm, or take rule=last"
        )
    if model.shape.widths is not None:
        return (
            "puts numbers of other blocks in the place of one block's, and here the dimensions of each block's heads "
            "are its own: do it before modegpt, or take shortgpt or sleb"
        )
    return None


def refuse_sparing(model: Sizes, first: int, last: int) -> str | None:
    """Why blocks cannot go while so many at the beginning and at the end stay, or None when they can."""
    if reason := refuse_unlike_blocks(model):
        return reason
    if first + last >= model.shape.layers:
        return (
            f"spares {first} and {last} blocks, and this model has {model.shape.layers}: "
            "ask for fewer with first and last"
        )
    return None


# Heads.

BY = ("queries", "groups")
"""How heads go: a query head of every group at a time, or whole groups."""


def kept_counts(shape: Shape, by: str) -> list[tuple[int, int]]:
    """Query and key-value heads left after each removal of `removal_order` that leaves all groups equal, all first."""
    per_group = shape.heads // shape.kv_heads
    if by == "groups":
        whole_ones = [(groups * per_group, groups) for groups in range(shape.kv_heads, 0, -1)]
        return whole_ones + [(heads, 1) for heads in range(per_group - 1, 0, -1)]
    even = [(shape.kv_heads * heads, shape.kv_heads) for heads in range(per_group, 0, -1)]
    return even + [(heads, heads) for heads in range(shape.kv_heads - 1, 0, -1)]


def possible_counts(model: Sizes, by: str) -> list[tuple[int, int]]:
    """The counts of query and key-value heads that the family's config can state, all first; see `kept_counts`."""
    shape = model.shape
    # A class of ours states the head size beside the others, and asks for nothing.
    strict = model.entry.hidden_multiple_of_heads and bool(model.entry.head_dim)
    return [
        (heads, groups)
        for heads, groups in kept_counts(shape, by)
        if heads == shape.heads or not strict or shape.hidden % heads == 0
    ]


def largest_gap(choices: Sequence[tuple[int, int]]) -> int:
    """Heads between two neighbouring choices, at most; 1 when there is a single one."""
    return max((above - below for (above, _), (below, _) in itertools.pairwise(choices)), default=1)


def choices_of_heads(model: Sizes, by: str | None) -> tuple[str, list[tuple[int, int]]]:
    """How heads go, and the counts of query and key-value heads that the family's config can state, all first.

    Parameters
    ----------
    by : one of `BY`; None takes what leaves the finer choice, and queries where both are as fine
    """
    by = by or min(BY, key=lambda by: largest_gap(possible_counts(model, by)))
    return by, possible_counts(model, by)


def nearest_heads(choices: Sequence[tuple[int, int]], asked: float) -> tuple[int, int]:
    """Of counts of query and key-value heads those nearest to a number of query heads, the larger of equally near."""
    return min(choices, key=lambda kept: (round(abs(kept[0] - asked), 9), -kept[0]))


def refuse_heads(model: Sizes) -> str | None:
    """Why heads cannot be taken from `model`, or None when they can."""
    entry = model.entry
    if not entry.head_dim and entry.model_type not in IRREGULAR:
        return (
            f"needs a config that states head_dim, and {entry.model_type} ties the head size to the hidden "
            "size: take ffn or shortgpt"
        )
    if entry.slopes:
        return (
            f"needs heads that do not depend on their place, and this {entry.model_type} has scores that do (ALiBi): "
            "take ffn or shortgpt"
        )
    if model.shape.attentions is not None:
        return "removes the same number of heads from each block, and the blocks of this model differ: take ffn"
    if model.shape.widths is not None:
        return "needs heads whose queries and values are as wide as the config says, and these are not: do it before"
    return None


# Groups: query heads with the key-value head that they share, and neurons.


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


# Ranks, and widths by block.


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


# Matrices, for what rounds them.


def untied(model: Sizes) -> Shape:
    """The sizes of a model whose head has a matrix of its own, and with it what is shared only while it is tied."""
    shape, stacks = model.shape, model.entry.stacks
    if not shape.tied:
        return shape

    def alone(stack: Shape, entry: Architecture) -> Shape:
        return replace(stack, tied=False, copies=len(entry.copies), head_biases=len(entry.head_biases))

    if shape.encoder is not None:
        shape = replace(shape, encoder=alone(shape.encoder, stacks[0]))
    return alone(shape, stacks[-1])


def matrices_of(model: Sizes, scope: str) -> Iterator[tuple[int, int]]:
    """Outputs and inputs of every matrix of a scope, as the family holds them; of a product of two, of these.

    The matrices of a mixture's experts stand one below the other.
    """
    entry, shape = model.entry, model.shape
    stacks = (shape,) if shape.encoder is None else (shape.encoder, shape)
    for of_stack, stack in zip(entry.stacks, stacks, strict=True):
        for layer in range(stack.blocks):
            attention, mlp = accounting.matrices(stack, layer)
            ranks = iter(() if stack.ranks is None else stack.ranks[layer])
            if of_stack.experts:
                mlp = ((sum(outputs for outputs, _ in mlp[:-1]), stack.hidden), mlp[-1])
            if of_stack.cross:
                attention = (*attention, *accounting.matrices(stack, layer)[0])
            times = stack.experts or 1
            # Ranks are counted in the order of all the block's matrices, whatever the scope.
            for part, some, count in (("attention", attention, 1), ("ffn", mlp, times)):
                for outputs, inputs in some:
                    rank = next(ranks, 0)
                    if part not in PARTS[scope]:
                        continue
                    if rank:
                        yield rank, inputs
                        yield outputs, rank
                    else:
                        yield count * outputs, inputs
    if "head" in PARTS[scope]:
        yield shape.vocab, _read_by_head(shape)


def _read_by_head(shape: Shape) -> int:
    return shape.embedding_size if shape.transform or shape.map_out else shape.final_size


def input_widths(shape: Shape, scope: str) -> dict[str, int]:
    """What the matrices of a scope read, in numbers a row, by what it is called; from sizes alone."""
    stacks = (shape,) if shape.encoder is None else (shape.encoder, shape)
    widths: dict[str, int] = {}

    def several(name: str, each: str, found: set[int]) -> None:
        widths[name] = min(found)
        for width in sorted(found - {min(found)}):
            widths[f"{each} of {width}"] = width

    for stack in stacks:
        layers = range(stack.layers)
        factored = [stack.ranks[layer] if stack.ranks else () for layer in layers]
        if "attention" in PARTS[scope]:
            widths["the hidden size"] = stack.hidden
            outputs = {stack.heads_of(layer)[0] * stack.widths_of(layer)[1] for layer in layers}
            several("the attention output", "an attention output", outputs)
        if "ffn" in PARTS[scope]:
            widths["the hidden size"] = stack.hidden
            several("the MLP", "an MLP", {stack.ffn_of(layer) for layer in layers})
        mlp = len(accounting.matrices(stack, 0)[0])
        within = slice(0 if "attention" in PARTS[scope] else mlp, None if "ffn" in PARTS[scope] else mlp)
        if "head" not in PARTS[scope] and (ranks := {rank for some in factored for rank in some[within] if rank}):
            several("a factor", "a factor", ranks)
    if "head" in PARTS[scope]:
        widths["the head"] = _read_by_head(shape)
    return widths


def misfit(
    group: int | None,
    widths: Mapping[str, int],
    *,
    sizes: Sequence[int] | None = None,
    otherwise: str = "leave group out",
) -> str | None:
    """Why groups of this size do not divide all widths, and which would, in a clause; None where they do.

    Parameters
    ----------
    group : None for whole rows, which always fit
    widths : inputs of matrices, by what a reader knows them as
    sizes : those that groups may have; None for any
    otherwise : what to do where no group fits
    """
    wrong = next((name for name, width in widths.items() if group is not None and width % group), None)
    if wrong is None:
        return None
    common = math.gcd(*widths.values())
    possible = range(2, common + 1) if sizes is None else sizes
    fitting = sorted((size for size in possible if common % size == 0), reverse=True)
    groups = f" ({', '.join(map(str, fitting[:_NAMED]))})" if fitting else ""
    return f"needs input widths that group={group} divides, and {wrong} has {widths[wrong]}: " + (
        f"take a group that divides them all{groups}, or {otherwise}" if fitting else otherwise
    )


_NAMED = 6
"""Group sizes that an error names at most, the largest ones."""

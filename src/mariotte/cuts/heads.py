"""Attention heads: which counts of query and key-value heads there are, and why they cannot be cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mariotte.architectures import Shape
from mariotte.cuts.common import IRREGULAR, Sizes, refuse_counted_factors

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
    if reason := refuse_counted_factors(model):
        return reason
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

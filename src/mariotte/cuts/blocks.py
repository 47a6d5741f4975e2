"""Whole blocks: how many stay, and why they cannot be dropped or merged."""

from __future__ import annotations

from mariotte.accounting import cut_width
from mariotte.cuts.common import Sizes


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

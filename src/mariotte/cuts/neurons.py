"""Neurons of the MLPs: how many stay, and why they cannot be cut."""

from __future__ import annotations

from mariotte.accounting import cut_width, rounding
from mariotte.cuts.common import Sizes


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

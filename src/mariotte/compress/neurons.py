"""Fewer feed-forward neurons, the same number in every block: a width that the config can state.

Shapes: D model width, F neurons of a block (the down projection's inputs), K neurons kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mariotte import accounting
from mariotte.compress.surgery import cut_width, derive, gathered, parameter_names, rounding
from mariotte.models.model import Model


def neuron_width(model: Model, amount: float, round_to: int | None) -> tuple[int, int]:
    """The neurons that are kept in each block, and the multiple to which they are rounded.

    Parameters
    ----------
    amount : share of the neurons to remove, in [0, 1)
    round_to : asked for; None takes 128 in models at least 1024 wide, 8 in smaller ones
    """
    shape = model.shape
    multiple = rounding(shape.ffn, round_to, at=shape.hidden)
    return cut_width(shape.ffn, amount, multiple), multiple


def refuse_unequal_widths(model: Model) -> str | None:
    """Why a method that keeps one width cannot work on `model`, or None when it can; as `Step.refuse`."""
    if model.shape.ffns is not None:
        return (
            "removes the same number of neurons from each block, and the blocks of this model differ in width: "
            "take heads or magnitude"
        )
    return None


def removed_with_neurons(model: Model, width: int) -> int:
    """Parameters that go when each block keeps `width` neurons, from shapes alone."""
    return model.counts.n_params - accounting.count_shape(replace(model.shape, ffn=width)).n_params


@torch.no_grad()
def keep_neurons(model: Model, kept: Sequence[Tensor]) -> Model:
    """A model with some neurons of each block, in their old order; the given one stays as it is.

    Parameters
    ----------
    model : what to start from
    kept : (K,) int64 for every block, the same K: the neurons that stay, in any order

    Notes
    -----
    A neuron is a row of gate and up, its biases, and a column of down: they stay or go together.
    """
    (width,) = {len(kept_K) for kept_K in kept}
    names = parameter_names(model)
    weights = gathered(model)
    for block, unordered_K in zip(model.blocks, kept, strict=True):
        kept_K = unordered_K.to(model.device).sort().values
        for linear in block.ffn[:-1]:
            weights |= {names[parameter]: parameter[kept_K] for parameter in linear.parameters()}
        weights[names[block.down.weight]] = block.down.weight[:, kept_K]
    return derive(model, weights, {model.entry.ffn: width})

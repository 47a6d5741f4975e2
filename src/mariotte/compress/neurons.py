"""Fewer feed-forward neurons, the same number in every block: a width that the config can state.

Shapes: D model width, F neurons of a block (the down projection's inputs), K neurons kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mariotte import accounting
from mariotte.compress.scope import oriented, turned
from mariotte.compress.surgery import derive, gathered, parameter_names
from mariotte.models.model import Block, Model


def removed_with_neurons(model: Model, width: int) -> int:
    """Parameters that go when each block keeps `width` neurons, from shapes alone."""
    return model.counts.n_params - accounting.count_shape(replace(model.shape, ffn=width)).n_params


def neuron_rows(block: Block) -> list[Tensor]:
    """Rows of the matrices that feed a block's neurons: one (F, D) for a gate, if there is one, and one for up.

    Views of the weights, whether they stand in one matrix or in two, and whichever way round they are held.
    """
    rows = [oriented(matrix) for matrix in block.ffn[:-1]]
    return list(rows[0].chunk(2)) if block.entry.fused_mlp else rows


def neuron_weights(
    block: Block, names: Mapping[Tensor, str], kept_K: Tensor, down_DK: Tensor | None = None
) -> dict[str, Tensor]:
    """What the parameters of a block's MLP become when some neurons stay.

    Parameters
    ----------
    block : of the uncut model
    names : of its parameters, see `surgery.parameter_names`
    kept_K : (K,) int64, in the order in which they are to stand
    down_DK : the down projection of these neurons; None takes their columns as they are

    Returns
    -------
    By name: rows of gate and up and their biases, and the down projection
    """
    *ins, down = block.ffn
    weights: dict[str, Tensor] = {}
    for linear in ins:
        rows = kept_K
        if block.entry.fused_mlp:  # the gates stand above the ups
            rows = torch.cat([kept_K, kept_K + len(oriented(linear)) // 2])
        weights[names[linear.weight]] = turned(linear, oriented(linear)[rows])
        if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] some families have none
            weights[names[linear.bias]] = linear.bias[rows]
    weights[names[down.weight]] = turned(down, oriented(down)[:, kept_K] if down_DK is None else down_DK)
    return weights


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
        weights.update(neuron_weights(block, names, unordered_K.to(model.device).sort().values))
    return derive(model, weights, {model.entry.ffn: width})

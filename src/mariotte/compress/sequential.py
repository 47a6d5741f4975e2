"""Calibration text on its way through a model, one block at a time: for methods whose later blocks see earlier cuts.

Shapes: N rows, T tokens of a row, D model width, B rows at once, M tokens at once, I inputs of a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mariotte.compress.calibration import Means, observe_encoder, rows_at_once, tokens_for
from mariotte.compress.walk import Walk as Walk
from mariotte.models.model import Block, Model
from mariotte.models.step import Context


@torch.no_grad()
def rewrite_sequentially(
    model: Model,
    context: Context,
    step: str,
    readers: Callable[[Block], Mapping[str, Sequence[nn.Linear]]],
    statistic: Callable[[Tensor], Tensor],
    rewrite: Callable[[int, Block, Mapping[str, Tensor]], None],
) -> Model:
    """A copy whose blocks are rewritten one after another, each by what it reads behind those already rewritten.

    The matrices of one block are rewritten together, by what they saw before any of them was: the order of the
    published code of Wanda, SparseGPT and GPTQ.

    Parameters
    ----------
    step : name of the step that asks, for errors
    readers : a block's matrices, those that read the same input together
    statistic : as for `calibration.Means`
    rewrite : changes the copy's block of this index in place, given the mean of the statistic of each input

    Raises
    ------
    DataError
        When the run has no calibration text.
    ModelError
        When activations are not finite.
    """
    rewritten = model.copy()
    if model.kind != "causal":
        _rewrite_encoder(rewritten, model, context, step, readers, statistic, rewrite)
        return rewritten
    walk = Walk(rewritten, context, step)
    for index, block in enumerate(rewritten.blocks):
        means = Means(statistic)
        groups = {f"block-{index} {part}": part for part in readers(block)}
        first = {group: readers(block)[part][0] for group, part in groups.items()}
        walk.observe(block.module, {group: [matrix] for group, matrix in first.items()}, means)
        for group, matrix in first.items():
            means.fill(group, matrix)
        rewrite(index, block, {groups[group]: mean for group, mean in means.result(step, model).items()})
        if index + 1 < len(rewritten.blocks):
            walk.advance(block.module)
        context.progress(step, (index + 1) / len(rewritten.blocks))
    return rewritten


def _rewrite_encoder(
    rewritten: Model,
    model: Model,
    context: Context,
    step: str,
    readers: Callable[[Block], Mapping[str, Sequence[nn.Linear]]],
    statistic: Callable[[Tensor], Tensor],
    rewrite: Callable[[int, Block, Mapping[str, Tensor]], None],
) -> None:
    """The same of an encoder, in place, with a pass through the whole model for each block.

    A block may stand in several places (ALBERT), which all see what it has become.
    """
    tokens_NT = tokens_for(context, step)
    for index, block in enumerate(rewritten.blocks):
        means = Means(statistic)
        inputs = {f"block-{index} {part}": [matrices[0]] for part, matrices in readers(block).items()}
        observe_encoder(rewritten, tokens_NT, rows_at_once(tokens_NT), inputs, means)
        found = means.result(step, model)
        rewrite(index, block, {part: found[f"block-{index} {part}"] for part in readers(block)})
        context.progress(step, (index + 1) / len(rewritten.blocks))

"""Weights that become zero: which ones, and block by block so that each sees what earlier blocks have become.

Shapes: O outputs and I inputs of a linear layer, M tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mariotte.compress.calibration import Means, check_finite, observe
from mariotte.compress.sequential import Walk
from mariotte.errors import ChainError
from mariotte.models.model import Block, Model
from mariotte.models.step import Context, Prepared

_SLACK = 9
"""Decimals to which a number of weights is rounded before its fraction is dropped: 100 x 0.29 is 29."""


@dataclass(frozen=True)
class Pattern:
    """Exactly `zeros` of every `of` neighbouring weights of a row are zero.

    For 2:4, the pattern that accelerators know, it does not matter whether an N:M names the zeros or the rest; like
    SparseGPT and its code we name the zeros.
    """

    zeros: int
    of: int

    @classmethod
    def parse(cls, step: str, text: str) -> Pattern:
        """Read ``2:4``.

        Raises
        ------
        ChainError
            When the text is no pattern, or would leave nothing or everything.
        """
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise ChainError(f"{step}: nm must be N:M with 0 < N < M, such as 2:4, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.zeros}:{self.of}"

    @property
    def share(self) -> float:
        """The share of weights that are zero."""
        return self.zeros / self.of

    def check_amount(self, step: str, amount: int | float) -> None:
        """Refuse an amount that is neither nothing nor what the pattern removes.

        Raises
        ------
        ChainError
            When it is another.
        """
        if amount and not math.isclose(amount, self.share, rel_tol=1e-6):
            raise ChainError(
                f"{step}: nm={self} sets {self.share:.6g} of the weights to zero, got {amount:.6g}: "
                f"write {step}@{self.share:.6g}(nm={self}), or leave nm out"
            )

    def refuse(self, matrices: Sequence[nn.Linear]) -> str | None:
        """Why the pattern does not fit into some of the matrices, or None."""
        widths = sorted({matrix.in_features for matrix in matrices if matrix.in_features % self.of})
        if widths:
            return f"needs input widths that {self.of} divides for nm={self}, and a matrix has {widths[0]}"
        return None


def whole(weights: int, amount: float) -> int:
    """Whole weights that a share of some makes, rounded down, so that some are always left."""
    return min(math.floor(round(weights * amount, _SLACK)), weights - 1)


def smallest_of_rows(score_OI: Tensor, count: int) -> Tensor:
    """Mask of the `count` smallest scores of each row; of equal ones the first."""
    order_OI = score_OI.argsort(dim=1, stable=True)
    return torch.zeros_like(score_OI, dtype=torch.bool).scatter_(1, order_OI[:, :count], value=True)


def smallest_of_groups(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the smallest scores of every group of neighbours in a row; of equal ones the first."""
    groups = score_OI.reshape(-1, pattern.of)
    return smallest_of_rows(groups, pattern.zeros).view(score_OI.shape)


def readers(block: Block, scope: str) -> dict[str, tuple[nn.Linear, ...]]:
    """The block's matrices in scope, those that read the same input together."""
    attention = {"attention": block.attention[:-1], "output": block.attention[-1:]}
    ffn = {"mlp": block.ffn[:-1], "down": block.ffn[-1:]}
    return {**(attention if scope in ("all", "attention") else {}), **(ffn if scope in ("all", "ffn") else {})}


def check_weights(model: Model, step: str, scope: str) -> None:
    """Refuse matrices in scope with weights that are not finite.

    Raises
    ------
    ModelError
        When some are not.
    """
    for index, block in enumerate(model.blocks):
        for part, matrices in readers(block, scope).items():
            for matrix in matrices:
                check_finite(matrix.weight, step, f"block-{index} {part}", model, what="weights")


@torch.no_grad()
def prepare_statistics(
    model: Model, context: Context, step: str, scope: str, statistic: Callable[[Tensor], Tensor]
) -> Prepared:
    """The mean of a statistic of every input in scope, in the model as it enters, for all amounts."""
    inputs = {
        f"block-{index} {part}": [matrices[0]]
        for index, block in enumerate(model.blocks)
        for part, matrices in readers(block, scope).items()
    }
    means = Means(statistic)
    observe(model, context, step, inputs, means)
    found = means.result(step, model)
    prepared = Prepared(context.scratch)
    for index, block in enumerate(model.blocks):
        prepared.put(f"block-{index}", {part: found[f"block-{index} {part}"] for part in readers(block, scope)})
    return prepared.finish()


@torch.no_grad()
def prune(model: Model, prepared: Prepared, scope: str, cut: Callable[[Tensor, Tensor], Tensor]) -> Model:
    """A copy with each matrix in scope cut by the statistic that was prepared for its input.

    Parameters
    ----------
    cut : given weights (O, I) and a statistic, both float64, returns the new weights
    """
    pruned = model.copy()
    for index, block in enumerate(pruned.blocks):
        _cut(block, scope, prepared.get(f"block-{index}"), cut)
    return pruned


@torch.no_grad()
def prune_sequentially(
    model: Model,
    context: Context,
    step: str,
    scope: str,
    statistic: Callable[[Tensor], Tensor],
    cut: Callable[[Tensor, Tensor], Tensor],
) -> Model:
    """A copy with each matrix in scope cut by the mean of a statistic of its input behind the blocks already cut.

    The matrices of one block are cut together, by what they saw before any of them was: the order of the published code
    of Wanda and SparseGPT.

    Parameters
    ----------
    statistic : as for `calibration.Means`
    cut : given weights (O, I) and a mean, both float64, returns the new weights
    """
    pruned = model.copy()
    walk = Walk(pruned, context, step)
    for index, block in enumerate(pruned.blocks):
        found = readers(block, scope)
        means = Means(statistic)
        walk.observe(block.module, {f"block-{index} {part}": [some[0]] for part, some in found.items()}, means)
        result = means.result(step, model)
        _cut(block, scope, {part: result[f"block-{index} {part}"] for part in found}, cut)
        if index + 1 < len(pruned.blocks):
            walk.advance(block.module)
        context.progress("pruning", (index + 1) / len(pruned.blocks))
    return pruned


def _cut(block: Block, scope: str, statistics: Mapping[str, Tensor], cut: Callable[[Tensor, Tensor], Tensor]) -> None:
    for part, matrices in readers(block, scope).items():
        for matrix in matrices:
            weight_OI = matrix.weight.double()
            matrix.weight.copy_(cut(weight_OI, statistics[part].to(weight_OI.device)))

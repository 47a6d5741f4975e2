"""SparseGPT: weights become zero column by column, and those to the right make up for them.

Shapes: O outputs and I inputs of a linear layer, C columns handled together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.architectures import Shape
from mariotte.compress.calibration import outer
from mariotte.compress.compensation import invertible, with_ridge
from mariotte.compress.sparsity import OneShot, Pattern, smallest_of_groups, whole
from mariotte.errors import ChainError

__all__ = ["SparseGPT"]


def count(weights: int, amount: float) -> int:
    """Weights of some that become zero at a share: one more than the whole ones in it, and never all.

    The published code takes all errors up to and including the one at the rank of the share. Without that one, a few
    masks in a thousand differ from its own in small matrices, since each zero moves other weights.
    """
    return min(whole(weights, amount) + 1, weights - 1) if amount else 0


@invertible()
def sparsegpt(
    weight_OI: Tensor,
    moment_II: Tensor,
    counts: Sequence[int],
    pattern: Pattern | None = None,
    *,
    columns: int = 128,
    damp: float = 0.01,
) -> Tensor:
    r"""The weights with some set to zero and the others moved so that the outputs change little.

    Parameters
    ----------
    weight_OI : (O, I) float64
    moment_II : (I, I) float64, mean of x xᵀ over the inputs
    counts : weights that go of each `columns` columns
    pattern : instead, so many of every few neighbours of a row
    columns : columns whose zeros are chosen together
    damp : added to the diagonal of the moment, as a share of its mean

    Returns
    -------
    (O, I) float64

    Raises
    ------
    ChainError
        When `damp` is too small for the moment to be inverted.

    Notes
    -----
    With H⁻¹ = Uᵀ U (U upper triangular), U_jj² is the diagonal of the inverse of H without the columns before j: the
    error of setting w_oj to zero, the columns to its right making up for it, is w_oj² / U_jj². The smallest errors of
    `columns` columns are chosen by their state when these are reached (of a pattern: when its group is reached), then
    each column in turn passes its error e = w / U_jj on: W[:, j:] -= e U[j, j:]. Columns beyond the `columns` at hand
    get all their updates at once, as one product. Of equal errors the first goes.

    An input that is always zero has nothing but the damping on H's diagonal: its weights cost nothing, go first, and
    move no others. The published code sets all of them to zero, beyond the amount; here they count like others.

    Cost: I³ for the factors, O I² for the updates; float64, since the inverse of a moment in float32 stops being
    positive definite from a few thousand inputs on.

    References
    ----------
    [frantar2023sparsegpt]_ algorithm 1.
    """
    inverse_II = torch.cholesky_inverse(cast(Tensor, torch.linalg.cholesky(with_ridge(moment_II, damp))))
    upper_II = cast(Tensor, torch.linalg.cholesky(inverse_II, upper=True))
    weight_OI = weight_OI.clone()
    dead_I = moment_II.diagonal() == 0
    for start, gone in zip(range(0, weight_OI.shape[1], columns), counts, strict=True):
        # Views: what is written into them is written into the result.
        now_OC = weight_OI[:, start : start + columns]
        upper_CC = upper_II[start : start + columns, start : start + columns]
        error_OC = torch.zeros_like(now_OC)
        mask_OC = torch.zeros_like(now_OC, dtype=torch.bool)
        if pattern is None:
            cost_OC = (now_OC / upper_CC.diagonal()).square().masked_fill(dead_I[start : start + columns], 0.0)
            cheapest = cost_OC.flatten().argsort(stable=True)[:gone]
            mask_OC.view(-1)[cheapest] = True
        for j in range(now_OC.shape[1]):
            if pattern is not None and j % pattern.of == 0:
                group = slice(j, j + pattern.of)
                cost_OC = (now_OC[:, group] / upper_CC.diagonal()[group]).square()
                cost_OC = cost_OC.masked_fill(dead_I[start + j : start + j + pattern.of], 0.0)
                mask_OC[:, group] = smallest_of_groups(cost_OC, pattern)
            gone_O = mask_OC[:, j]
            error_OC[:, j] = (now_OC[:, j] / upper_CC[j, j]).masked_fill(~gone_O, 0.0)
            now_OC[:, j + 1 :] -= error_OC[:, j, None] * upper_CC[j, j + 1 :]
            now_OC[:, j].masked_fill_(gone_O, 0.0)
        weight_OI[:, start + columns :] -= error_OC @ upper_II[start : start + columns, start + columns :]
    return weight_OI


@dataclass(frozen=True, kw_only=True)
class SparseGPT(OneShot):
    """Set weights to zero and let others make up for them by optimal brain surgeon. Nothing gets smaller or faster.

    Parameters
    ----------
    nm : such as 2:4, to set exactly so many of every few neighbouring weights of a row to zero; the amount must then
        say the same, as in ``sparsegpt@0.5(nm=2:4)``. None: the same share of each matrix's blocks of columns
    columns : columns of a matrix whose zeros are chosen together, a multiple of the pattern's M
    damp : added to the diagonal of the inputs' second moment, as a share of its mean
    sequential : measure each block behind the pruned ones before it, for every amount anew, as published. False
        measures the model that enters, once for all amounts
    allocation : how the blocks share the amount. uniform: alike, as published; influence: those that change the stream
        little lose more; greedy: by calibration loss, step by step
    scope : all: the projections of attention and MLP; attention or ffn: those alone. Embeddings, head, norms and biases
        are never touched

    Raises
    ------
    ChainError
        When `nm` is no pattern, does not divide `columns`, or stands beside ``of=model`` or another allocation; when
        `allocation` is unknown, or `columns` or `damp` not positive.

    Notes
    -----
    Of every `columns` columns of a matrix floor(amount x weights) + 1 are set to zero, as by the published code; of a
    pattern, exactly what it says. Weights that were zero before are the first to be chosen; those that are not chosen
    are updated like all others, and stop being zero. With another allocation than uniform, round(amount x weights in
    scope) go in all.

    Of a mixture each expert is measured on the tokens that take it. One that no token takes is cut by its weights
    alone, as if its inputs were equally large and independent: calibrate on text that reaches all of them.

    An encoder is calibrated on what it reads in training: pieces of documents between its special tokens, 15 % of whose
    tokens are hidden. Sequentially it takes a pass through the whole model for each block.

    Calibration: a second moment of I inputs takes several times I tokens; with fewer, `damp` is what holds it up. Of an
    expert these are the tokens that take it.

    Cost: as wanda's, plus a second moment of I² numbers for each distinct input of a block, and I³ + O I² a matrix.

    References
    ----------
    [frantar2023sparsegpt]_ sections 3 and 4.
    """

    reference: ClassVar[str] = "frantar2023sparsegpt"
    streams: ClassVar[bool] = True
    per: ClassVar[str] = "columns"

    columns: int = 128
    damp: float = 0.01

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns < 1:
            raise ChainError(f"sparsegpt: columns must be a positive number, such as 128, got {self.columns}")
        if not self.damp > 0:
            raise ChainError(f"sparsegpt: damp must be positive, such as 0.01, got {self.damp}")
        pattern = self.pattern
        if pattern is not None and self.columns % pattern.of:
            raise ChainError(
                f"sparsegpt: columns must be a multiple of {pattern.of} for nm={pattern}, got {self.columns}"
            )

    @override
    def moment(self, shape: Shape) -> int:
        return max(shape.ffn, shape.hidden, shape.heads * shape.head_dim)

    @override
    def statistic(self, x_MI: Tensor) -> Tensor:
        return outer(x_MI)

    @override
    def parts(self, outputs: int, inputs: int) -> list[int]:
        return [outputs * min(self.columns, inputs - start) for start in range(0, inputs, self.columns)]

    @override
    def count(self, weights: int, amount: float) -> int:
        return count(weights, amount)

    @override
    def cut(self, weight_OI: Tensor, statistic: Tensor, counts: Sequence[int]) -> Tensor:
        return sparsegpt(weight_OI, statistic, counts, self.pattern, columns=self.columns, damp=self.damp)

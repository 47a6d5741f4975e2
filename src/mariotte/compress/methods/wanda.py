"""Wanda: weights that are small for what they multiply become zero.

Shapes: O outputs and I inputs of a linear layer, M tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.compress.calibration import squares
from mariotte.compress.sparsity import OneShot, Pattern, smallest_of_groups, smallest_of_rows, whole

__all__ = ["Wanda"]


def wanda(weight_OI: Tensor, mean_square_I: Tensor, counts: Sequence[int], pattern: Pattern | None = None) -> Tensor:
    """The weights with the smallest |W_oj| |x_j| of each row set to zero.

    Parameters
    ----------
    weight_OI : (O, I) float64
    mean_square_I : (I,) float64, mean of x² of each input; the l2 norm over tokens is its root times a factor that all
        inputs share
    counts : weights of each row that go, O of them
    pattern : instead, so many of every few neighbours

    Returns
    -------
    (O, I) float64, of equal scores the first zero

    References
    ----------
    [sun2024wanda]_ equation 1 and algorithm 1.
    """
    score_OI = weight_OI.abs() * mean_square_I.sqrt()
    mask_OI = (
        smallest_of_rows(score_OI, torch.tensor(counts)) if pattern is None else smallest_of_groups(score_OI, pattern)
    )
    return weight_OI.masked_fill(mask_OI, 0.0)


@dataclass(frozen=True, kw_only=True)
class Wanda(OneShot):
    """Set weights to zero that are small for what they multiply. Nothing gets smaller or faster.

    Parameters
    ----------
    nm : such as 2:4, to set exactly so many of every few neighbouring weights of a row to zero; the amount must then
        say the same, as in ``wanda@0.5(nm=2:4)``. None: the same share of each row, wherever in it
    sequential : measure each block behind the pruned ones before it, for every amount anew, as published. False
        measures the model that enters, once for all amounts
    allocation : how the blocks share the amount. uniform: each row of each matrix the same, as published; influence:
        blocks that change the stream little lose more; greedy: by calibration loss, step by step
    scope : all: the projections of attention and MLP; attention or ffn: those alone. Embeddings, head, norms and biases
        are never touched

    Raises
    ------
    ChainError
        When `nm` is no pattern, or stands beside ``of=model`` or another allocation; when `allocation` is unknown.

    Notes
    -----
    Of each row of a matrix floor(amount x inputs) weights are set to zero, those that were zero before among them, by
    |W_oj| times the l2 norm of input j over all calibration tokens. Nothing else changes. With another allocation,
    round(amount x weights in scope) go in all, and rows of one matrix may differ by one.

    Of a mixture each expert is measured on the tokens that take it. One that no token takes is cut by its weights
    alone, as if its inputs were equally large and independent: calibrate on text that reaches all of them.

    An encoder is calibrated on what it reads in training: pieces of documents between its special tokens, 15 % of whose
    tokens are hidden. Sequentially it takes a pass through the whole model for each block.

    Calibration: a few thousand tokens are enough, since only I norms a matrix are estimated. Where weights may also be
    updated, sparsegpt loses less at high amounts and costs I³ more a matrix.

    Cost: sequential, two forward passes an amount, a copy of the model and the stream of all calibration tokens;
    otherwise one pass for all amounts. Sorting takes O I log I a matrix. Greedy: some 2 L trials for each tenth of the
    amount, each a sort of all matrices and a pass.

    References
    ----------
    [sun2024wanda]_ section 3.
    """

    reference: ClassVar[str] = "sun2024wanda"
    streams: ClassVar[bool] = True
    per: ClassVar[str] = "row"

    @override
    def statistic(self, x_MI: Tensor) -> Tensor:
        return squares(x_MI)

    @override
    def parts(self, outputs: int, inputs: int) -> list[int]:
        return [inputs] * outputs

    @override
    def count(self, weights: int, amount: float) -> int:
        return whole(weights, amount)

    @override
    def cut(self, weight_OI: Tensor, statistic: Tensor, counts: Sequence[int]) -> Tensor:
        return wanda(weight_OI, statistic, counts, self.pattern)

"""Weights that become zero by chance: what a share of zeros costs when nothing is chosen.

Shapes: O outputs (rows) and I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.compress.zeroing import Zeroing
from mariotte.models.step import Context

__all__ = ["Random"]


@dataclass(frozen=True, kw_only=True)
class Random(Zeroing):
    """Set the same share of each matrix to zero, drawn at random. Nothing gets smaller or faster.

    Parameters
    ----------
    rows : draw whole rows, so that some outputs become constant, instead of weights
    scope : all: the projections of attention and MLP; attention or ffn: those alone; head: the final dense layer alone,
        which gets a matrix of its own where it was tied to the embeddings. Biases are never touched

    Notes
    -----
    Two of the four ways in which the Cost of Compression study prunes the final dense layer, and the baseline of every
    method that chooses. Results differ from seed to seed, so use several. Of each matrix round(amount x n) of n weights
    or rows are drawn without replacement, in one order for all amounts, so that a curve over amounts carries no noise
    of its own; a matrix's order depends on the run's seed, its place and its shape only. Applied again, it draws the
    same ones first. Cost: a random number a weight (or row) and two passes over the weights in scope for every amount.

    References
    ----------
    [namburi2023cost]_ section 3.
    """

    reference: ClassVar[str] = "namburi2023cost"
    streams: ClassVar[bool] = True

    rows: bool = False

    @property
    @override
    def by_row(self) -> bool:
        return self.rows

    @override
    def scores(self, weight_OI: Tensor, index: int, context: Context) -> Tensor:
        drawn = weight_OI.shape[:1] if self.rows else weight_OI.shape
        return torch.rand(drawn, generator=context.generator(self.name(), "matrix", index))

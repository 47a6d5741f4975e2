"""Rows that become zero: the outputs of a matrix whose weights are smallest together.

Shapes: O outputs (rows) and I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.compress.zeroing import Zeroing
from mariotte.errors import ChainError
from mariotte.models.step import Context

__all__ = ["MagnitudeStructured"]


@dataclass(frozen=True, kw_only=True)
class MagnitudeStructured(Zeroing):
    """Set the rows of each matrix with the smallest norm to zero. Nothing gets smaller or faster.

    Parameters
    ----------
    norm : 1: sum of magnitudes; 2: root of the sum of squares
    scope : all: the projections of attention and MLP; attention or ffn: those alone; head: the final dense layer alone,
        which gets a matrix of its own where it was tied to the embeddings. Biases are never touched

    Raises
    ------
    ChainError
        When `norm` is neither.

    Notes
    -----
    One of the four ways in which the Cost of Compression study prunes the final dense layer: there a row is a token of
    the vocabulary, whose logit becomes its bias. Of O rows of a matrix round(amount x O) go, of equal norms the first.
    A measurement of what can be lost, as the shapes stay: to make a model smaller take `ffn`, `heads` or `slice`.
    Cost: one pass over the weights in scope for every amount.

    References
    ----------
    [namburi2023cost]_ section 3.
    """

    reference: ClassVar[str] = "namburi2023cost"
    streams: ClassVar[bool] = True

    norm: int = 2

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in (1, 2):
            raise ChainError(f"magnitude-structured: norm must be 1 or 2, got {self.norm}: leave it out for 2")

    @property
    @override
    def by_row(self) -> bool:
        return True

    @override
    def scores(self, weight_OI: Tensor, index: int, context: Context) -> Tensor:
        wide_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
        return wide_OI.abs().sum(1) if self.norm == 1 else wide_OI.square().sum(1).sqrt()

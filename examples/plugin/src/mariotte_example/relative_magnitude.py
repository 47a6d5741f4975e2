"""Weights that are small beside their neighbours become zero.

Shapes: O outputs (rows) and I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from mariotte.compress.zeroing import Zeroing
from mariotte.models.step import Context

__all__ = ["RelativeMagnitude"]


def relative_magnitudes(weight_OI: Tensor) -> Tensor:
    """Each magnitude as a share of its row's, plus as a share of its column's, (O, I); rows of zeros score zero."""
    size_OI = weight_OI.abs().double()
    rows_O1, columns_1I = size_OI.sum(1, keepdim=True), size_OI.sum(0, keepdim=True)
    return size_OI / rows_O1.clamp(min=1e-300) + size_OI / columns_1I.clamp(min=1e-300)


@dataclass(frozen=True, kw_only=True)
class RelativeMagnitude(Zeroing):
    """Set the weights with the smallest shares of their row and column to zero. Nothing gets smaller or faster.

    Parameters
    ----------
    scope : all: the projections of attention and MLP; attention or ffn: those alone; head: the final dense layer alone

    Notes
    -----
    The importance of Zhang and others (ICLR 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", equation 3), without its factor for activations. Cost: two passes over the weights in scope.
    """

    reference: ClassVar[str] = "zhang2024plugandplay"

    @property
    @override
    def by_row(self) -> bool:
        return False

    @override
    def scores(self, weight_OI: Tensor, index: int, context: Context) -> Tensor:
        return relative_magnitudes(weight_OI)

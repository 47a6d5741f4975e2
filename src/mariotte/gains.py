"""The curve of recovery L∞ + (Lcut - L∞)(1 + D/Dc)^-κ of a given shape: what further tokens would bring.

The bench stops recoveries by it, the desk learns its shape (`mariotte.laws.recovery`).

Shape legend: M amounts of recovery data, K amounts asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def continued(tokens_M: Array, value_M: Array, asked_K: Array, scale: float, exponent: float) -> Array:
    """(K,) values at further amounts on the curve of one shape, its two ends by least squares.

    Parameters
    ----------
    scale, exponent : Dc, in the unit of the tokens, and κ
    """

    def terms(d_M: Array) -> Array:
        left_M = (1.0 + d_M / scale) ** -exponent
        return np.column_stack([1.0 - left_M, left_M])

    ends = np.linalg.lstsq(terms(tokens_M), value_M, rcond=None)[0]
    return terms(asked_K) @ np.asarray(ends, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """The shape by which recoveries stop.

    Parameters
    ----------
    scale : Dc, in first amounts
    exponent : κ
    share : of the change that the curve predicts beyond its last point, how much is believed
    """

    scale: float
    exponent: float
    share: float

    def gain(self, tokens_M: Array, loss_M: Array, asked: float) -> float:
        """How much lower the loss will be at a further amount than at the last one, as a share of the last.

        Parameters
        ----------
        tokens_M : amounts, ascending, none first
        """
        expected = continued(tokens_M, loss_M, np.array([asked]), self.scale * float(tokens_M[1]), self.exponent)
        return self.share * float((loss_M[-1] - expected[0]) / loss_M[-1])


STOPPING = Stopping(scale=2.5, exponent=1.2, share=0.25)
"""Learned with `mariotte.laws.recovery.learn` from 539 curves of eight testbed models, the shipped records of
``studies/testbed/recovery`` and ``compression-laws``: Dc 10k tokens where the first amount was 4k. That Dc grows with
the first amount, and so with the tokens of a batch, is assumed, not measured."""

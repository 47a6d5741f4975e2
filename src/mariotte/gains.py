"""Curves of recovery over its tokens D: what further tokens would bring.

`continued` is the whole curve L∞ + (Lcut - L∞)(1 + D/Dc)^-κ at a given shape, which the desk learns
(`mariotte.laws.recovery`). Far beyond Dc it is a power law, in which each doubling brings 2^-κ of what the one before
it brought, whatever L∞ and Dc are: by this tail the bench stops recoveries (`Stopping`).

Shape legend: M amounts of recovery data, K amounts asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

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
    """The law by which recoveries stop: L∞ + A D^-κ through the last two amounts, and how far it is off.

    Parameters
    ----------
    exponent : κ
    spread : standard deviation of ln(what a doubling brought / what was expected of it)
    level : probability with which a gain lies below `possible`
    """

    exponent: float
    spread: float
    level: float

    def gain(self, tokens_M: Array, loss_M: Array, asked: float) -> float:
        """How much lower the loss will be at a further amount than at the last one, as a share of the last: the median.

        Parameters
        ----------
        tokens_M : amounts, ascending; the last two, which count, are not none
        """
        left_M = np.append(tokens_M[-2:], asked) ** -self.exponent
        drop = (loss_M[-2] - loss_M[-1]) * (left_M[1] - left_M[2]) / (left_M[0] - left_M[1])
        return float(drop / loss_M[-1])

    def possible(self, tokens_M: Array, loss_M: Array, asked: float) -> float:
        """The gain that is not exceeded with probability `level`."""
        gain = self.gain(tokens_M, loss_M, asked)
        return gain * math.exp(self.spread * NormalDist().inv_cdf(self.level)) if gain > 0 else gain


STOPPING = Stopping(exponent=0.521, spread=0.478, level=0.9)
"""Learned with `mariotte.laws.recovery.learn_tail` from ``benchmarks/results/recovery_doublings.csv``: LoRA with 4k to
128k tokens on seven testbed models after four cuts. The level is chosen by us, on the same curves; see
``benchmarks/results/recovery_stopping.md``."""

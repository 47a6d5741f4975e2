"""From the dense loss to that of a guesser, along a Weibull curve: damage that ends where a guess begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw, needs_two_ratios

__all__ = ["Weibull"]

GUESS = math.log(32_000)
"""Nats: the loss of a guesser over LLaMA-2's vocabulary, for points that do not say theirs."""


class Weibull(NonlinearLaw):
    r"""L = C - (C - L0) exp(-(r/λ)^k), C = ln V, by soft-L1 least squares of L.

    Notes
    -----
    L in nats per token, V the size of the vocabulary: C is a point's `chance`, and ln 32000 for points that do not say
    it. λ is the share at which 63 % of the way to a guess is gone, between 0.01 and 20; k lies between 0.1 and 15.
    """

    name: ClassVar[str] = "weibull"
    formula: ClassVar[str] = "L = C - (C - L0) · exp(-(r/λ)^k), C = ln V"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio", "chance")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("λ", typical=0.8, log=True, lo=0.01, hi=20.0),
        Param("k", typical=2.5, log=True, lo=0.1, hi=15.0),
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "λ"
    defects: ClassVar[tuple[str, ...]] = (
        "Pruned models can be far worse than a guess (20 to 30 nats are published): the ceiling is none of theirs.",
        "Where a point does not say its vocabulary the ceiling is that of LLaMA-2, ln 32000 = 10.4 nats.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        room_M, reached_M = _room(x), (_removed(x) / theta[0]) ** theta[1]
        return x.base_M - room_M * np.expm1(-reached_M)

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        removed_M = _removed(x) / theta[0]
        reached_M = removed_M ** theta[1]
        slope_M = _room(x) * np.exp(-reached_M) * reached_M
        log_M = np.log(np.where(removed_M > 0, removed_M, 1.0))
        return np.column_stack([-slope_M * theta[1] / theta[0], slope_M * log_M])

    @override
    def target(self, x: Inputs, y_M: Array) -> Array:
        return np.maximum(y_M, x.base_M)

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        return [[0.3, 0.6, 0.9, 1.5, 4.0], [0.7, 1.5, 3.0, 6.0]]

    @override
    def refuse(self, x: Inputs) -> None:
        needs_two_ratios(self, x)


def _removed(x: Inputs) -> Array:
    """(M,) a ratio below 0 removed nothing."""
    return np.maximum(x.ratio_M, 0.0)


def _room(x: Inputs) -> Array:
    """(M,) nats between the dense model and a guesser; 0 for a dense model that is none better."""
    guess_M = np.where(np.isnan(x.chance_M), GUESS, x.chance_M)
    return np.maximum(guess_M - x.base_M, 0.0)

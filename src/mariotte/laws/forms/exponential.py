"""Damage that grows by the same factor with every further share removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw, needs_two_ratios

__all__ = ["Exponential"]


class Exponential(NonlinearLaw):
    r"""L = L0 + A (e^(k r) - 1), by soft-L1 least squares of L.

    Notes
    -----
    L and A in nats per token, r the share removed, k its growth. A lies between 1e-6 and 100, k between 0.01 and 50.
    """

    name: ClassVar[str] = "exponential"
    formula: ClassVar[str] = "L = L0 + A · (e^(k·r) - 1)"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("A", typical=0.15, log=True, lo=1e-6, hi=100.0),
        Param("k", typical=4.0, log=True, lo=0.01, hi=50.0),
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "A"
    defects: ClassVar[tuple[str, ...]] = (
        "From two or three points A and k trade places, and what they say of harsher cuts explodes.",
        "Its first small cut already costs A · k · r: unstructured pruning, which is free at first, is not like that.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return x.base_M + theta[0] * np.expm1(theta[1] * x.ratio_M)

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        grown_M = theta[1] * x.ratio_M
        return np.column_stack([np.expm1(grown_M), theta[0] * x.ratio_M * np.exp(grown_M)])

    @override
    def target(self, x: Inputs, y_M: Array) -> Array:
        return np.maximum(y_M, x.base_M)

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        return [[1e-3, 1e-2, 0.1, 1.0], [0.3, 2.0, 5.0, 10.0, 20.0]]

    @override
    def refuse(self, x: Inputs) -> None:
        needs_two_ratios(self, x)

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del tokens
        damage = target - base
        return math.log1p(damage / theta[0]) / theta[1] if damage >= 0 else None

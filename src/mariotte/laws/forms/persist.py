"""Persistence: what was measured last goes on for ever. The least that a law has to beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Estimate, Inputs, Kind, Law, Param

__all__ = ["Persist"]


class Persist(Law):
    """L = the value at the largest ratio measured (their mean where several points share it)."""

    name: ClassVar[str] = "persist"
    formula: ClassVar[str] = "L = c"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ()
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss", "score", "speed", "size")
    params: ClassVar[tuple[Param, ...]] = (Param("c", typical=2.0),)
    anchored: ClassVar[bool] = False
    ratio_param: ClassVar[str | None] = None
    log_link: ClassVar[bool] = False
    baseline: ClassVar[bool] = True
    defects: ClassVar[tuple[str, ...]] = ("Knows no ratio, so that it has no critical one.",)

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return np.full_like(x.ratio_M, theta[0])

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        return np.ones((len(x.ratio_M), 1))

    @override
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        last_M = x.ratio_M == np.max(x.ratio_M)
        # No covariance: one point's worth of data says nothing about its own spread.
        return Estimate(
            theta=np.array([float(np.mean(y_M[last_M]))]),
            covariance=None,
            dof=len(y_M) - 1,
            dropped={},
            condition=1.0,
            recipe="mean of the values at the largest ratio",
        )

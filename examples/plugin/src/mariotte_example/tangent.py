"""Damage as a power of a tangent: it has a pole where nothing is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw, needs_two_ratios

__all__ = ["Tangent"]


class Tangent(NonlinearLaw):
    r"""L = L0 + A tan(pi r / 2)^g, by soft-L1 least squares of L.

    Notes
    -----
    L and A in nats per token: A is the damage at r = 0.5. An example, and no claim about models.
    """

    name: ClassVar[str] = "tangent"
    formula: ClassVar[str] = "L = L0 + A · tan(π r/2)^g"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("A", typical=1.0, log=True, lo=float(np.exp(-9)), hi=float(np.exp(6))),
        Param("g", typical=1.5, log=True, lo=0.1, hi=15.0),
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "A"
    defects: ClassVar[tuple[str, ...]] = ("At r = 1 it is infinite, and losses end at ln V.",)

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return x.base_M + theta[0] * _tangent(x) ** theta[1]

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        tangent_M = _tangent(x)
        power_M = tangent_M ** theta[1]
        return np.column_stack([power_M, theta[0] * power_M * np.log(np.where(tangent_M > 0, tangent_M, 1.0))])

    @override
    def target(self, x: Inputs, y_M: Array) -> Array:
        return np.maximum(y_M, x.base_M)

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        return [[1e-3, 1e-2, 0.1, 0.5, 3.0], [0.5, 1.0, 2.0, 4.0, 8.0]]

    @override
    def refuse(self, x: Inputs) -> None:
        needs_two_ratios(self, x)

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del tokens
        damage = target - base
        return float(2 / np.pi * np.arctan((damage / theta[0]) ** (1.0 / theta[1]))) if damage >= 0 else None


def _tangent(x: Inputs) -> Array:
    """(M,) tan(pi r / 2); a ratio below 0 removed nothing."""
    return np.tan(np.pi / 2 * np.clip(x.ratio_M, 0.0, 1.0))

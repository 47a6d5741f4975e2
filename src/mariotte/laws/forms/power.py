"""Damage as a power of the share removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw, needs_two_ratios

__all__ = ["Power"]

REFERENCE = 0.3
"""The ratio at which the amplitude is the damage."""


class Power(NonlinearLaw):
    r"""L = L0 + A (r / 0.3)^g, by soft-L1 least squares of L.

    Notes
    -----
    L and A in nats per token: A is the damage at r = 0.3, the reference of the published form, in which it is itself
    a linear function of the size and loss of the dense model. A lies between e^-9 and e^6, g between 0.1 and 15.
    """

    name: ClassVar[str] = "power"
    formula: ClassVar[str] = "L = L0 + A · (r/0.3)^g"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("A", typical=0.4, log=True, lo=float(np.exp(-9)), hi=float(np.exp(6))),
        Param("g", typical=2.5, log=True, lo=0.1, hi=15.0),
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "A"
    defects: ClassVar[tuple[str, ...]] = (
        "At r = 1 it is finite and ordinary: the collapse before it is not in the curve.",
        "On the size that its authors held out, the median curve of other models predicted better.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return x.base_M + theta[0] * _share(x) ** theta[1]

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        share_M = _share(x)
        power_M = share_M ** theta[1]
        return np.column_stack([power_M, theta[0] * power_M * np.log(np.where(share_M > 0, share_M, 1.0))])

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
        return float(REFERENCE * (damage / theta[0]) ** (1.0 / theta[1])) if damage >= 0 else None


def _share(x: Inputs) -> Array:
    """(M,) removed, in units of the reference; a ratio below 0 removed nothing."""
    return np.maximum(x.ratio_M, 0.0) / REFERENCE

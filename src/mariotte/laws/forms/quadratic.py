"""Damage as a parabola through nothing removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw, needs_two_ratios

__all__ = ["Quadratic"]


class Quadratic(NonlinearLaw):
    r"""L = L0 + a r + b r², by soft-L1 least squares of L.

    Notes
    -----
    L, a and b in nats per token, r the share removed. a lies between -2 and 50, b between 0 and 200: the curve bends
    upwards or not at all.
    """

    name: ClassVar[str] = "quadratic"
    formula: ClassVar[str] = "L = L0 + a · r + b · r²"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("a", typical=0.4, lo=-2.0, hi=50.0),
        Param("b", typical=3.0, lo=0.0, hi=200.0),
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "b"
    searched: ClassVar[int] = 2  # the problem is convex
    defects: ClassVar[tuple[str, ...]] = (
        "A parabola rises too slowly for unstructured pruning, whose damage stays small for long and then explodes.",
        "a < 0 says that mild cuts improve the model; noise in one mild point is enough for that.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return x.base_M + theta[0] * x.ratio_M + theta[1] * x.ratio_M**2

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        del theta
        return np.column_stack([x.ratio_M, x.ratio_M**2])

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        return [[-0.5, 0.5, 2.0, 8.0], [0.0, 2.0, 10.0, 50.0]]

    @override
    def refuse(self, x: Inputs) -> None:
        needs_two_ratios(self, x)

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del tokens
        a, b, damage = float(theta[0]), float(theta[1]), target - base
        root = a * a + 4 * b * damage
        if root < 0:
            return None
        # The larger root, where the curve rises, in the form that neither cancels nor divides by b = 0.
        below = a + np.sqrt(root)
        if below > 0:
            return float(2 * damage / below)
        return float((np.sqrt(root) - a) / (2 * b)) if b > 0 else None

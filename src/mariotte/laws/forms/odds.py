"""Damage as a power of the odds of what was removed: small cuts cost little, the last of the model everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw, needs_two_ratios

__all__ = ["Odds"]


class Odds(NonlinearLaw):
    r"""L = L0 + A (r / (1 - r))^g, by soft-L1 least squares of L.

    Notes
    -----
    L and A in nats per token, r the share removed. Nothing removed costs nothing, everything removed costs infinitely
    much. A value below the dense one counts as the dense one, since the form cannot improve on it. A lies between e^-9
    and e^6, g between 0.2 and 3.5.
    """

    name: ClassVar[str] = "odds"
    formula: ClassVar[str] = "L = L0 + A · (r/(1 - r))^g"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("A", typical=1.1, log=True, lo=math.exp(-9), hi=math.exp(6)),
        Param("g", typical=1.6, lo=0.2, hi=3.5),
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "A"
    defects: ClassVar[tuple[str, ...]] = (
        "Two or three points do not tell the exponent: extrapolation explodes, the mean error with it.",
        "The loss grows without limit as r nears 1; a real one ends near that of a guesser.",
        "A model that compression improves is described as unharmed.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return x.base_M + theta[0] * _odds(x) ** theta[1]

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        odds_M = _odds(x)
        power_M = odds_M ** theta[1]
        # u^g ln u goes to 0 with u.
        return np.column_stack([power_M, theta[0] * power_M * np.log(np.where(odds_M > 0, odds_M, 1.0))])

    @override
    def target(self, x: Inputs, y_M: Array) -> Array:
        return np.maximum(y_M, x.base_M)

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        return [[math.exp(p) for p in (-4, -2, -1, 0, 1, 3)], [0.5, 1.0, 1.5, 2.0, 3.0]]

    @override
    def refuse(self, x: Inputs) -> None:
        needs_two_ratios(self, x)

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del tokens
        damage = target - base
        if damage < 0:
            return None
        odds = (damage / theta[0]) ** (1.0 / theta[1])
        return float(odds / (1.0 + odds))


def _odds(x: Inputs) -> Array:
    """(M,) of the share removed; a ratio below 0 removed nothing."""
    return np.maximum(x.ratio_M, 0.0) / (1.0 - x.ratio_M)

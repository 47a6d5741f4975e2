"""How a loss comes back with training: fast at first, then as a power of the tokens, down to what stays lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw

__all__ = ["RecoveryCurve"]

LEVELS = 4
"""The fewest amounts of recovery data that tell four parameters apart."""


class RecoveryCurve(NonlinearLaw):
    r"""L = L∞ + (Lcut - L∞) (1 + D/Dc)^(-κ), by soft-L1 least squares of L.

    Notes
    -----
    D is the recovery data of one model cut in one way, in tokens; none, D = 0, is a level too. Lcut is the value before
    any recovery, L∞ that after endless recovery, both in nats (or as fractions); Dc in the unit of D, κ > 0. With fewer
    than four levels it refuses: what curves share can then be learned from others, see `mariotte.laws.recovery`.
    """

    name: ClassVar[str] = "recovery-curve"
    formula: ClassVar[str] = "L = L∞ + (Lcut - L∞) · (1 + D/Dc)^(-κ)"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("tokens",)
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss", "score")
    params: ClassVar[tuple[Param, ...]] = (
        Param("L∞", typical=2.2, lo=0.0, hi=30.0),
        Param("Lcut", typical=3.9, lo=0.0, hi=30.0),
        Param("Dc", typical=5.0, log=True, lo=1e-3, hi=1e15),
        Param("κ", typical=0.8, log=True, lo=0.05, hi=20.0),
    )
    anchored: ClassVar[bool] = False
    ratio_param: ClassVar[str | None] = None
    scale: ClassVar[float] = 0.05
    defects: ClassVar[tuple[str, ...]] = (
        "Four parameters: from four amounts of recovery data nothing is left to check it by, with fewer it refuses.",
        "What stays lost for ever is an extrapolation beyond all tokens; a curve that still falls does not tell it.",
        "It describes one model cut in one way: ratio and method are not in it.",
        "A recovery that overfits makes the value worse again, which the curve cannot.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return theta[0] + (theta[1] - theta[0]) * (1.0 + x.tokens_M / theta[2]) ** -theta[3]

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        end, cut, scale, kappa = theta
        grown_M = 1.0 + x.tokens_M / scale
        left_M = grown_M**-kappa
        return np.column_stack(
            [
                1.0 - left_M,
                left_M,
                (cut - end) * kappa * left_M / grown_M * x.tokens_M / scale**2,
                -(cut - end) * left_M * np.log(grown_M),
            ]
        )

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        low, high = float(np.min(y_M)), float(np.max(y_M))
        first, last = (float(y_M[i]) for i in (np.argmin(x.tokens_M), np.argmax(x.tokens_M)))
        room = high - low
        some = x.tokens_M[x.tokens_M > 0]
        beyond = last - 0.3 * room if last < first else last + 0.3 * room
        scales = [float(np.exp(np.mean(np.log(some)))) * s for s in (0.03, 0.3, 3.0)]
        return [[last, max(0.0, beyond)], [first], scales, [0.3, 1.0, 3.0]]

    @override
    def refuse(self, x: Inputs) -> None:
        levels = np.unique(x.tokens_M)
        if len(levels) < LEVELS:
            found = ", ".join(f"{level:g}" for level in levels)
            raise FitError(
                f"{self.name} needs at least {LEVELS} amounts of recovery data, none counted as one, got {found}: "
                "recover with more amounts"
            )

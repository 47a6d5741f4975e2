"""A straight line of the logarithm, from the dense value: the least that an anchored law has to beat."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Inputs, Param
from mariotte.laws.linear import LinearLaw

__all__ = ["LogLine"]


class LogLine(LinearLaw):
    """L = L0 e^(b r), fitted in log space."""

    name: ClassVar[str] = "log-line"
    formula: ClassVar[str] = "L = L0 · e^(b·r)"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio")
    params: ClassVar[tuple[Param, ...]] = (Param("b", typical=0.6),)
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "b"
    intercept: ClassVar[bool] = False
    log_link: ClassVar[bool] = True
    screened: ClassVar[bool] = False
    defects: ClassVar[tuple[str, ...]] = (
        "One number for the whole curve: that damage is small at first and then explodes is not in it.",
    )

    @override
    def offset(self, x: Inputs) -> Array:
        return np.log(x.base_M)

    @override
    def terms(self, x: Inputs) -> Array:
        return x.ratio_M[:, None]

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del tokens
        return math.log(target / base) / float(theta[0]) if theta[0] != 0 and target > 0 else None

"""A straight line over the ratio: the baseline that a law of compression has to beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.linear import LinearLaw

__all__ = ["Line"]


class Line(LinearLaw):
    """L = a + b r, by least squares; it knows nothing of the dense model."""

    name: ClassVar[str] = "line"
    formula: ClassVar[str] = "L = a + b · r"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("ratio",)
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss", "score", "speed", "size")
    params: ClassVar[tuple[Param, ...]] = (Param("a", typical=2.0), Param("b", typical=1.5))
    anchored: ClassVar[bool] = False
    ratio_param: ClassVar[str | None] = "b"
    intercept: ClassVar[bool] = True
    log_link: ClassVar[bool] = False
    defects: ClassVar[tuple[str, ...]] = (
        "Ignores the dense value: pooled over models it describes none of them.",
        "Cannot bend, so that it misses collapse.",
    )

    @override
    def terms(self, x: Inputs) -> Array:
        return np.column_stack([np.ones_like(x.ratio_M), x.ratio_M])

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del base, tokens
        return float((target - theta[0]) / theta[1]) if theta[1] != 0 else None

"""The runtime law of Compression Laws: how much faster a model becomes as more of it is removed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Estimate, Inputs, Kind, Param
from mariotte.laws.linear import LinearLaw

__all__ = ["RuntimeLaw"]


class RuntimeLaw(LinearLaw):
    r"""S = C · S0 · (1 + r)^β, fitted in log space.

    Notes
    -----
    The paper fits S = C (1 + r)^β to the running time of each model, and S0^α (1 + r)^β to all of them, whose α came
    out at 1.0. Both are this form, S0 being the dense value and C free. Here S is a speed: a speed-up over the dense
    model, for which S0 = 1 and the form is the paper's first, or tokens a second. The paper's S falls with r (its β is
    -0.21 to -1.93), so that it is a time, and its β is the negative of ours.

    References
    ----------
    [compressionlaws2025]_ runtime law.
    """

    name: ClassVar[str] = "runtime-law"
    formula: ClassVar[str] = "S = C · S0 · (1 + r)^β"
    reference: ClassVar[str] = "compressionlaws2025"
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("speed",)
    params: ClassVar[tuple[Param, ...]] = (Param("C", typical=1.05, log=True), Param("β", typical=0.67))
    anchored: ClassVar[bool] = False
    ratio_param: ClassVar[str | None] = "β"
    intercept: ClassVar[bool] = True
    log_link: ClassVar[bool] = True
    defects: ClassVar[tuple[str, ...]] = (
        "C ≠ 1 means that nothing removed does not give back the dense speed.",
        "1 + r runs from 1 to 2: with everything removed a model is C · 2^β times as fast, and no faster.",
        "Batch, prompt and hardware are no part of it: coefficients of one protocol say nothing about another.",
    )

    @override
    def offset(self, x: Inputs) -> Array:
        return np.log(x.base_M)

    @override
    def terms(self, x: Inputs) -> Array:
        return np.column_stack([np.ones_like(x.ratio_M), np.log1p(x.ratio_M)])

    @override
    def unidentified(self, x: Inputs) -> Mapping[str, str]:
        if np.ptp(x.ratio_M) == 0.0:
            return {"β": f"all points have the same ratio, {x.ratio_M[0]:g}"}
        return {}

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del tokens
        level, beta = theta
        if beta == 0 or target <= 0:
            return None
        exponent = math.log(target / (base * level)) / beta
        return math.expm1(exponent) if exponent < 50 else None

    @override
    def remarks(self, estimate: Estimate, x: Inputs, kind: Kind) -> list[str]:
        del x, kind
        level, beta = estimate.theta
        said: list[str] = []
        if abs(level - 1.0) > 0.02:
            said.append(f"C is {level:.3g}: with nothing removed the law gives {level:.3g} times the dense speed")
        if "β" not in estimate.dropped and beta < 0:
            said.append(f"β is {beta:.3g}: what was removed made the model slower")
        return said

"""Pruning Laws, the second version: a power of what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Estimate, Inputs, Kind, Param
from mariotte.laws.linear import LinearLaw

__all__ = ["PruningLaw"]


class PruningLaw(LinearLaw):
    r"""L = L0 · P0 · (1 - r)^α, fitted in log space.

    Notes
    -----
    The paper's L is a score (an accuracy, or 1/ln of the perplexity), for which α > 0. On a loss in nats the same
    form holds with α < 0. P0 is free and positive. Within one series this is the least squares of ln L on 1 and
    ln(1 - r).

    References
    ----------
    [pruninglaws2026]_ second version of the same arXiv number.
    """

    name: ClassVar[str] = "pruning-law"
    formula: ClassVar[str] = "L = L0 · P0 · (1 - r)^α"
    reference: ClassVar[str] = "pruninglaws2026"
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio")
    params: ClassVar[tuple[Param, ...]] = (Param("P0", typical=0.98, log=True), Param("α", typical=-0.6))
    anchored: ClassVar[bool] = False
    ratio_param: ClassVar[str | None] = "α"
    intercept: ClassVar[bool] = True
    log_link: ClassVar[bool] = True
    defects: ClassVar[tuple[str, ...]] = (
        "P0 ≠ 1 means that nothing removed does not give back the dense value.",
        "An accuracy tends to 0 as everything is removed, not to chance.",
        "Published errors are on a score between 0 and 1, not relative to the loss; standard errors were not seen.",
    )

    @override
    def offset(self, x: Inputs) -> Array:
        return np.log(x.base_M)

    @override
    def terms(self, x: Inputs) -> Array:
        return np.column_stack([np.ones_like(x.ratio_M), np.log1p(-x.ratio_M)])

    @override
    def unidentified(self, x: Inputs) -> Mapping[str, str]:
        if np.ptp(x.ratio_M) == 0.0:
            return {"α": f"all points have the same ratio, {x.ratio_M[0]:g}"}
        return {}

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del tokens
        level, alpha = theta
        if alpha == 0 or target <= 0:
            return None
        exponent = math.log(target / (base * level)) / alpha
        return -math.expm1(exponent) if exponent < 50 else None

    @override
    def remarks(self, estimate: Estimate, x: Inputs, kind: Kind) -> list[str]:
        del x
        level, alpha = estimate.theta
        said: list[str] = []
        if abs(level - 1.0) > 0.02:
            said.append(f"P0 is {level:.3g}: with nothing removed the law gives {level:.3g} times the dense value")
        if alpha * (-1.0 if kind == "loss" else 1.0) < 0:
            said.append(f"α should be {'negative' if kind == 'loss' else 'positive'} for a {kind}, it is {alpha:.3g}")
        return said

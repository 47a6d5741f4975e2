"""Pruning Laws' power of what is left, of the part of a score that is not chance."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Estimate, Inputs, Kind, Law, Param

__all__ = ["ChancePruningLaw"]

CLIP = (0.02, 2.0)
"""Of the share of the margin over chance that is left, before its logarithm is taken."""

MARGIN = 0.05
"""A dense model less than this above chance has nothing to lose that could be measured."""


class ChancePruningLaw(Law):
    r"""L = c + (L0 - c) (1 - r)^α, by least squares of the logarithm through the origin.

    Notes
    -----
    L is a score as a fraction and c that of a guesser, taken from the points (0 where they do not say it) and not
    estimated. α ≥ 0. The margin that is left, (L - c)/(L0 - c), is clipped to [0.02, 2] before its logarithm is taken.
    """

    name: ClassVar[str] = "chance-pruning-law"
    formula: ClassVar[str] = "L = c + (L0 - c) · (1 - r)^α"
    reference: ClassVar[str] = "pruninglaws2026"
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio", "chance")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("score",)
    params: ClassVar[tuple[Param, ...]] = (Param("α", typical=0.9), Param("c", typical=0.25))
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "α"
    log_link: ClassVar[bool] = False
    screened: ClassVar[bool] = False
    defects: ClassVar[tuple[str, ...]] = (
        "A score that rises with pruning, as some do, is described as one that stays.",
        "A model below chance counts as one at 2 % of its margin: how far below is lost.",
        "It was found on 13 published series of 3 models: weak evidence.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return theta[1] + (x.base_M - theta[1]) * (1.0 - x.ratio_M) ** theta[0]

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        left_M = (1.0 - x.ratio_M) ** theta[0]
        return np.column_stack([(x.base_M - theta[1]) * left_M * np.log1p(-x.ratio_M), 1.0 - left_M])

    @override
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        chances = set(np.where(np.isnan(x.chance_M), 0.0, x.chance_M))
        if len(chances) > 1:
            found = ", ".join(f"{c:g}" for c in sorted(chances))
            raise FitError(f"{self.name} needs points of one chance, got {found}: fit each task alone")
        chance = float(chances.pop())
        margin_M = x.base_M - chance
        if np.min(margin_M) < MARGIN:
            raise FitError(
                f"{self.name} needs a dense score at least {MARGIN:g} above chance, got {float(np.min(x.base_M)):g} "
                f"with a chance of {chance:g}: this model cannot do the task"
            )
        column_M = np.log1p(-x.ratio_M)
        total = float(np.sum(column_M**2))
        if total == 0.0:
            raise FitError(f"{self.name} needs a point with a ratio other than 0, got none: measure one")
        target_M = np.log(np.clip((y_M - chance) / margin_M, *CLIP))
        free = float(np.sum(column_M * target_M)) / total
        alpha = max(0.0, free)
        dof = len(y_M) - 1
        covariance: Array | None = None
        given = {"c": "it is that of the points, a guesser's score" if chance else "the points do not say it: 0"}
        if free < 0:
            given["α"] = "it ended at its bound, 0: the score does not fall"
        elif dof > 0:
            covariance = np.zeros((2, 2))
            covariance[0, 0] = float(np.sum((target_M - alpha * column_M) ** 2)) / dof / total
        return Estimate(
            theta=np.array([alpha, chance]),
            covariance=covariance,
            dof=dof,
            dropped={},
            condition=1.0,
            recipe="ordinary least squares of ln((L - c)/(L0 - c)) through the origin, clipped, unweighted",
            given=given,
        )

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del tokens
        alpha, chance = float(theta[0]), float(theta[1])
        left = (target - chance) / (base - chance) if base != chance else 0.0
        if alpha == 0 or left <= 0:
            return None
        return -math.expm1(math.log(left) / alpha)

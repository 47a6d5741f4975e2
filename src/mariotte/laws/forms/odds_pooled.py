"""The odds law with an exponent that other models have told: one measurement is enough for a curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Estimate, Inputs, Kind, Law, Param, Point

__all__ = ["OddsPooled"]

EXPONENTS: Mapping[str, float] = {
    "unstructured": 2.08,
    "slice": 1.49,
    "lowrank": 1.90,
    "depth": 1.31,
    "width": 1.03,
}
"""Median exponents of published perplexity series by pruning family (ours)."""

UNKNOWN = 1.49
"""The median of those, for points whose family is not known."""


class OddsPooled(Law):
    r"""L = L0 + A (r / (1 - r))^g, with g from the pruning family and A by least squares.

    Notes
    -----
    L and A in nats per token. g is not estimated from the points: it is the median exponent of the family over
    published series, or, with `of`, that of series given. Points of several families or of an unknown one get the
    median of the families.
    """

    name: ClassVar[str] = "odds-pooled"
    formula: ClassVar[str] = "L = L0 + A · (r/(1 - r))^g, g of the pruning family"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio", "family")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (Param("A", typical=1.1), Param("g", typical=UNKNOWN))
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "A"
    log_link: ClassVar[bool] = False
    screened: ClassVar[bool] = False
    defects: ClassVar[tuple[str, ...]] = (
        "A series that does not bend as its family is missed however many of its points are measured.",
        "Least squares of L lets the harshest points decide; mild ones, which are asked about most, hardly count.",
        "Recovered series are described as unrecovered ones, though the dense model is no anchor of theirs.",
        "Shipped exponents come from perplexities of WikiText-2, most of them of LLaMA-2-7B.",
    )

    def __init__(self, exponent: float | None = None) -> None:
        self.exponent = exponent

    @classmethod
    def of(cls, series: Iterable[Sequence[Point]]) -> OddsPooled:
        """The law with the median exponent of other series, each the points of one curve.

        Raises
        ------
        FitError
            When no series has two ratios.
        """
        found = [g for points in series if (g := exponent(points)) is not None]
        if not found:
            raise FitError(
                f"{cls.name} learns its exponent from other series, none of those given has two ratios: "
                "give longer series"
            )
        return cls(float(np.median(found)))

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return x.base_M + theta[0] * _odds(x) ** theta[1]

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        odds_M = _odds(x)
        power_M = odds_M ** theta[1]
        return np.column_stack([power_M, theta[0] * power_M * np.log(np.where(odds_M > 0, odds_M, 1.0))])

    @override
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        families = set(x.families)
        family = families.pop() if len(families) == 1 else None
        g = self.exponent if self.exponent is not None else EXPONENTS.get(family or "", UNKNOWN)
        if self.exponent is not None:
            why = "the median of the series given"
        elif family in EXPONENTS:
            why = f"the median of published series of the family {family}"
        else:
            why = "the median over pruning families, that of these points being unknown or not one"
        column_M = _odds(x) ** g
        if not np.any(column_M > 0):
            raise FitError(f"{self.name} needs a point with a ratio above 0, got none: measure one")
        damage_M = np.maximum(y_M - x.base_M, 0.0)
        total = float(np.sum(column_M**2))
        amplitude = float(np.sum(column_M * damage_M)) / total
        dof = len(y_M) - 1
        covariance: Array | None = None
        if dof > 0:
            covariance = np.zeros((2, 2))
            covariance[0, 0] = float(np.sum((damage_M - amplitude * column_M) ** 2)) / dof / total
        return Estimate(
            theta=np.array([amplitude, g]),
            covariance=covariance,
            dof=dof,
            dropped={},
            condition=1.0,
            recipe="ordinary least squares of L - L0 through the origin, unweighted; the exponent is given",
            given={"g": f"it is not estimated here but {why}"},
        )

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        del tokens
        damage = target - base
        if damage < 0 or theta[0] <= 0:
            return None
        odds = (damage / theta[0]) ** (1.0 / theta[1])
        return float(odds / (1.0 + odds))


def exponent(points: Sequence[Point]) -> float | None:
    """The exponent of one curve: the slope of ln damage on ln odds up to 2.5 times the dense loss, within [0.3, 4].

    A curve that leaves that range before its third ratio is taken whole, collapse and all: two points are no slope.
    None with fewer than two ratios.
    """
    own = [p for p in points if p.ratio > 0]
    mild = [p for p in own if p.value <= 2.5 * p.base]
    if len({p.ratio for p in mild}) >= 3:
        own = mild
    if len({p.ratio for p in own}) < 2:
        return None
    odds_M = np.log([p.ratio / (1 - p.ratio) for p in own])
    damage_M = np.log([max(p.value - p.base, 0.002) for p in own])
    centred_M = odds_M - np.mean(odds_M)
    return float(np.clip(np.sum(centred_M * damage_M) / np.sum(centred_M**2), 0.3, 4.0))


def _odds(x: Inputs) -> Array:
    """(M,) of the share removed; a ratio below 0 removed nothing."""
    return np.maximum(x.ratio_M, 0.0) / (1.0 - x.ratio_M)

"""Laws that come with a posterior: what they expect is a distribution, before the first point already.

Shape legend: M points, P parameters of a law.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mariotte.laws.base import Array, Estimate, Inputs, Law

Bin = Literal["no point", "one point", "near", "far", "collapsed"]
"""How far an answer reaches: by the points that it rests on, then by the distance beyond the largest ratio of them, and
apart from these where the law expects a collapsed model."""

NEAR = 0.45
"""The distance that ends "near", in ln(r/(1 - r)): from 0.30 to 0.40, or from 0.50 to 0.61, one usual step."""

FEWEST_POINTS, FEWEST_CLUSTERS = 100, 5
"""With fewer held-out points than this, or not more clusters, there is no calibration of a scale."""


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Errors that were held out, in the law's own standard deviations.

    Parameters
    ----------
    values : the hundred upper quantiles 0.01 to 1.00, ascending, between which lines are drawn; a point weighs
        1/√(points of its cluster)
    points, clusters : how many they come from
    reach : the farthest that one lay beyond the ratios trained on, in ln(r/(1 - r))
    """

    values: tuple[float, ...]
    points: int
    clusters: int
    reach: float

    def at(self, level: float) -> float | None:
        """Standard deviations on each side of an interval at `level`; None where the clusters are too few for it.

        The quantile is taken at level · (1 + 1/clusters), the finite-sample correction of split conformal prediction
        with the cluster as the exchangeable unit: 80 % needs 4 clusters and 90 % needs 9.
        """
        corrected = level * (1.0 + 1.0 / self.clusters)
        if corrected > 1.0 + 1e-12:
            return None
        place = min(max(100 * corrected - 1, 0.0), 99.0)
        below = math.floor(place)
        low, high = self.values[below], self.values[min(below + 1, 99)]
        return low + (place - below) * (high - low)


@dataclass(frozen=True, kw_only=True)
class Standardised:
    """How far a law with a posterior was off on series that it knew nothing of, a cluster left out at a time.

    Parameters
    ----------
    method : how they were left out
    bins : by `Bin`
    """

    method: Literal["series of a pool, leave one cluster out"]
    bins: Mapping[str, Quantiles]


class PosteriorLaw(Law):
    """A law whose estimate is a Gaussian of its parameters, so that it gives intervals of its own to calibrate."""

    @abstractmethod
    def before(self, x: Inputs) -> Estimate:
        """What is known of such a series before any point of it is."""

    @abstractmethod
    def deviation(self, theta: Array, covariance_PP: Array, x: Inputs) -> Array:
        """(M,) standard deviation of a measurement about the curve, on the law's own scale, before any calibration."""

    @abstractmethod
    def shifted(self, theta: Array, x: Inputs, by_M: Array, deviation_M: Array) -> Array:
        """(M,) the curve moved by that many standard deviations towards more damage: the ends of an interval."""

    @abstractmethod
    def missed_by(self, theta: Array, covariance_PP: Array, x: Inputs, y_M: Array) -> Array:
        """(M,) the standard deviations at which intervals begin to hold the measured values; inf where none does."""

    @abstractmethod
    def standardised(self, metric: str) -> Standardised | str:
        """The calibration of a metric's scale, or the reason why there is none."""


def bin_of(n_ratios: int, distance: float, *, collapsed: bool, loss: bool) -> Bin:
    """The bin of an answer."""
    if collapsed and loss:
        return "collapsed"
    if n_ratios == 0:
        return "no point"
    if n_ratios == 1:
        return "one point"
    return "near" if distance <= NEAR or not loss else "far"


def distance(ratio: float, largest: float) -> float:
    """How far a ratio lies beyond the largest known one, in ln(r/(1 - r)); 0 within."""
    if ratio <= largest or ratio <= 0:
        return 0.0
    if largest <= 0:
        return math.inf
    return math.log(ratio / (1 - ratio)) - math.log(largest / (1 - largest))


def quantiles(errors: Sequence[float], clusters: Sequence[str], reach: float) -> Quantiles:
    """The quantiles of standardised errors, with the clusters that they come from."""
    own = np.asarray(errors)
    size: dict[str, int] = {}
    for cluster in clusters:
        size[cluster] = size.get(cluster, 0) + 1
    weights = np.array([size[cluster] ** -0.5 for cluster in clusters])
    order = np.argsort(own, kind="stable")
    share = np.cumsum(weights[order]) / np.sum(weights)
    where = np.searchsorted(share, np.arange(1, 101) / 100 - 1e-12)
    found = own[order][np.minimum(where, len(own) - 1)]
    return Quantiles(
        values=tuple(float(min(v, LARGEST)) for v in found), points=len(own), clusters=len(size), reach=reach
    )


LARGEST = 1e3
"""Stands for an error that no interval holds: a loss below the dense one."""

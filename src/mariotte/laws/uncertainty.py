"""How far predictions were off where the law had not seen the answer: the only source of intervals here.

The textbook interval from in-sample residuals covers 4 to 10 % at a nominal 80 to 90 % on published perplexities
(our measurement), so it is not offered for predictions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mariotte.errors import FitError
from mariotte.laws.base import Array, Law, Point, values
from mariotte.laws.posterior import PosteriorLaw, Standardised
from mariotte.laws.validation import folds, predicted

Method = Literal["leave one cluster out", "rolling hold-out of other clusters"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Absolute errors on points that the law was not fitted to.

    Parameters
    ----------
    method : how they were left out
    errors : |ln L - ln prediction| where the law's errors are logarithmic, |L - prediction| otherwise; ascending
    weights : one each; every cluster sums to 1, so that a long series does not speak for the others
    clusters : how many clusters the errors come from
    reach : the farthest that an error's ratio lay beyond the largest ratio trained on
    """

    method: Method
    errors: tuple[float, ...]
    weights: tuple[float, ...]
    clusters: int
    reach: float

    def half_width(self, level: float) -> float | None:
        """Half the interval at `level`; None when there are too few clusters for that level.

        The quantile is taken at level · (1 + 1/clusters), the finite-sample correction of split conformal
        prediction with the cluster as the exchangeable unit: 80 % needs 4 clusters and 90 % needs 9.
        """
        corrected = level * (1.0 + 1.0 / self.clusters)
        if corrected > 1.0 + 1e-12:
            return None
        share_M = np.cumsum(self.weights) / np.sum(self.weights)
        return self.errors[min(int(np.searchsorted(share_M, corrected - 1e-12)), len(self.errors) - 1)]


def clusters_needed(level: float) -> int:
    """The fewest clusters from which an interval at `level` can be calibrated."""
    return int(np.ceil(level / (1.0 - level) - 1e-9))


def calibrate(law: Law, points: Sequence[Point], pool: Sequence[Point] = ()) -> Calibration | Standardised | str:
    """Errors of `law` on points left out, or the reason why there are none.

    A law with a posterior brings the errors of the series that its priors were learned from.

    Parameters
    ----------
    law : refitted for each part left out
    points : those of the fit; when they span several clusters, each is left out in turn
    pool : further points, used when `points` are one cluster: the law is fitted to the beginnings of the other
        clusters' series and predicts their ends, which is what will be asked of it here
    """
    if isinstance(law, PosteriorLaw):
        return law.standardised(points[0].metric)
    if len({p.group for p in points}) > 1:
        return _leave_out(law, points)
    own = {p.group for p in points}
    return _roll(law, [p for p in pool if p.group not in own])


def _leave_out(law: Law, points: Sequence[Point]) -> Calibration | str:
    errors: dict[str, Array] = {}
    refused = ""
    for group in sorted({p.group for p in points}):
        inside = [p for p in points if p.group == group]
        outside = [p for p in points if p.group != group]
        try:
            errors[group] = _errors(law, outside, inside)
        except FitError as error:
            # A cluster without which the law cannot be fitted tells nothing about its errors; it is counted as absent.
            refused = str(error)
    if not errors:
        return f"no cluster could be left out: {refused}"
    return _collect("leave one cluster out", errors, reach=0.0)


def _roll(law: Law, pool: Sequence[Point]) -> Calibration | str:
    if not pool:
        return (
            "the points are one cluster, which cannot say how far the law errs on another; "
            "give other clusters as the pool"
        )
    errors: dict[str, list[Array]] = {}
    reach = 0.0
    for fold in folds(pool):
        try:
            errors.setdefault(fold.train[0].group, []).append(_fold_errors(law, fold.train, fold.test))
        except FitError:
            continue  # a beginning too short for this law calibrates nothing
        reach = max(reach, fold.test[-1].ratio - fold.train[-1].ratio)
    if not errors:
        return "no other series is long enough to hold some of it out"
    return _collect("rolling hold-out of other clusters", {g: np.concatenate(e) for g, e in errors.items()}, reach)


@functools.lru_cache(maxsize=4096)
def _fold_errors(law: Law, train: tuple[Point, ...], test: tuple[Point, ...]) -> Array:
    """The errors of one fold, which is in the pool of every series but those of its own cluster."""
    return _errors(law, train, test)


def _errors(law: Law, train: Sequence[Point], test: Sequence[Point]) -> Array:
    predicted_M = predicted(law, train, test)
    truth_M = values(test)
    if not law.log_link:
        return np.abs(truth_M - predicted_M)
    tiny = np.finfo(np.float64).tiny
    return np.abs(np.log(np.maximum(truth_M, tiny)) - np.log(np.maximum(predicted_M, tiny)))


def _collect(method: Method, errors: dict[str, Array], reach: float) -> Calibration:
    flat = sorted((float(e), 1.0 / len(group)) for group in errors.values() for e in group)
    return Calibration(
        method=method,
        errors=tuple(e for e, _ in flat),
        weights=tuple(w for _, w in flat),
        clusters=len(errors),
        reach=reach,
    )

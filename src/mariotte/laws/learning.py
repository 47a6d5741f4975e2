"""Learning what the family law knows beforehand, from the shipped series or from these and a user's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mariotte.errors import FitError
from mariotte.laws.axes import DEFAULTS, Settings, scale_of
from mariotte.laws.base import COLLAPSE, Array, Inputs, Law, Point, values
from mariotte.laws.forms.family import Family
from mariotte.laws.pool import Pool, curves_of
from mariotte.laws.posterior import FEWEST_CLUSTERS, FEWEST_POINTS, Bin, Standardised, bin_of, distance, quantiles
from mariotte.laws.priors import Priors
from mariotte.laws.validation import Fold, HoldOut, rolling


@dataclass(frozen=True, kw_only=True)
class Missed:
    """One point of a series, predicted from its milder ratios with priors that know nothing of its cluster.

    Parameters
    ----------
    point : with the measured value
    k : how many ratios were trained on, 0 for none
    n_ratios : of the whole series
    bin : of the answer
    reach : beyond the ratios trained on, in ln(r/(1 - r)); 0 without any
    prediction : nats or a fraction
    by : how many standard deviations wide an interval must be on each side to hold the value
    theta, covariance : of the fit that it was predicted by
    """

    point: Point
    k: int
    n_ratios: int
    bin: Bin
    reach: float
    prediction: float
    by: float
    theta: Array
    covariance: Array


def learn(points: Iterable[Point], settings: Mapping[str, Settings] = DEFAULTS) -> Priors:
    """Priors and calibration from points.

    Parameters
    ----------
    points : the shipped ones (`published.points`), or these and a user's own; their clusters are left out in turn
    settings : hyper-parameters, the frozen ones by default

    Raises
    ------
    FitError
        When nothing can be learned from them.
    """
    pool = Pool(points, settings)
    return replace(pool.priors(), calibration=calibration(missed(pool)))


def laws_without(pool: Pool, clusters: Iterable[str]) -> dict[str, Family]:
    """One law for each cluster, that was learned without it."""
    return {
        cluster: Family(pool.priors(lambda other, left=cluster: other == left)) for cluster in sorted(set(clusters))
    }


def missed(pool: Pool) -> Iterator[Missed]:
    """Every end of every series of the pool, predicted from each of its beginnings, the empty one among them."""
    curves = [c for c in curves_of(pool.points).values() if scale_of(c[0].metric) is not None]
    laws = laws_without(pool, (c[0].group for c in curves))
    for curve in curves:
        yield from _missed(laws[curve[0].group], curve)


def _missed(law: Family, curve: Sequence[Point]) -> Iterator[Missed]:
    ratios = sorted({p.ratio for p in curve if p.ratio > 0})
    loss = curve[0].kind == "loss"
    for k in range(len(ratios)):
        train = [p for p in curve if k and p.ratio <= ratios[k - 1]]
        test = [p for p in curve if p.ratio > (ratios[k - 1] if k else 0.0)]
        x = Inputs.of(test)
        try:
            estimate = law.estimate(Inputs.of(train), values(train)) if train else law.before(x)
        except FitError:
            return  # a metric that the law refuses is never predicted, so that its errors are nobody's
        if not train and not loss and curve[0].base - (curve[0].chance or 0.0) < 0.05:
            return
        assert estimate.covariance is not None
        prediction = law.f(estimate.theta, x)
        by = law.missed_by(estimate.theta, estimate.covariance, x, values(test))
        for point, expected, off in zip(test, prediction, by, strict=True):
            reach = distance(point.ratio, ratios[k - 1]) if k else 0.0
            collapsed = loss and float(expected) > COLLAPSE * point.base
            yield Missed(
                point=point,
                k=k,
                n_ratios=len(ratios),
                bin=bin_of(k, reach, collapsed=collapsed, loss=loss),
                reach=reach,
                prediction=float(expected),
                by=float(off),
                theta=estimate.theta,
                covariance=estimate.covariance,
            )


def strict(points: Sequence[Point], laws: Sequence[Law | str], pool: Pool) -> HoldOut:
    """A rolling hold-out in which the family law knows nothing of the cluster that it predicts.

    Parameters
    ----------
    points : of one kind of metric, of clusters of the pool
    laws : laws or names; others than the family law are as they are
    pool : what the family law is learned from, without the cluster of each fold
    """
    own = laws_without(pool, (p.group for p in points))

    def prepare(law: Law, fold: Fold) -> Law:
        return own[fold.train[0].group] if isinstance(law, Family) else law

    return rolling(points, laws, prepare=prepare)


def calibration(rows: Iterable[Missed]) -> dict[str, Standardised]:
    """Quantiles of the errors by scale and bin; scales with too few points or clusters have none."""
    by_scale: dict[str, dict[str, list[Missed]]] = {}
    for row in rows:
        scale = scale_of(row.point.metric)
        assert scale is not None
        by_scale.setdefault(scale, {}).setdefault(row.bin, []).append(row)
    found: dict[str, Standardised] = {}
    for scale, bins in sorted(by_scale.items()):
        everything = [row for rows_ in bins.values() for row in rows_]
        if len(everything) < FEWEST_POINTS or len({r.point.group for r in everything}) <= FEWEST_CLUSTERS:
            continue
        found[scale] = Standardised(
            method="series of a pool, leave one cluster out",
            bins={
                name: quantiles([r.by for r in own], [r.point.group for r in own], max(r.reach for r in own))
                for name, own in sorted(bins.items())
            },
        )
    return found


def coverage(rows: Sequence[Missed], level: float) -> list[tuple[Missed, float | None]]:
    """Each point with the standard deviations that its interval has when its cluster is left out of the calibration."""
    laws: dict[str, dict[str, Standardised]] = {}
    for cluster in sorted({r.point.group for r in rows}):
        laws[cluster] = calibration(r for r in rows if r.point.group != cluster)
    found: list[tuple[Missed, float | None]] = []
    for row in rows:
        scale = scale_of(row.point.metric)
        own = laws[row.point.group].get(scale or "")
        found.append((row, None if own is None or row.bin not in own.bins else own.bins[row.bin].at(level)))
    return found


def half_width(law: Family, row: Missed, deviations: float) -> float:
    """Half the interval of one answer, in nats or as a fraction; inf where it has no end."""
    x = Inputs.of([row.point])
    deviation = law.deviation(row.theta, row.covariance, x)
    ends = [float(law.shifted(row.theta, x, np.array([side * deviations]), deviation)[0]) for side in (-1, 1)]
    return abs(ends[1] - ends[0]) / 2 if all(map(math.isfinite, ends)) else math.inf

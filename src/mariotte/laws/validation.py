"""Rolling hold-out: fit the mild ratios, predict the harsh ones, compare with the naive.

The protocol, per series and for k = 2 .. n-1: train on the points of the k smallest ratios, predict all larger
ones, clip to [0, 30] nats or [0, 1]; a law's score is its RMSE in each fold (series, k), then mean and median over
folds. It is the only thing that laws are chosen by here; R² and the like are printed and never used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mariotte.errors import FitError
from mariotte.laws.base import LIMITS, Array, Inputs, Kind, Law, Point, Series, values
from mariotte.laws.catalogue import applicable, find
from mariotte.laws.ensemble import ensemble

BY = ("model", "method", "family", "source", "metric", "protocol", "ratio_kind", "recovery", "cluster", "series")
"""Fields of a point by which folds and fits can be grouped."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One point predicted by every law from the milder points of its series.

    Parameters
    ----------
    point : with the measured value
    k : how many ratios of its series were trained on
    step : 1 for the next larger ratio, 2 for the one after it ...
    predictions : law to clipped prediction; a law that could not be fitted is absent
    """

    point: Point
    k: int
    step: int
    predictions: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A law that could not be fitted in a fold, and why."""

    law: str
    series: Series
    k: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """The hold-out error of one law over folds.

    Parameters
    ----------
    law, group : the law, and the value of the field grouped by (empty without one)
    mean, median : of the folds' RMSE, in nats or fractions
    se : standard error of the mean, over clusters where there are several, else over folds; None for one fold
    n_folds, n_points, n_series, n_clusters : what it rests on
    """

    law: str
    group: str
    mean: float
    median: float
    se: float | None
    n_folds: int
    n_points: int
    n_series: int
    n_clusters: int


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """All predictions of a rolling hold-out.

    Parameters
    ----------
    kind : of the metric
    laws : in the order given
    rows : every test point of every fold
    refusals : folds that a law could not be fitted in
    """

    kind: Kind
    laws: tuple[str, ...]
    rows: tuple[HeldOut, ...]
    refusals: tuple[Refusal, ...]

    def scores(
        self, *, before_collapse: bool = True, next_step: bool = False, by: str | None = None, common: bool = True
    ) -> list[Score]:
        """One score a law (and group), best mean first within each group.

        Parameters
        ----------
        before_collapse : keep only test points before collapse. It uses the truth, and so flatters every law alike
        next_step : keep only the next larger ratio
        by : field of a point to group by, one of `BY`; None for one group
        common : score only folds that every law covers; without it laws may rest on different folds
        """
        _check_field(by)
        kept = [
            r for r in self.rows if (not before_collapse or r.point.before_collapse) and (not next_step or r.step == 1)
        ]
        folds: dict[tuple[str, Series, int], list[HeldOut]] = {}
        for row in kept:
            folds.setdefault((field_of(row.point, by), row.point.series, row.k), []).append(row)
        if common:
            folds = {
                key: rows for key, rows in folds.items() if all(law in r.predictions for r in rows for law in self.laws)
            }
        scores: list[Score] = []
        for group in sorted({key[0] for key in folds}):
            own = {key: rows for key, rows in folds.items() if key[0] == group}
            found = [s for law in self.laws if (s := _score(law, group, own)) is not None]
            scores += sorted(found, key=lambda s: s.mean)
        return scores

    def refused(self) -> list[tuple[str, int, str]]:
        """Each law that could not be fitted in some folds, in how many, and why in the first of them."""
        found: dict[str, list[Refusal]] = {}
        for refusal in self.refusals:
            found.setdefault(refusal.law, []).append(refusal)
        return [(law, len(own), own[0].reason) for law, own in found.items()]

    def winners(self) -> tuple[str, ...]:
        """The laws chosen by hold-out before collapse: the simplest within one standard error of the best mean.

        Several where they are equally simple, the one of the smallest mean first: the errors do not tell them apart.
        Baselines without a ratio are never chosen, since they cannot answer what a law is asked; `Score` shows
        whether a winner beats them.

        Raises
        ------
        FitError
            When no fold can be scored.
        """
        scores = [s for s in self.scores() if not find(s.law).baseline]
        if not scores:
            raise FitError(
                "no law can be chosen by hold-out: it needs a series with at least 3 ratios before collapse; "
                "measure more ratios, or name a law with --law"
            )
        best = scores[0]
        within = [s.law for s in scores if s.mean <= best.mean + (best.se or 0.0)]
        fewest = min(len(find(law).params) for law in within)
        return tuple(law for law in within if len(find(law).params) == fewest)

    def joined(self, laws: Sequence[str]) -> HoldOut:
        """The hold-out with the ensemble of some of its laws beside them, on the folds that all of these cover."""
        name = ensemble([find(law) for law in laws]).name
        rows = [
            replace(r, predictions={**r.predictions, name: float(np.median([r.predictions[law] for law in laws]))})
            if all(law in r.predictions for law in laws)
            else r
            for r in self.rows
        ]
        return replace(self, laws=(*self.laws, name), rows=tuple(rows))


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One cut of a series.

    Parameters
    ----------
    series, k : which, and how many of its ratios are trained on
    train, test : the points up to the cut and beyond it, by ratio
    """

    series: Series
    k: int
    train: tuple[Point, ...]
    test: tuple[Point, ...]


def folds(points: Iterable[Point], min_train: int = 2) -> Iterator[Fold]:
    """Every cut of every series that leaves `min_train` ratios before it and one after it."""
    curves: dict[Series, list[Point]] = {}
    for point in points:
        curves.setdefault(point.series, []).append(point)
    for series in sorted(curves):
        curve = sorted(curves[series], key=lambda p: (p.ratio, p.value))
        ratios = sorted({p.ratio for p in curve})
        for k in range(min_train, len(ratios)):
            train = tuple(p for p in curve if p.ratio <= ratios[k - 1])
            test = tuple(p for p in curve if p.ratio > ratios[k - 1])
            yield Fold(series=series, k=k, train=train, test=test)


def predicted(law: Law, train: Sequence[Point], test: Sequence[Point]) -> Array:
    """(M,) what a law fitted to `train` expects of `test`, clipped to what is possible.

    Raises
    ------
    FitError
        When the law cannot be fitted, or gives no number.
    """
    return _predicted(law, Inputs.of(train), values(train), Inputs.of(test), test[0].kind)


def _predicted(law: Law, x: Inputs, y_M: Array, asked: Inputs, kind: Kind) -> Array:
    with np.errstate(all="ignore"):
        theta = law.estimate(x, y_M).theta
        found_M = np.clip(law.f(theta, asked), *LIMITS[kind])
    if np.any(np.isnan(found_M)):
        raise FitError(f"{law.name} fitted to {len(y_M)} points gives no number beyond them")
    return found_M


def rolling(
    points: Iterable[Point],
    laws: Sequence[Law | str] | None = None,
    *,
    min_train: int = 2,
    prepare: Callable[[Law, Fold], Law] | None = None,
) -> HoldOut:
    """Predict the end of every series from each of its beginnings.

    Parameters
    ----------
    points : of one kind of metric; series are kept apart, so that protocols may differ
    laws : laws or names; None for all that describe this kind of metric
    min_train : the fewest ratios trained on
    prepare : gives the law to use in a fold, such as one that was learned without its cluster; None uses each as it is

    Raises
    ------
    FitError
        When there are no points, or losses and scores or speeds together.
    """
    points = list(points)
    if len({p.kind for p in points}) != 1:
        came = "several" if points else "no points"
        raise FitError(f"a hold-out needs one kind of metric, got {came}: keep one metric")
    kind = points[0].kind
    chosen = applicable(kind) if laws is None else [find(law) if isinstance(law, str) else law for law in laws]
    rows: list[HeldOut] = []
    refusals: list[Refusal] = []
    for fold in folds(points, min_train):
        kept, refused = _held_out(fold, chosen, prepare, kind)
        rows += kept
        refusals += refused
    return HoldOut(kind=kind, laws=tuple(law.name for law in chosen), rows=tuple(rows), refusals=tuple(refusals))


def _held_out(
    fold: Fold, laws: Sequence[Law], prepare: Callable[[Law, Fold], Law] | None, kind: Kind
) -> tuple[list[HeldOut], list[Refusal]]:
    """The test points of a fold with the predictions of all laws, and the laws that gave none."""
    rows: list[HeldOut] = []
    refusals: list[Refusal] = []
    predictions: list[dict[str, float]] = [{} for _ in fold.test]
    x, y_M, asked = Inputs.of(fold.train), values(fold.train), Inputs.of(fold.test)
    for law in laws:
        try:
            own = law if prepare is None else prepare(law, fold)
            predicted_M = _predicted(own, x, y_M, asked, kind)
        except FitError as error:
            refusals.append(Refusal(law=law.name, series=fold.series, k=fold.k, reason=str(error)))
            continue
        for row, value in zip(predictions, predicted_M, strict=True):
            row[law.name] = float(value)
    steps = {ratio: step for step, ratio in enumerate(sorted({p.ratio for p in fold.test}), 1)}
    for point, row in zip(fold.test, predictions, strict=True):
        rows.append(HeldOut(point=point, k=fold.k, step=steps[point.ratio], predictions=row))
    return rows, refusals


def leave_one_out(
    points: Iterable[Point],
    by: str,
    laws: Sequence[Law | str] | None = None,
    *,
    prepare: Callable[[Law, Fold], Law] | None = None,
) -> HoldOut:
    """Predict each model, method or other group from all the others, none of its own points being known.

    Parameters
    ----------
    points : of one metric, protocol and kind of ratio, as for one fit
    by : field of a point whose values are left out in turn, one of `BY`
    laws, prepare : as in `rolling`; a fold trains on the points of all other groups

    Raises
    ------
    FitError
        When points are no one fit, or there are fewer than two groups.
    """
    points = list(points)
    for name in ("metric", "protocol", "ratio_kind"):
        if len({getattr(p, name) for p in points}) != 1:
            raise FitError(f"to leave out by {by} needs points of one {name}: keep one with --where {name}=...")
    groups = grouped(points, by)
    if len(groups) < 2:
        raise FitError(f"to leave out by {by} needs two groups, there is one: give points of another {by}")
    kind = points[0].kind
    chosen = applicable(kind) if laws is None else [find(law) if isinstance(law, str) else law for law in laws]
    rows: list[HeldOut] = []
    refusals: list[Refusal] = []
    for group in groups:
        train = tuple(p for p in points if field_of(p, by) != group)
        for test in protocol_series(groups[group], fewest=1):
            fold = Fold(series=test[0].series, k=0, train=train, test=tuple(sorted(test, key=lambda p: p.ratio)))
            kept, refused = _held_out(fold, chosen, prepare, kind)
            rows += kept
            refusals += refused
    return HoldOut(kind=kind, laws=tuple(law.name for law in chosen), rows=tuple(rows), refusals=tuple(refusals))


def protocol_series(points: Iterable[Point], fewest: int = 4) -> list[list[Point]]:
    """The curves that the published hold-out is made of: those with at least `fewest` different ratios."""
    curves: dict[Series, list[Point]] = {}
    for point in points:
        curves.setdefault(point.series, []).append(point)
    return [curves[s] for s in sorted(curves) if len({p.ratio for p in curves[s]}) >= fewest]


def cluster_ratio(
    held_out: HoldOut, law: str, other: str, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """One law's mean error before collapse over another's, with the ends of its bootstrap interval over clusters.

    Parameters
    ----------
    held_out : with both laws, on folds that both cover
    law, other : numerator and denominator
    draws, seed : of the bootstrap
    level : of the percentile interval

    Raises
    ------
    FitError
        When no fold has both.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    folds: dict[tuple[Series, int], list[HeldOut]] = {}
    for row in held_out.rows:
        if row.point.before_collapse and law in row.predictions and other in row.predictions:
            folds.setdefault((row.point.series, row.k), []).append(row)
    for rows in folds.values():
        misses = [
            float(np.sqrt(np.mean([(r.predictions[name] - r.point.value) ** 2 for r in rows]))) for name in (law, other)
        ]
        errors.setdefault(rows[0].point.group, []).append((misses[0], misses[1]))
    if not errors:
        raise FitError(f"no fold has predictions of both {law} and {other}: hold both out on the same points")
    sums = np.array([np.sum(own, axis=0) for _, own in sorted(errors.items())])
    generator = np.random.default_rng(seed)
    drawn = sums[generator.integers(len(sums), size=(draws, len(sums)))].sum(axis=1)
    tail = (1.0 - level) / 2
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [tail, 1 - tail])
    total = sums.sum(axis=0)
    return float(total[0] / total[1]), float(low), float(high)


def field_of(point: Point, by: str | None) -> str:
    """The value of the field to group by, as text; the empty text for None."""
    if by is None:
        return ""
    value = point.group if by == "cluster" else getattr(point, by)  # a series reads as model × method | recovery
    return "" if value is None else str(value)


def grouped(points: Iterable[Point], by: str | None) -> dict[str, list[Point]]:
    """Points by the value of a field, in the order of the values.

    Raises
    ------
    FitError
        When points have no such field.
    """
    _check_field(by)
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(field_of(point, by), []).append(point)
    return dict(sorted(groups.items()))


def _check_field(by: str | None) -> None:
    if by is not None and by not in BY:
        raise FitError(f"points cannot be grouped by {by!r}: choose one of {', '.join(BY)}")


def _score(law: str, group: str, folds: Mapping[tuple[str, Series, int], Sequence[HeldOut]]) -> Score | None:
    errors: list[float] = []
    clusters: list[str] = []
    n_points = 0
    for rows in folds.values():
        misses = [r.predictions[law] - r.point.value for r in rows if law in r.predictions]
        if misses:
            errors.append(float(np.sqrt(np.mean(np.square(misses)))))
            clusters.append(rows[0].point.group)
            n_points += len(misses)
    if not errors:
        return None
    return Score(
        law=law,
        group=group,
        mean=float(np.mean(errors)),
        median=float(np.median(errors)),
        se=_standard_error(errors, clusters),
        n_folds=len(errors),
        n_points=n_points,
        n_series=len({key[1] for key, rows in folds.items() if any(law in r.predictions for r in rows)}),
        n_clusters=len(set(clusters)),
    )


def _standard_error(errors: Sequence[float], clusters: Sequence[str]) -> float | None:
    """Of the mean: folds of one cluster move together, so that clusters are summed before squaring."""
    if len(errors) < 2:
        return None
    deviation_M = np.asarray(errors) - np.mean(errors)
    names = sorted(set(clusters))
    unit: Callable[[int], str | int] = (lambda i: clusters[i]) if len(names) > 1 else (lambda i: i)
    sums: dict[str | int, float] = {}
    for i, deviation in enumerate(deviation_M):
        sums[unit(i)] = sums.get(unit(i), 0.0) + float(deviation)
    n = len(sums)
    return float(np.sqrt(n / (n - 1) * sum(s**2 for s in sums.values()))) / len(errors)

"""Learning priors: what series say of the curves of their families.

Every prior is a Gaussian, so what a series says is a precision and a mean, kept once: priors without a cluster cost
little. `mariotte.laws.learning` measures how far such priors miss.

Shapes: C weights of a family's curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mariotte.errors import FitError
from mariotte.laws.axes import DEFAULTS, N_LINE, STRAIGHT, UNKNOWN, Settings, draw, information, known_name, scale_of
from mariotte.laws.base import Array, Inputs, Point, Series, values
from mariotte.laws.priors import RECOVERED, Curve, Priors
from mariotte.store.record import canonical_json, digest

_Any = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """What one series says: `information` for the curves with and without a bend."""

    scale: str
    key: str
    cluster: str
    with_bend: bool
    precision: Array
    weighted: Array


class Pool:
    """Points from which priors are learned, with what each series says kept: priors without a cluster cost little.

    Parameters
    ----------
    points : of any metrics; speeds and sizes are passed over
    settings : hyper-parameters, the frozen ones by default
    """

    def __init__(self, points: Iterable[Point], settings: Mapping[str, Settings] = DEFAULTS) -> None:
        self.settings = dict(settings)
        self.points = points = list(points)
        self.data_hash = digest(sorted(canonical_json(asdict(p)) for p in points))
        self._evidence: list[_Evidence] = []
        for curve in curves_of(points).values():
            found = _evidence(curve, self.settings)
            if found is not None:
                self._evidence.append(found)

    def priors(self, without: Callable[[str], bool] | None = None) -> Priors:
        """Learn the priors.

        Parameters
        ----------
        without : clusters to leave out; None leaves out none

        Raises
        ------
        FitError
            When no series is left.
        """
        kept = [e for e in self._evidence if without is None or not without(e.cluster)]
        if not kept:
            raise FitError("no series is left to learn priors from: give points of unrecovered series with two ratios")
        curves: dict[str, dict[str, Curve]] = {}
        losses = [e for e in kept if e.scale in ("perplexity", "answer")]
        for scale in ("perplexity", "answer"):
            found: dict[str, Curve] = {}
            for with_bend in (True, False):
                # The other kind of loss tells what curves look like in general and nothing about a family.
                found |= _learn([e for e in losses if e.with_bend == with_bend], scale, self.settings[scale], with_bend)
            curves[scale] = found
        curves["score"] = _learn([e for e in kept if e.scale == "score"], "score", self.settings["score"], False)
        curves["recovered"] = _learn(
            [e for e in kept if e.scale == "recovered"], "recovered", self.settings["recovered"], False
        )
        return Priors(settings=self.settings, curves=curves, data_hash=self.data_hash)


def curves_of(points: Iterable[Point]) -> dict[Series, list[Point]]:
    """Points by their series, each by ratio."""
    found: dict[Series, list[Point]] = {}
    for point in points:
        found.setdefault(point.series, []).append(point)
    return {series: sorted(found[series], key=lambda p: (p.ratio, p.value)) for series in sorted(found)}


def _evidence(curve: Sequence[Point], settings: Mapping[str, Settings]) -> _Evidence | None:
    """What a series tells its family; None for one that tells nothing or may mislead."""
    first = curve[0]
    scale = scale_of(first.metric)
    if scale is None:
        return None
    recovered, family = first.recovered, known_name(first.family)
    kind = "recovered" if recovered and scale != "score" else scale
    setting = settings[kind]
    if scale == "score":
        if first.base - (first.chance or 0.0) < 0.05:
            return None
        kept = [p for p in curve if p.ratio > 0]
    else:
        # Below the dense value by more than noise: the base is another protocol's, or something else went on.
        if not recovered and min(p.value - p.base for p in curve) < -0.01 * first.base:
            return None
        if recovered and scale == "answer":
            return None
        kept = [p for p in curve if p.value <= setting.keep * p.base and p.ratio > 0]
        if len(kept) < (1 if recovered else 2):
            return None
    if not kept:
        return None
    with_bend = kind in ("perplexity", "answer") and family not in STRAIGHT
    drawn = draw(Inputs.of(kept), values(kept), setting, scale, recovered=recovered, family=family)
    precision, weighted = information(drawn, setting, N_LINE if with_bend else 2)
    key = UNKNOWN if kind == "recovered" else family + (RECOVERED if recovered else "")
    return _Evidence(
        scale=kind, key=key, cluster=first.group, with_bend=with_bend, precision=precision, weighted=weighted
    )


def _learn(kept: Sequence[_Evidence], scale: str, settings: Settings, with_bend: bool) -> dict[str, Curve]:
    """The curves of the families of one scale, and of a family that is not among them.

    A family's mean is Gaussian about the common one; a cluster counts as one series, however many it has.
    """
    columns = N_LINE if with_bend else 2
    in_cluster: dict[tuple[str, str, str], int] = {}
    for e in kept:
        in_cluster[e.scale, e.key, e.cluster] = in_cluster.get((e.scale, e.key, e.cluster), 0) + 1
    groups: dict[tuple[str, str], tuple[Array, Array]] = {}
    for e in kept:
        weight = 1.0 / in_cluster[e.scale, e.key, e.cluster]
        precision, weighted = groups.get((e.scale, e.key), (np.zeros((columns, columns)), np.zeros(columns)))
        groups[e.scale, e.key] = precision + weight * e.precision, weighted + weight * e.weighted
    between = np.diag(np.square(settings.family_sd[:columns]))
    common = np.diag(1.0 / np.square(settings.mean_sd[:columns]))
    towards = common @ np.array(settings.mean[:columns])
    for precision, weighted in groups.values():
        shrink = np.linalg.inv(np.eye(columns) + precision @ between)
        common, towards = common + shrink @ precision, towards + shrink @ weighted
    mean, uncertainty = np.linalg.solve(common, towards), np.linalg.inv(common)
    new = between + uncertainty
    clusters = {(e.scale, e.cluster) for e in kept}
    found: dict[str, Curve] = {}
    # Curves with a bend are the common ones of both: an unknown family may bend.
    if with_bend or scale not in ("perplexity", "answer"):
        found[UNKNOWN] = _curve(mean, new, len(clusters), len(kept))
    for (kind, key), (precision, weighted) in groups.items():
        if kind != scale or key == UNKNOWN:
            continue
        own = np.linalg.inv(np.linalg.inv(new) + precision)
        own_mean = own @ (np.linalg.solve(new, mean) + weighted)
        own_clusters = {e.cluster for e in kept if (e.scale, e.key) == (kind, key)}
        n_series = sum((e.scale, e.key) == (kind, key) for e in kept)
        found[key] = _curve(own_mean, own, len(own_clusters), n_series)
    return found


def _curve(mean: _Any, covariance: _Any, clusters: int, series: int) -> Curve:
    whole_C, whole_CC = np.zeros(N_LINE), np.zeros((N_LINE, N_LINE))
    whole_C[: len(mean)] = mean
    whole_CC[: len(mean), : len(mean)] = 0.5 * (covariance + covariance.T)
    a, b, c = map(float, whole_C)
    rows = [(float(r[0]), float(r[1]), float(r[2])) for r in whole_CC]
    return Curve(mean=(a, b, c), covariance=tuple(rows), clusters=clusters, series=series)

"""What other models say about a curve before it is measured: priors of the family law, learned from published series.

Damage is drawn against the ratio on axes on which curves are nearly straight lines, z over x:

* a loss: z is the logarithm of the damage in nats, corrected for its ceiling, and x the logarithm of the odds
  r/(1 - r);
* a score: z is ln(-ln f) of the share f of the dense margin over chance that is left, and x is ln(-ln(1 - r)), on
  which a line of slope 1 is the pruning law with its chance put right;
* a loss after recovery training: z is ln(L/L0) and x is -ln(1 - r), the pruning law itself, as the dense model is no
  longer the anchor.

Every pruning family has a curve there, a Gaussian with a mean and a covariance; a series departs from it by a level, a
slope and a smooth residual, Gaussians too. So all is one linear solve, here and in the law. The scheme was tried
beforehand on the series that ship with the package; the numbers in `DEFAULTS` are choices of that trial and of ours,
and every prior is learned by `learn`.

Shape legend: M points, W weights of the curve (level, slope, bend, smooth residual).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mariotte.errors import FitError
from mariotte.laws.base import Array, Inputs, Point, Series, metric_kind, values
from mariotte.laws.points import is_perplexity
from mariotte.laws.posterior import Quantiles, Standardised
from mariotte.store.record import canonical_json, digest

Scale = Literal["perplexity", "answer", "score"]
"""How damage is measured: ln of a perplexity (or any loss over text), loss of answers in nats, score over chance."""

FORMAT = 1
"""Number of the layout of a file of priors."""

UNKNOWN = "?"
"""The family whose curve is that of all families together: the prior where none is stated or known."""

RECOVERED = " recovered"
"""Ends the name of the prior of series that were trained after the cut."""

CENTRES_S: Array = np.linspace(-4.2, 4.2, 15)
"""Places of the smooth residual's bumps, 0.6 apart: fine enough that their sum is a stationary Gaussian process."""

N_LINE = 3
N_WEIGHTS = N_LINE + len(CENTRES_S)

LOWEST = -4.0
"""Below this x a curve goes on with slope 1: damage falls at least as the ratio does, so that nothing removed is no
damage whatever the bend."""

STRAIGHT: frozenset[str] = frozenset({"depth", "width"})
"""Families whose curves are learned without a bend: few ratios a series."""

_ALIASES: Mapping[str, str] = {"lowrank": "low-rank", "low rank": "low-rank", "low_rank": "low-rank"}


_Any = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The hyper-parameters of one scale.

    Parameters
    ----------
    floor : smallest damage that is told from none, in the metric's unit; a standard error raises it (to twice itself
        for a loss)
    ceiling : largest damage of a loss, nats, where ln of the vocabulary is not known; 0 for none
    shift : added to x, so that level and slope are hardly correlated
    noise : standard deviation of z about a curve; rough_noise that of `STRAIGHT` families
    level, slope, smooth : standard deviations of a series about its family's curve
    length : of the smooth residual, in x
    undamaged : variance added to a point whose damage is below the floor: it says only that damage is small
    keep : a prior learns from losses up to this many times the dense one
    mean, mean_sd : prior of the curve of all families: level, slope, bend
    family_sd : standard deviations of a family about it
    mix : share of the chance-adjusted pruning law in a score's prediction from two points on
    tail : how seldom a series lies far from its family: `SCALES` of the variances above weigh scale to the power of
        minus this
    """

    floor: float
    ceiling: float
    shift: float
    noise: float
    rough_noise: float
    level: float
    slope: float
    smooth: float
    length: float
    undamaged: float
    keep: float
    mean: tuple[float, float, float]
    mean_sd: tuple[float, float, float]
    family_sd: tuple[float, float, float]
    mix: float = 0.0
    tail: float = 0.5


_LOSS = Settings(
    floor=0.008,
    ceiling=10.5,
    shift=0.6,
    noise=0.04,
    rough_noise=0.12,
    level=1.2,
    slope=0.45,
    smooth=0.25,
    length=0.8,
    undamaged=0.5,
    keep=3.0,
    mean=(-1.5, 1.6, 0.0),
    mean_sd=(5.0, 1.0, 0.5),
    family_sd=(2.0, 0.6, 0.12),
)

DEFAULTS: Mapping[str, Settings] = {
    "perplexity": _LOSS,
    "answer": replace(_LOSS, floor=0.02, ceiling=18.0),
    "score": replace(
        _LOSS,
        floor=0.006,
        ceiling=0.0,
        shift=1.0,
        noise=0.1,
        rough_noise=0.1,
        level=1.0,
        slope=0.6,
        smooth=0.2,
        mean=(-1.0, 1.0, 0.0),
        mean_sd=(3.0, math.sqrt(0.5), 0.0),
        family_sd=(1.0, 0.4, 0.0),
        mix=0.3,
    ),
    # Weak: two points nearly decide.
    "recovered": replace(
        _LOSS,
        shift=0.0,
        noise=0.01,
        rough_noise=0.01,
        level=0.08,
        slope=0.26,
        smooth=0.0,
        mean=(0.0, 0.5, 0.0),
        mean_sd=(0.2, 1.0, 0.0),
        family_sd=(0.0, 0.0, 0.0),
        keep=2.0,
    ),
}
"""Frozen: the defaults that the hold-out figures in the documentation belong to."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The prior of a family's curve.

    Parameters
    ----------
    mean : level, slope, bend
    covariance : of these three, of the family's curve and not of series about it
    clusters, series : how many it was learned from (for the unknown family, of all families)
    """

    mean: tuple[float, float, float]
    covariance: tuple[tuple[float, float, float], ...]
    clusters: int
    series: int


@dataclass(frozen=True, kw_only=True)
class Priors:
    """All that the family law knows before a point is measured.

    Parameters
    ----------
    settings : one each for perplexity, answer, score and recovered
    curves : scale to family (with `RECOVERED` where trained after the cut) to its prior
    data_hash : SHA-256 over the points that they were learned from
    calibration : scale to the errors of the law with such priors, each cluster predicted by priors without it
    """

    settings: Mapping[str, Settings]
    curves: Mapping[str, Mapping[str, Curve]]
    data_hash: str
    calibration: Mapping[str, Standardised] = field(default_factory=dict[str, Standardised])

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of everything here."""
        return digest(self.to_dict())

    def to_json(self) -> str:
        """The text of a file of priors; `read` reads it."""
        return json.dumps({"format": FORMAT, "priors": self.to_dict()}, indent=1, ensure_ascii=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them."""
        return {
            "settings": {name: asdict(s) for name, s in self.settings.items()},
            "curves": self._plain_curves(),
            "data_hash": self.data_hash,
            "calibration": {scale: asdict(found) for scale, found in self.calibration.items()},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Priors:
        """What `to_dict` wrote.

        Raises
        ------
        FitError
            When something is missing.
        """

        def triple(x: Sequence[float]) -> tuple[float, float, float]:
            a, b, c = map(float, x)
            return a, b, c

        def curve(c: Mapping[str, Any]) -> Curve:
            return Curve(
                mean=triple(c["mean"]),
                covariance=tuple(triple(row) for row in c["covariance"]),
                clusters=int(c["clusters"]),
                series=int(c["series"]),
            )

        def settings(s: Mapping[str, Any]) -> Settings:
            fields: dict[str, Any] = {k: triple(v) if isinstance(v, list | tuple) else v for k, v in s.items()}  # pyright: ignore[reportUnknownArgumentType]
            return Settings(**fields)

        def calibration(c: Mapping[str, Any]) -> Standardised:
            bins = {
                name: Quantiles(
                    values=tuple(map(float, q["values"])),
                    points=int(q["points"]),
                    clusters=int(q["clusters"]),
                    reach=float(q["reach"]),
                )
                for name, q in c["bins"].items()
            }
            return Standardised(method=c["method"], bins=bins)

        try:
            return cls(
                settings={name: settings(s) for name, s in stored["settings"].items()},
                curves={
                    scale: {family: curve(c) for family, c in found.items()}
                    for scale, found in stored["curves"].items()
                },
                data_hash=str(stored["data_hash"]),
                calibration={scale: calibration(c) for scale, c in stored["calibration"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FitError(
                f"priors are a JSON file written by 'mariotte laws --learn', this is none: {error}"
            ) from error

    def _plain_curves(self) -> dict[str, Any]:
        return {scale: {f: asdict(c) for f, c in found.items()} for scale, found in self.curves.items()}

    def setting(self, scale: Scale, *, recovered: bool) -> Settings:
        """The hyper-parameters of a scale, of its recovered series where these are drawn otherwise."""
        return self.settings["recovered" if recovered and scale != "score" else scale]

    def curve(self, scale: Scale, family: str | None, *, recovered: bool) -> tuple[Curve, bool]:
        """The prior of a family's curve, and whether the family is known."""
        if recovered and scale != "score":
            return self.curves["recovered"][UNKNOWN], True
        found = self.curves[scale]
        name = known_name(family) + (RECOVERED if recovered else "")
        return (found[name], name != UNKNOWN) if name in found else (found[UNKNOWN], False)

    def series_prior(self, scale: Scale, family: str | None, *, recovered: bool) -> tuple[Array, Array]:
        """(W,) and (W, W): mean and covariance of a family's curve, without the spread of series about it."""
        curve, _ = self.curve(scale, family, recovered=recovered)
        mean_W, covariance_WW = np.zeros(N_WEIGHTS), np.zeros((N_WEIGHTS, N_WEIGHTS))
        mean_W[:N_LINE] = curve.mean
        covariance_WW[:N_LINE, :N_LINE] = curve.covariance
        return mean_W, covariance_WW


def known_name(family: str | None) -> str:
    """A family's name as the priors spell it."""
    name = (family or UNKNOWN).strip().lower()
    return _ALIASES.get(name, name)


@functools.lru_cache(maxsize=1024)
def scale_of(metric: str) -> Scale | None:
    """The scale of a metric; None for a speed or a size.

    A loss whose name says only that it is one is over text, as a perplexity is; one that names something else
    ("loss_nats_math", "answer_loss") is the loss of answers, whose curves are steeper.
    """
    kind = metric_kind(metric)
    if kind == "score":
        return "score"
    if kind != "loss":
        return None
    name = metric.lower()
    bare = name in {"loss", "bits_per_byte", "bpb", "nll", "cross_entropy", "log_ppl"}
    return "perplexity" if bare or is_perplexity(metric) or "ppl" in name or "perplexity" in name else "answer"


def spread(settings: Settings) -> Array:
    """(W, W) covariance of a series about its family's curve."""
    bump = settings.smooth**2 * (CENTRES_S[1] - CENTRES_S[0]) / (settings.length * math.sqrt(math.pi / 2))
    return np.diag([settings.level**2, settings.slope**2, 0.0, *[bump] * len(CENTRES_S)])


def abscissa(ratio_M: Array, settings: Settings, scale: Scale, *, recovered: bool) -> Array:
    """(M,) x of ratios; minus infinity where nothing is removed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if recovered and scale != "score":
            return -np.log1p(-ratio_M)
        removed_M = np.where(ratio_M > 0, ratio_M, 0.0)
        if scale == "score":
            return np.log(-np.log1p(-removed_M)) + settings.shift
        return np.log(removed_M / (1.0 - removed_M)) + settings.shift


def design(x_M: Array, settings: Settings) -> Array:
    """(M, W) what the weights multiply."""
    bumps_MS = np.exp(-(((x_M[:, None] - CENTRES_S) / settings.length) ** 2))
    return np.concatenate([np.ones((len(x_M), 1)), x_M[:, None], x_M[:, None] ** 2, bumps_MS], axis=1)


def ceiling(x: Inputs, settings: Settings) -> Array:
    """(M,) the largest damage of a loss: ln of the vocabulary where it is known."""
    return np.where(np.isfinite(x.chance_M), x.chance_M, settings.ceiling)


def margin(x: Inputs) -> tuple[Array, Array]:
    """(M,) chance, 0 where unknown, and the dense score's margin over it."""
    chance_M = np.where(np.isfinite(x.chance_M), x.chance_M, 0.0)
    return chance_M, x.base_M - chance_M


@dataclass(frozen=True, eq=False)
class Drawn:
    """Points on the axes of a scale.

    Parameters
    ----------
    design_MW : what the weights multiply at each
    z_M, variance_M : damage, and the variance of its noise
    """

    design_MW: Array
    z_M: Array
    variance_M: Array


SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Times as large as usual may the variances of one series about its family be: a few series are like no other."""

PAIRED = 0.15
"""Of the standard error of a loss, what is left in its difference from the dense model's on the same text, at most:
measured 0.13 for a rise by 2 % (`mariotte compare` on the testbed), and less for a smaller one."""


def draw(
    x: Inputs, y_M: Array, settings: Settings, scale: Scale, *, recovered: bool, family: str | None = None
) -> Drawn:
    """Measured points on the axes of their scale; the ratio must be positive unless they are recovered."""
    x_M = abscissa(x.ratio_M, settings, scale, recovered=recovered)
    noise = settings.rough_noise if known_name(family) in STRAIGHT else settings.noise
    se_M = np.where(np.isfinite(x.se_M), x.se_M, 0.0) * (1.0 if scale == "score" else PAIRED)
    if recovered and scale != "score":
        z_M = np.log(y_M / x.base_M)
        return Drawn(line_only(x_M), z_M, noise**2 + (se_M / y_M) ** 2)
    if scale == "score":
        chance_M, margin_M = margin(x)
        left_M = np.clip((y_M - chance_M) / margin_M, 0.03, 1.0)
        damage_M = -np.log(left_M)
        floor_M = np.maximum(settings.floor, se_M) / margin_M / left_M
        damaged_M = np.maximum(damage_M, floor_M)
        z_M = np.log(damaged_M)
    else:
        damage_M = y_M - x.base_M
        floor_M = np.maximum(settings.floor, 2 * se_M)
        damaged_M = np.maximum(damage_M, floor_M)
        z_M = np.log(damaged_M / np.maximum(1.0 - damaged_M / ceiling(x, settings), 0.05))
    variance_M = noise**2 + (floor_M / damaged_M) ** 2 + settings.undamaged * (damage_M < floor_M)
    return Drawn(design(x_M, settings), z_M, variance_M)


def line_only(x_M: Array) -> Array:
    """(M, W) the design of a recovered series: level and slope."""
    design_MW = np.zeros((len(x_M), N_WEIGHTS))
    design_MW[:, 0] = 1.0
    design_MW[:, 1] = x_M
    return design_MW


def condition(mean_W: Array, covariance_WW: Array, drawn: Drawn) -> tuple[Array, Array]:
    """(W,) and (W, W): mean and covariance of the weights once these points are known."""
    if not len(drawn.z_M):
        return mean_W, covariance_WW
    cross_WM = covariance_WW @ drawn.design_MW.T
    total_MM = drawn.design_MW @ cross_WM + np.diag(drawn.variance_M)
    gain_MW = np.linalg.solve(total_MM, cross_WM.T)
    found_WW = covariance_WW - cross_WM @ gain_MW
    return mean_W + (drawn.z_M - drawn.design_MW @ mean_W) @ gain_MW, 0.5 * (found_WW + found_WW.T)


def adapted(mean_W: Array, covariance_WW: Array, drawn: Drawn, settings: Settings) -> tuple[Array, Array]:
    """`condition` for one series, which may lie far from its family.

    Its prior is a mixture of Gaussians of one mean, their covariances `SCALES` times `covariance_WW`; the points say
    how much each counts. Mean and covariance are those of the mixture.
    """
    if not len(drawn.z_M):
        return mean_W, covariance_WW
    # On the axes of the covariance between points over their noise all scales are solved at once.
    weight_M = 1 / np.sqrt(drawn.variance_M)
    seen_MW = weight_M[:, None] * drawn.design_MW
    cross_WM = covariance_WW @ seen_MW.T
    sizes_M, axes_MM = np.linalg.eigh(seen_MW @ cross_WM)
    along_WM = cross_WM @ axes_MM
    off_M = axes_MM.T @ (weight_M * (drawn.z_M - drawn.design_MW @ mean_W))
    scales_S = np.array(SCALES)
    whole_SM = 1 + scales_S[:, None] * np.maximum(sizes_M, 0.0)
    logs_S = -0.5 * np.sum(off_M**2 / whole_SM + np.log(whole_SM), axis=1) - settings.tail * np.log(scales_S)
    shares_S = np.exp(logs_S - np.max(logs_S))
    shares_S /= np.sum(shares_S)
    steps_SM = scales_S[:, None] * off_M / whole_SM
    step_M = shares_S @ steps_SM
    apart_SM = steps_SM - step_M
    known_M = shares_S @ (scales_S[:, None] ** 2 / whole_SM)
    between_MM = apart_SM.T @ (shares_S[:, None] * apart_SM) - np.diag(known_M)
    found_WW = float(shares_S @ scales_S) * covariance_WW + along_WM @ between_MM @ along_WM.T
    return mean_W + along_WM @ step_M, 0.5 * (found_WW + found_WW.T)


def information(drawn: Drawn, settings: Settings, columns: int = N_LINE) -> tuple[Array, Array]:
    """(C, C) and (C,): what one series says about its family's curve, as precision and precision times mean."""
    total_MM = drawn.design_MW @ spread(settings) @ drawn.design_MW.T + np.diag(drawn.variance_M)
    line_MC = drawn.design_MW[:, :columns]
    solved = np.linalg.solve(total_MM, np.column_stack([line_MC, drawn.z_M]))
    return line_MC.T @ solved[:, :columns], line_MC.T @ solved[:, columns]


def update(mean_W: Array, covariance_WW: Array, pieces: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """A family's curve once series of it are known, from their `information`; the covariance may be singular."""
    precision_CC, weighted_C = np.zeros((N_LINE, N_LINE)), np.zeros(N_LINE)
    for one_CC, one_C in pieces:
        precision_CC, weighted_C = precision_CC + one_CC, weighted_C + one_C
    line_CC = covariance_WW[:N_LINE, :N_LINE]
    found_CC = np.linalg.solve(np.eye(N_LINE) + line_CC @ precision_CC, line_CC)
    mean, covariance = mean_W.copy(), covariance_WW.copy()
    mean[:N_LINE] += found_CC @ (weighted_C - precision_CC @ mean_W[:N_LINE])
    covariance[:N_LINE, :N_LINE] = 0.5 * (found_CC + found_CC.T)
    return mean, covariance


# Learning


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


FROZEN = Path(__file__).parent / "published" / "family.json"
"""The priors that ship: learned by `learn` from `published.points`."""


@functools.cache
def frozen() -> Priors:
    """The priors that ship with the package."""
    return read(FROZEN)


def read(path: Path) -> Priors:
    """The priors in a file that ``mariotte laws --learn`` wrote.

    Raises
    ------
    FitError
        When there is no file, or it holds something else.
    """
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FitError(f"priors are a JSON file written by 'mariotte laws --learn', {path} is none: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or "priors" not in stored:  # pyright: ignore[reportUnknownMemberType]
        raise FitError(
            f"priors of layout {FORMAT} are written by 'mariotte laws --learn', {path} has none: learn again"
        )
    return Priors.from_dict(cast("dict[str, Any]", stored)["priors"])

"""Fitting a law to points that may be pooled, and saying what the fit is worth."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np

from mariotte import __version__
from mariotte.errors import FitError
from mariotte.laws.base import FALLING, Array, Estimate, Inputs, Law, Point, Series, values
from mariotte.laws.catalogue import find
from mariotte.laws.facts import Coefficient, FitReport
from mariotte.laws.posterior import PosteriorLaw
from mariotte.laws.result import Fit
from mariotte.laws.uncertainty import calibrate
from mariotte.store.record import canonical_json, digest

COVERAGE = 0.95
"""Of the coefficients' intervals."""

STRONG_CORRELATION = 0.95
"""Two estimates more correlated than this cannot be told apart; flagged."""


def fit(law: Law | str, points: Iterable[Point], *, pool: Sequence[Point] = ()) -> Fit:
    """Fit a law to points of one metric, protocol and kind of ratio.

    Parameters
    ----------
    law : a law or its name
    points : in any order; the result does not depend on it
    pool : further points from which intervals are calibrated when `points` are a single cluster

    Raises
    ------
    FitError
        When there are too few points, when they must not be pooled, or when the law cannot describe them.
    UnknownNameError
        When no law has that name.
    """
    law = find(law) if isinstance(law, str) else law
    # Sums of floats depend on their order: a canonical one makes equal data give equal bits.
    plain = [(canonical_json(facts := asdict(p)), facts, p) for p in points]
    plain.sort(key=lambda own: own[0])
    ordered = [p for _, _, p in plain]
    _check(law, ordered)
    x, y_M = Inputs.of(ordered), values(ordered)
    with np.errstate(all="ignore"):  # what overflows is refused below, in words
        estimate = law.estimate(x, y_M)
        found = coefficients(law, estimate)
        residual_sd, uncentred, centred, log_ratio = _goodness(law, estimate, x, y_M)
        correlation, pair = _strongest_correlation(law, estimate)
    numbers = [n for c in found for n in (c.estimate, c.se, c.lo, c.hi)]
    if estimate.search is not None:
        numbers += [estimate.search.gradient, estimate.search.spread]
    numbers += [residual_sd, uncentred, centred, log_ratio, estimate.f_statistic, estimate.condition, correlation]
    if not all(math.isfinite(n) for n in numbers if n is not None):
        raise FitError(
            f"{law.name}: the fit to these {len(ordered)} points is not finite, their values run from "
            f"{np.min(y_M):.3g} to {np.max(y_M):.3g} and ratios from {np.min(x.ratio_M):.3g} to "
            f"{np.max(x.ratio_M):.3g}: leave out the extreme ones"
        )
    first = ordered[0]
    chances = {p.chance for p in ordered}
    remarks = [f"{name} is not identified and was left out: {why}" for name, why in estimate.dropped.items()]
    bayesian = isinstance(law, PosteriorLaw)  # its smooth residual has no intervals, and nobody asks for them
    remarks += [f"{name} has no interval: {why}" for name, why in estimate.given.items() if not bayesian]
    remarks += _searched(law, estimate)
    remarks += law.remarks(estimate, x, first.kind)
    remarks += _pooled(law, ordered)
    remarks += _suspicious(ordered)
    if correlation is not None and correlation > STRONG_CORRELATION:
        remarks.append(f"{pair} are correlated at {correlation:.3f}: neither means much alone")
    for c in found:
        if not bayesian and c.lo is not None and c.hi is not None and c.hi - c.lo > 2 * abs(c.estimate):
            remarks.append(f"the interval of {c.name} is wider than twice its estimate")
    if n_collapsed := sum(not p.before_collapse for p in ordered):
        remarks.append(f"{n_collapsed} of {len(ordered)} points lie beyond collapse and pull the curve all the same")
    n_clusters = len({p.group for p in ordered})
    if not bayesian and estimate.covariance is not None and 1 < n_clusters < len(ordered):
        remarks.append(
            f"standard errors take the {len(ordered)} points as independent; they come from {n_clusters} clusters"
        )
    facts = FitReport(
        law=law.name,
        formula=law.formula,
        metric=first.metric,
        kind=first.kind,
        protocol=first.protocol,
        ratio_kind=first.ratio_kind,
        n_points=len(ordered),
        n_series=len({p.series for p in ordered}),
        n_clusters=n_clusters,
        box={
            name: (float(np.min(column)), float(np.max(column)))
            for name, column in (
                ("ratio", x.ratio_M),
                ("base", x.base_M),
                ("tokens", x.tokens_M),
                ("bits", x.bits_M[np.isfinite(x.bits_M)]),
            )
            if name != "bits" or ("bits" in law.inputs and len(column))
        },
        base=float(np.median(x.base_M)),
        tokens=float(x.tokens_M[0]) if np.ptp(x.tokens_M) == 0.0 else 0.0,
        chance=chances.pop() if len(chances) == 1 else None,
        coefficients=found,
        dof=estimate.dof,
        residual_sd=residual_sd,
        adj_r2_uncentred=uncentred,
        adj_r2_centred=centred,
        r2_log_ratio=log_ratio,
        f_statistic=estimate.f_statistic,
        f_dof=estimate.f_dof,
        condition=estimate.condition,
        max_correlation=correlation,
        remarks=tuple(remarks),
        recipe=estimate.recipe,
        data_hash=digest([facts for _, facts, _ in plain]),
        versions={"mariotte": __version__, "numpy": np.__version__, "python": platform.python_version()},
        params=_median(x.params_M),
        bits=_median(x.bits_M),
        family=families.pop() if len(families := set(x.families)) == 1 else None,
        search=estimate.search,
        recovered=bool(x.recovered_M.any()),
    )
    posterior: tuple[float, ...] | None = None
    if isinstance(law, PosteriorLaw) and estimate.covariance is not None:
        posterior = tuple(estimate.covariance[np.triu_indices(len(law.params))].tolist())
    return Fit(law=law, facts=facts, calibration=calibrate(law, ordered, pool), posterior=posterior)


def _median(column_M: Array) -> float | None:
    """Of the values that are known."""
    known = column_M[np.isfinite(column_M)]
    return float(np.median(known)) if len(known) else None


def _searched(law: Law, estimate: Estimate) -> list[str]:
    """What a reader must know of a search whose starts disagree: its parameters may not be the best ones."""
    search = estimate.search
    if search is None or search.starts < 2:
        return []
    if search.agreeing == 1:
        return [f"only one of {search.starts} starts reached the best fit of {law.name}: another may be better still"]
    if search.spread is not None and search.spread > 0.01:
        return [
            f"{search.agreeing} starts fit equally well with parameters up to {search.spread:.2g} apart "
            "(relative): the data do not tell them from one another"
        ]
    return []


def _pooled(law: Law, points: Sequence[Point]) -> list[str]:
    """What differs between the points and is the same to the law: it draws one curve through all of them."""
    said: list[str] = []
    tokens = [p.tokens for p in points]
    if "tokens" not in law.inputs and min(tokens) < max(tokens):
        said.append(
            f"the law ignores recovery data, which runs from {min(tokens):g} to {max(tokens):g}: "
            "fit each alone with --by series"
        )
    if len(methods := sorted({p.method for p in points})) > 1:
        said.append(f"one curve for {len(methods)} methods ({_some(methods)}): fit each alone with --by method")
    # Recoveries that differ in their tokens alone are what a law of tokens is for (and the first remark otherwise).
    by_tokens: dict[float, set[str]] = {}
    for p in points:
        by_tokens.setdefault(p.tokens, set()).add(p.recovery)
    if recoveries := sorted({r for found in by_tokens.values() if len(found) > 1 for r in found}):
        names = _some([r or "none" for r in recoveries])
        said.append(f"one curve for {len(recoveries)} recoveries ({names}): fit each alone with --by recovery")
    return said


def _suspicious(points: Sequence[Point]) -> list[str]:
    """What looks wrong with the points themselves: repeated, against the direction of their metric, below a guess."""
    said: list[str] = []
    if repeated := len(points) - len(set(points)):
        said.append(f"{repeated} of {len(points)} points repeat another and count again: give each once")
    falls = points[0].kind in FALLING
    curves: dict[Series, dict[float, list[float]]] = {}
    for p in points:
        curves.setdefault(p.series, {}).setdefault(p.ratio, []).append(p.value)
    steps = against = 0
    for curve in curves.values():
        means = [float(np.mean(curve[ratio])) for ratio in sorted(curve)]
        steps += len(means) - 1
        # Two percent: less is the noise of an evaluation.
        against += sum((b > a * 1.02) if falls else (b < a / 1.02) for a, b in itertools.pairwise(means))
    if against:
        said.append(
            f"{points[0].metric} {'rises' if falls else 'falls'} in {against} of {steps} steps to a larger ratio, by "
            "more than 2 %: a law that goes one way describes it badly"
        )
    if below := sum(p.kind == "score" and p.chance is not None and p.value < p.chance for p in points):
        said.append(f"{below} of {len(points)} scores are below chance, as of a collapsed model")
    return said


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _check(law: Law, points: Sequence[Point]) -> None:
    if not points:
        raise FitError(f"{law.name} cannot be fitted to no points: choose a metric and filters that leave some")
    for name, label in (("metric", "metrics"), ("protocol", "protocols"), ("ratio_kind", "kinds of ratio")):
        found = sorted({str(getattr(p, name)) for p in points})
        if len(found) > 1:
            shown = "; ".join(repr(f) for f in found[:3]) + ("; ..." if len(found) > 3 else "")
            raise FitError(
                f"points of {len(found)} {label} are never pooled ({shown}): keep one with --where {name}=..., "
                f"or fit each alone with --by {name}"
            )
    kind = points[0].kind
    if kind not in law.metric_kinds:
        raise FitError(
            f"{law.name} describes {' and '.join(law.metric_kinds)} metrics, "
            f"{points[0].metric!r} is a {kind}: choose another law"
        )


def coefficients(law: Law, estimate: Estimate) -> tuple[Coefficient, ...]:
    """The parameters with their errors and intervals."""
    from scipy.special import stdtrit  # the t quantile alone; scipy.stats costs ten times its import

    found: list[Coefficient] = []
    for i, (param, value) in enumerate(zip(law.params, map(float, estimate.theta), strict=True)):
        se = lo = hi = None
        if estimate.covariance is not None and param.name not in estimate.dropped and param.name not in estimate.given:
            spread = float(np.sqrt(estimate.covariance[i, i]))
            # The spread of a posterior is known and not estimated from residuals: its quantile is the normal one.
            dof = math.inf if isinstance(law, PosteriorLaw) else estimate.dof
            half = float(stdtrit(dof, 0.5 + COVERAGE / 2)) * spread
            # A parameter estimated through its logarithm: the interval is exact there, the error by the delta method.
            se = value * spread if param.log else spread
            lo, hi = (value * np.exp(-half), value * np.exp(half)) if param.log else (value - half, value + half)
            lo, hi = float(lo), float(hi)
        found.append(
            Coefficient(
                name=param.name, estimate=value, se=se, lo=lo, hi=hi, dropped=estimate.dropped.get(param.name, "")
            )
        )
    return tuple(found)


def _goodness(
    law: Law, estimate: Estimate, x: Inputs, y_M: Array
) -> tuple[float | None, float | None, float | None, float | None]:
    """Residual s.d., adjusted R² uncentred and centred (on the fitted scale), centred R² of ln(L/L0)."""
    if estimate.dof <= 0:
        return None, None, None, None
    predicted_M = law.f(estimate.theta, x)
    target_M, fitted_M = (np.log(y_M), np.log(predicted_M)) if law.log_link else (y_M, predicted_M)
    n = len(y_M)
    ssr = float(np.sum((target_M - fitted_M) ** 2))

    def adjusted(total: float, dof: int) -> float | None:
        return 1.0 - (ssr / estimate.dof) / (total / dof) if total > 0 else None

    log_ratio: float | None = None
    if np.all(y_M > 0) and np.all(predicted_M > 0):
        damage_M = np.log(y_M) - np.log(x.base_M)
        total = float(np.sum((damage_M - np.mean(damage_M)) ** 2))
        if total > 0:
            log_ratio = 1.0 - float(np.sum((np.log(y_M) - np.log(predicted_M)) ** 2)) / total
    return (
        float(np.sqrt(ssr / estimate.dof)),
        adjusted(float(np.sum(target_M**2)), n),
        adjusted(float(np.sum((target_M - np.mean(target_M)) ** 2)), n - 1),
        log_ratio,
    )


def _strongest_correlation(law: Law, estimate: Estimate) -> tuple[float | None, str]:
    kept = [i for i, p in enumerate(law.params) if p.name not in {*estimate.dropped, *estimate.given}]
    if estimate.covariance is None or len(kept) < 2:
        return None, ""
    covariance = estimate.covariance[np.ix_(kept, kept)]
    sd = np.sqrt(np.diag(covariance))
    if not np.all(sd > 0):
        return None, ""  # an exact fit has no errors to correlate
    correlation = np.abs(covariance / np.outer(sd, sd)) - np.eye(len(kept))
    i, j = np.unravel_index(int(np.argmax(correlation)), correlation.shape)
    return float(correlation[i, j]), f"{law.params[kept[i]].name} and {law.params[kept[j]].name}"

"""The family law: every pruning family has a curve, and a model's own points tilt and shift it."""

from __future__ import annotations

import functools
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws import axes, priors
from mariotte.laws.axes import CENTRES_S, N_LINE, N_WEIGHTS, Scale
from mariotte.laws.base import Array, Estimate, Inputs, Kind, Param
from mariotte.laws.posterior import PosteriorLaw, Standardised
from mariotte.laws.priors import Priors

__all__ = ["Family"]

_EXPONENT, _SHARE, _RECOVERED = N_WEIGHTS, N_WEIGHTS + 1, N_WEIGHTS + 2
_LARGE = 700.0
"""Exponents are kept within this: beyond it exp overflows."""

_LEAST_MARGIN = 0.05
"""A dense score nearer to chance than this cannot fall; no law describes it."""


class Family(PosteriorLaw):
    """Damage against the odds of what is removed, both as logarithms, about the curve of the pruning family.

    A Gaussian prior, learned from published series, says how the family behaves; the points of a series move it, each
    the less the smaller its damage. With no point it is the family's curve, with many nearly the data. Scores and
    series that were trained after the cut have axes of their own (see `mariotte.laws.axes`).

    Parameters
    ----------
    known : priors; None for those that ship with the package
    """

    name: ClassVar[str] = "family"
    formula: ClassVar[str] = "ln damage = level + slope · ln(r/(1 - r)) + bend · ln(r/(1 - r))² + smooth residual"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio", "chance", "family", "recovery")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss", "score")
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "slope"
    log_link: ClassVar[bool] = False
    defects: ClassVar[tuple[str, ...]] = (
        "Knows only families of which series were published; any other gets the curve of all of them, a wide one.",
        "Its priors come from few clusters: one for low-rank, about five for depth and for width.",
        "After recovery training it is the pruning law with weak priors, and has that law's defects.",
        "Does not know how much recovery data there were.",
    )

    def __init__(self, known: Priors | None = None) -> None:
        self._known = known

    @property
    def known(self) -> Priors:
        """The priors that it starts from."""
        return priors.frozen() if self._known is None else self._known

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Family) and (self._known is other._known or self.known.hash == other.known.hash)

    @override
    def __hash__(self) -> int:
        return hash((type(self), "" if self._known is None else self._known.hash))

    @functools.cached_property
    def params(self) -> tuple[Param, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Weights of the curve, then the score's exponent, its share, and whether the points were recovered."""
        level, slope, bend = self.known.curve("perplexity", None, recovered=False)[0].mean
        return (
            Param("level", typical=level),
            Param("slope", typical=slope),
            Param("bend", typical=bend),
            *(Param(f"smooth {centre:+.1f}", typical=0.0) for centre in CENTRES_S),
            Param("exponent", typical=0.0),
            Param("share", typical=0.0),
            Param("recovered", typical=0.0),
        )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        if not len(x.ratio_M):
            return np.zeros(0)
        scale, recovered = _scale(x), theta[_RECOVERED] > 0.5
        z_M = self._z(theta, x, scale, recovered=recovered)
        value_M = _value(z_M, x, self.known.setting(scale, recovered=recovered), scale, recovered=recovered)
        if scale == "score" and theta[_SHARE] > 0:
            value_M = (1.0 - theta[_SHARE]) * value_M + theta[_SHARE] * _adjusted(theta[_EXPONENT], x)
        return value_M

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        jac_MP = np.zeros((len(x.ratio_M), len(theta)))
        if not len(x.ratio_M):
            return jac_MP
        scale, recovered = _scale(x), bool(theta[_RECOVERED] > 0.5)
        settings = self.known.setting(scale, recovered=recovered)
        z_M = self._z(theta, x, scale, recovered=recovered)
        share = theta[_SHARE] if scale == "score" else 0.0
        slope_M = (1.0 - share) * _slope(z_M, x, settings, scale, recovered=recovered)
        rows_MW, _ = self._rows(x, scale, recovered=recovered)
        jac_MP[:, :N_WEIGHTS] = np.where(slope_M[:, None] == 0.0, 0.0, slope_M[:, None] * rows_MW)
        if scale == "score":
            chance_M, _ = axes.margin(x)
            adjusted_M = _adjusted(theta[_EXPONENT], x)
            jac_MP[:, _EXPONENT] = share * (adjusted_M - chance_M) * np.log1p(-x.ratio_M)
            jac_MP[:, _SHARE] = adjusted_M - _value(z_M, x, settings, scale, recovered=recovered)
        return jac_MP

    @override
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        scale = _scale(x)
        recovered = bool(x.recovered_M.any())
        if recovered and not x.recovered_M.all():
            raise FitError(
                f"{self.name} draws one curve and has other axes after recovery, got {int(x.recovered_M.sum())} "
                f"recovered points of {len(y_M)}: fit each alone with --by recovery"
            )
        if not (np.all(np.isfinite(y_M)) and np.all(x.base_M > 0)):
            raise FitError(f"{self.name} needs finite values and positive dense ones: leave the others out")
        if scale == "score":
            self._check_scores(x, y_M)
        elif recovered and not np.all(y_M > 0):
            raise FitError(
                f"{self.name} takes logarithms of recovered losses, got {float(np.min(y_M)):g}: leave such points out"
            )
        return self._posterior(x, y_M, x, scale, recovered=recovered)

    @override
    def before(self, x: Inputs) -> Estimate:
        """What is known of such a series before any point of it is: the curve of its family.

        Raises
        ------
        FitError
            When it is no series of a loss or a score.
        """
        none = _some(x, np.zeros(len(x.ratio_M), dtype=np.bool_))
        return self._posterior(none, np.zeros(0), x, _scale(x), recovered=bool(x.recovered_M.any()))

    def _posterior(self, x: Inputs, y_M: Array, like: Inputs, scale: Scale, *, recovered: bool) -> Estimate:
        """The weights once these points are known, for a series of the family of `like`."""
        family = _family(like)
        settings = self.known.setting(scale, recovered=recovered)
        mean_W, covariance_WW = self.known.series_prior(scale, family, recovered=recovered)
        numbers = sorted(set(x.series_M.tolist()))
        informative_M = np.ones(len(y_M), dtype=np.bool_) if recovered and scale != "score" else x.ratio_M > 0
        if len(numbers) > 1:
            # Several curves of one kind: the family's curve as they have it, for a series that is not among them.
            pieces: list[tuple[Array, Array]] = []
            for number in numbers:
                own_M = (x.series_M == number) & informative_M
                if own_M.any():
                    drawn = axes.draw(_some(x, own_M), y_M[own_M], settings, scale, recovered=recovered, family=family)
                    pieces.append(axes.information(drawn, settings))
            mean_W, covariance_WW = axes.update(mean_W, covariance_WW, pieces)
            covariance_WW = covariance_WW + axes.spread(settings)
        else:
            drawn = axes.draw(
                _some(x, informative_M), y_M[informative_M], settings, scale, recovered=recovered, family=family
            )
            mean_W, covariance_WW = axes.adapted(mean_W, covariance_WW + axes.spread(settings), drawn, settings)
        exponent, share = 0.0, 0.0
        if scale == "score" and np.count_nonzero(informative_M) >= 2:
            exponent, share = _exponent(_some(x, informative_M), y_M[informative_M]), settings.mix
        n_params = N_WEIGHTS + 3
        covariance_PP = np.zeros((n_params, n_params))
        covariance_PP[:N_WEIGHTS, :N_WEIGHTS] = covariance_WW
        why = "a weight of the smooth residual, or a setting"
        eigenvalues = np.linalg.eigvalsh(covariance_WW[:2, :2])
        return Estimate(
            theta=np.array([*mean_W, exponent, share, float(recovered)]),
            covariance=covariance_PP,
            dof=max(len(y_M) - N_LINE, 0),
            dropped={},
            given={p.name: why for p in self.params[N_LINE:]},
            condition=float(np.sqrt(eigenvalues[-1] / eigenvalues[0])),
            recipe=(
                f"posterior mean of a Gaussian prior of the family {family or 'unknown'} on the scale {scale}"
                f"{' after recovery' if recovered else ''}, points weighted by their damage; "
                f"priors {self.known.hash[:12]}"
            ),
        )

    @override
    def deviation(self, theta: Array, covariance_PP: Array, x: Inputs) -> Array:
        """(M,) standard deviation of a measurement about the curve, in z, before any calibration."""
        scale, recovered = _scale(x), bool(theta[_RECOVERED] > 0.5)
        settings = self.known.setting(scale, recovered=recovered)
        rows_MW, _ = self._rows(x, scale, recovered=recovered)
        weights_WW = covariance_PP[:N_WEIGHTS, :N_WEIGHTS]
        variance_M = np.maximum(np.einsum("ij,jk,ik->i", rows_MW, weights_WW, rows_MW), 0.0)
        rough = axes.known_name(_family(x)) in axes.STRAIGHT
        variance_M = variance_M + (settings.rough_noise if rough else settings.noise) ** 2
        if scale != "score" and not recovered:
            damage_M = np.maximum(self.f(theta, x) - x.base_M, 1e-12)
            variance_M = variance_M + np.minimum((settings.floor / damage_M) ** 2, 1.0)
        return np.sqrt(variance_M)

    @override
    def shifted(self, theta: Array, x: Inputs, by_M: Array, deviation_M: Array) -> Array:
        """(M,) the curve with z moved by that many standard deviations: the ends of an interval."""
        scale, recovered = _scale(x), bool(theta[_RECOVERED] > 0.5)
        settings = self.known.setting(scale, recovered=recovered)
        z_M = self._z(theta, x, scale, recovered=recovered)
        if scale == "score":
            # On z the interval of a score near the dense one would be empty: its spread becomes one of the score.
            slope_M = _slope(z_M, x, settings, scale, recovered=recovered)
            return self.f(theta, x) - by_M * np.sqrt(0.01**2 + (deviation_M * slope_M) ** 2)
        moved_M = _value(z_M + by_M * deviation_M, x, settings, scale, recovered=recovered)
        if recovered:
            return moved_M
        # A damage below the floor is no different from none, or from a gain of as much.
        nothing_M = (by_M < 0) & (moved_M - x.base_M <= settings.floor)
        return np.where(nothing_M, np.minimum(moved_M, x.base_M - settings.floor), moved_M)

    @override
    def missed_by(self, theta: Array, covariance_PP: Array, x: Inputs, y_M: Array) -> Array:
        scale, recovered = _scale(x), bool(theta[_RECOVERED] > 0.5)
        settings = self.known.setting(scale, recovered=recovered)
        deviation_M = self.deviation(theta, covariance_PP, x)
        z_M = self._z(theta, x, scale, recovered=recovered)
        if scale == "score":
            slope_M = _slope(z_M, x, settings, scale, recovered=recovered)
            return np.abs(y_M - self.f(theta, x)) / np.sqrt(0.01**2 + (deviation_M * slope_M) ** 2)
        if recovered:
            return np.abs(np.log(y_M / x.base_M) - z_M) / deviation_M
        damage_M, ceiling_M = y_M - x.base_M, axes.ceiling(x, settings)
        seen_M = np.maximum(damage_M, settings.floor)
        with np.errstate(divide="ignore", invalid="ignore"):
            measured_M = np.where(seen_M < ceiling_M, np.log(seen_M / (1.0 - seen_M / ceiling_M)), np.inf)
        # Below the floor the interval holds a value as soon as its lower end says that nothing is damaged.
        floor_M = np.log(settings.floor / (1.0 - settings.floor / ceiling_M))
        off_M = np.where(damage_M > settings.floor, np.abs(measured_M - z_M), np.maximum(z_M - floor_M, 0.0))
        return np.where(damage_M < -settings.floor, np.inf, off_M / deviation_M)

    @override
    def standardised(self, metric: str) -> Standardised | str:
        scale = axes.scale_of(metric)
        if scale is not None and scale in self.known.calibration:
            return self.known.calibration[scale]
        if not self.known.calibration:
            return "these priors were learned without a calibration"
        return f"too few series of the scale {scale} were held out to say how far the law errs on another"

    @override
    def remarks(self, estimate: Estimate, x: Inputs, kind: Kind) -> list[str]:
        del kind  # the scale says more
        said: list[str] = []
        scale, recovered = _scale(x), bool(estimate.theta[_RECOVERED] > 0.5)
        families = {f for f in x.families if f is not None}
        _, known = self.known.curve(scale, _family(x), recovered=recovered)
        if len(families) > 1:
            said.append(f"one curve for {len(families)} families: it starts from that of all families together")
        elif not known:
            why = (
                f"{families.pop()!r} has no published series on this scale" if families else "the points say no family"
            )
            said.append(f"{why}: it starts from the curve of all families")
        if scale == "score" and not np.all(np.isfinite(x.chance_M)):
            said.append("the score of a guesser is unknown and counts as 0")
        if len(set(x.series_M.tolist())) > 1:
            said.append("several series: the curve is that of one more series of their kind")
        elif np.count_nonzero(x.ratio_M > 0) < 2:
            said.append("fewer than two points: mostly the family's curve")
        return said

    def _check_scores(self, x: Inputs, y_M: Array) -> None:
        chance_M, margin_M = axes.margin(x)
        if np.any(margin_M < _LEAST_MARGIN):
            worst = int(np.argmin(margin_M))
            raise FitError(
                f"{self.name}: a dense score of {x.base_M[worst]:.3g} is within {_LEAST_MARGIN:g} of chance "
                f"({chance_M[worst]:.3g}) and cannot fall: choose another metric"
            )
        se_M = np.where(np.isfinite(x.se_M), x.se_M, 0.01)
        if (n := int(np.count_nonzero(y_M > x.base_M + 2 * se_M))) >= 2:
            raise FitError(
                f"{self.name}: {n} scores are above the dense one by more than two standard errors, so that the metric "
                "does not fall with the ratio: choose another metric"
            )

    def _rows(self, x: Inputs, scale: Scale, *, recovered: bool) -> tuple[Array, Array]:
        """(M, W) the design at the ratios, at `LOWEST` below it, and (M,) how far below it they are."""
        settings = self.known.setting(scale, recovered=recovered)
        x_M = axes.abscissa(x.ratio_M, settings, scale, recovered=recovered)
        if recovered and scale != "score":
            return axes.line_only(x_M), np.zeros_like(x_M)
        drawn_M = np.maximum(x_M, axes.LOWEST)
        return axes.design(drawn_M, settings), x_M - drawn_M

    def _z(self, theta: Array, x: Inputs, scale: Scale, *, recovered: bool) -> Array:
        rows_MW, beyond_M = self._rows(x, scale, recovered=recovered)
        return np.clip(rows_MW @ theta[:N_WEIGHTS] + beyond_M, -_LARGE, _LARGE)


def _scale(x: Inputs) -> Scale:
    found: set[Scale | None] = {axes.scale_of(metric) for metric in set(x.metrics)}
    scale = found.pop() if len(found) == 1 else None
    if scale is None:
        raise FitError(f"family describes one loss or score, got {', '.join(sorted(set(x.metrics)))}: keep one metric")
    return scale


def _family(x: Inputs) -> str | None:
    """The one family of all points; None where none is stated or there are several."""
    found = set(x.families)
    return found.pop() if len(found) == 1 else None


def _some(x: Inputs, kept_M: np.ndarray) -> Inputs:
    """The inputs of some of the points."""
    where = np.flatnonzero(kept_M)
    return Inputs(
        x.base_M[where],
        x.ratio_M[where],
        x.tokens_M[where],
        x.params_M[where],
        x.bits_M[where],
        x.chance_M[where],
        x.se_M[where],
        families=tuple(x.families[i] for i in where),
        metrics=tuple(x.metrics[i] for i in where),
        recovered_M=x.recovered_M[where],
        series_M=x.series_M[where],
    )


def _value(z_M: Array, x: Inputs, settings: axes.Settings, scale: Scale, *, recovered: bool) -> Array:
    """(M,) the metric at a damage."""
    if scale == "score":
        chance_M, margin_M = axes.margin(x)
        return chance_M + margin_M * np.exp(-np.exp(np.clip(z_M, -_LARGE, 50.0)))
    if recovered:
        return x.base_M * np.exp(np.clip(z_M, -_LARGE, _LARGE))
    return x.base_M + 1.0 / (np.exp(-np.clip(z_M, -_LARGE, _LARGE)) + 1.0 / axes.ceiling(x, settings))


def _slope(z_M: Array, x: Inputs, settings: axes.Settings, scale: Scale, *, recovered: bool) -> Array:
    """(M,) the derivative of `_value` with respect to z."""
    if scale == "score":
        _, margin_M = axes.margin(x)
        hazard_M = np.exp(np.clip(z_M, -_LARGE, 50.0))
        return -margin_M * hazard_M * np.exp(-hazard_M)
    if recovered:
        return x.base_M * np.exp(z_M)
    damage_M = 1.0 / (np.exp(-z_M) + 1.0 / axes.ceiling(x, settings))
    return damage_M**2 * np.exp(-z_M)


def _adjusted(exponent: float, x: Inputs) -> Array:
    """(M,) the pruning law of the margin over chance."""
    chance_M, margin_M = axes.margin(x)
    return chance_M + margin_M * (1.0 - x.ratio_M) ** exponent


def _exponent(x: Inputs, y_M: Array) -> float:
    """Of the pruning law of the margin over chance, by least squares of its logarithm through the dense value."""
    chance_M, margin_M = axes.margin(x)
    kept_M = np.log1p(-x.ratio_M)
    left_M = np.log(np.clip((y_M - chance_M) / margin_M, 0.02, 2.0))
    return max(float(kept_M @ left_M) / float(kept_M @ kept_M), 0.0)

"""Axes on which a curve of damage is nearly a straight line, and what points there say of it.

Damage is drawn against the ratio, z over x:

* a loss: z is the logarithm of the damage in nats, corrected for its ceiling, and x the logarithm of the odds
  r/(1 - r);
* a score: z is ln(-ln f) of the share f of the dense margin over chance that is left, and x is ln(-ln(1 - r)), on
  which a line of slope 1 is the pruning law with its chance put right;
* a loss after recovery training: z is ln(L/L0) and x is -ln(1 - r), the pruning law itself, as the dense model is no
  longer the anchor.

Every pruning family has a curve there, a Gaussian with a mean and a covariance; a series departs from it by a level, a
slope and a smooth residual, Gaussians too. So all is one linear solve, here and in the law.

Shape legend: M points, W weights of the curve (level, slope, bend, smooth residual), C those of its line, S scales or
bumps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mariotte.laws.base import Array, Inputs, metric_kind
from mariotte.laws.points import is_perplexity

Scale = Literal["perplexity", "answer", "score"]
"""How damage is measured: ln of a perplexity (or any loss over text), loss of answers in nats, score over chance."""

CENTRES_S: Array = np.linspace(-4.2, 4.2, 15)
"""Places of the smooth residual's bumps, 0.6 apart: fine enough that their sum is a stationary Gaussian process."""

N_LINE = 3
N_WEIGHTS = N_LINE + len(CENTRES_S)

LOWEST = -4.0
"""Below this x a curve goes on with slope 1: damage falls at least as the ratio does, so that nothing removed is no
damage whatever the bend."""

STRAIGHT: frozenset[str] = frozenset({"depth", "width"})
"""Families whose curves are learned without a bend: few ratios a series."""

UNKNOWN = "?"
"""The family whose curve is that of all families together: the prior where none is stated or known."""

_ALIASES: Mapping[str, str] = {"lowrank": "low-rank", "low rank": "low-rank", "low_rank": "low-rank"}


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

r"""Curves of damage over the amount of a cut, learned from other models and bent to the measured points of this one.

The one place where a plan predicts; it knows nothing of chains, budgets and stores.

The damage of a loss is d = L - L0 in nats; of a score d = -ln((s - chance) / (s0 - chance)). Against
x = ln(a / (1 - a)) + .8, with a the share that a cut removes in its own unit, the logarithm of the damage is nearly a
straight line with a bend. Level, slope and bend differ between methods, level and slope between models. Both are
learned from the pool: a method's mean by Bayesian least squares (level and slope move with the logarithm of the model's
parameters), the spread between models as a Gaussian process whose scales maximise the likelihood of the pool. A model
that is fragile under one cut is so under another: a share of the spread is common to all methods of a model, so that a
point of one method tells of the others. A new model's points condition the process; with none the answer is the
method's mean with the whole spread between models.

Shapes: M points, Q questions, P coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mariotte.errors import FitError

Array = NDArray[np.float64]

CEILING = 10.5
"""Damage of a loss at which the curve saturates, nats: about that of a model that is surer of nonsense than a guess."""

RESOLUTION: Mapping[str, float] = {"loss": 0.002, "score": 0.02}
"""Damage below which a point says only that the damage is small. Both values are of the same text, so that their
difference is far surer than either."""

MILD = 0.3
"""Expected damage up to which intervals are calibrated: of the dense loss, or of the logarithm of a score."""

NEAR_SIZE = 3.0
"""How many times larger or smaller than the pool's a model may be for its size to count; beyond, it counts as that."""

MOST_SHOTS = 2
"""Points on a curve that widths of intervals distinguish; with more they are as with so many."""

COLUMNS = 5
"""Coefficients of a method's mean: level, slope, bend, and how level and slope move with the logarithm of the model's
parameters: larger models bear mild cuts better, and then fall more steeply."""

_CENTRE = 0.8
_REACH = 0.5  # of the smooth part, in x
_PRIOR_MEAN = np.array([-1.5, 1.6, 0.0, -0.3, 0.0])
_PRIOR_SD = np.array([3.0, 1.0, 0.3, 0.5, 0.6])
# What larger models bear better they do under all methods: six or seven sizes hardly tell methods apart in it.
_PRIOR_COMMON = np.array([0.0, 0.0, 0.0, 0.9, 0.9])


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured cut.

    Parameters
    ----------
    model, params : which model, and its parameters
    method : which curve of it
    amount : the share removed in the method's own unit, in (0, 1)
    base, value : of the dense model and of this one
    se : standard error of the difference, None where unknown
    """

    model: str
    params: float
    method: str
    amount: float
    base: float
    value: float
    se: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How values of a metric and damages become one another.

    Parameters
    ----------
    kind : loss or score
    chance : of a guesser; nothing for a loss
    """

    kind: str
    chance: float = 0.0

    @property
    def resolution(self) -> float:
        """Damage below which a point says only that the damage is small."""
        return RESOLUTION[self.kind]

    def damage(self, base: float, value: float) -> float:
        """What was lost; below 0 for a gain."""
        if self.kind == "loss":
            return value - base
        if base - self.chance < 0.05:
            raise FitError(
                f"a score must lie above chance by 0.05 to predict its fall, got {base:.3g} with chance "
                f"{self.chance:.3g}: plan by another metric"
            )
        return -math.log(min(max((value - self.chance) / (base - self.chance), 0.03), 1.5))

    def value(self, base: float, damage: float) -> float:
        """The value after a damage."""
        if self.kind == "loss":
            return base + damage
        return self.chance + (base - self.chance) * math.exp(-damage)

    def logarithm(self, damage: float) -> float:
        """The damage as the process sees it."""
        return self.ceiled(max(damage, self.resolution))

    def ceiled(self, damage: float) -> float:
        """The logarithm of a positive damage, however small, with the ceiling taken out."""
        return math.log(damage if self.kind == "score" else damage / max(1 - damage / CEILING, 0.05))

    def damage_of(self, z: Array) -> Array:
        """The damage where the process says `z`."""
        d = np.exp(np.clip(z, -50, 50))
        return d if self.kind == "score" else d / (1 + d / CEILING)

    def noise(self, damage: float, se: float | None, jitter: float) -> float:
        """Variance of the logarithm of a measured damage."""
        e = max(self.resolution, 2 * (se or 0.0))
        return jitter**2 + (e / max(damage, e)) ** 2 + (0.5 if damage < e else 0.0)


@dataclass(frozen=True)
class Spread:
    """How models differ, on the scale of the logarithm of damage.

    Parameters
    ----------
    level, slope : standard deviations between models
    smooth : of a smooth departure along a curve
    jitter : of each point
    common : share of level and slope that all methods of a model have in common
    pivot : the place, in x, where slopes turn: models that differ at mild amounts may agree at large ones
    """

    level: float = 0.8
    slope: float = 0.3
    smooth: float = 0.3
    jitter: float = 0.15
    common: float = 0.4
    pivot: float = 0.0


@dataclass(frozen=True, eq=False)
class _Points:
    """Points of one model, as arrays."""

    x_M: Array
    z_M: Array
    method_M: NDArray[np.int64]
    size_M: Array
    damage_M: Array
    se: tuple[float | None, ...]

    @cached_property
    def own(self) -> NDArray[np.bool_]:
        return self.method_M[:, None] == self.method_M[None, :]


def _design(x_M: Array, method_M: NDArray[np.int64], size_M: Array, methods: int) -> Array:
    """(M, P) with a block of columns a method."""
    basis_MC = np.stack([np.ones_like(x_M), x_M, x_M**2, size_M, size_M * x_M], axis=1)
    design = np.zeros((len(x_M), COLUMNS * methods))
    for column in range(COLUMNS):
        design[np.arange(len(x_M)), COLUMNS * method_M + column] = basis_MC[:, column]
    return design


def _covariance(spread: Spread, x_M: Array, x_Q: Array, own_MQ: NDArray[np.bool_]) -> Array:
    """(M, Q) of the same model's curves at two sets of places."""
    line = spread.level**2 + spread.slope**2 * np.outer(x_M - spread.pivot, x_Q - spread.pivot)
    shared = spread.common + (1 - spread.common) * own_MQ
    smooth = spread.smooth**2 * np.exp(-0.5 * ((x_M[:, None] - x_Q[None, :]) / _REACH) ** 2)
    return line * shared + smooth * own_MQ


@dataclass(frozen=True, eq=False)
class Posterior:
    """What is believed of the logarithm of damage at Q places of one model.

    Parameters
    ----------
    mean_Q, covariance_QQ : of the curve
    jitter : standard deviation of a point around its curve
    """

    mean_Q: Array
    covariance_QQ: Array
    jitter: float

    @property
    def sd(self) -> Array:
        """Of a point that would be measured there, without the resolution of the measure."""
        return np.sqrt(np.maximum(np.diag(self.covariance_QQ), 0) + self.jitter**2)

    def given(self, place: int, noise: float) -> tuple[Array, Array]:
        """How a measurement at one place would move the means (per unit of surprise), and the variances left."""
        column_Q = self.covariance_QQ[:, place]
        gain_Q = column_Q / (self.covariance_QQ[place, place] + noise)
        return gain_Q, np.maximum(np.diag(self.covariance_QQ) - gain_Q * column_Q, 0.0)


@dataclass(frozen=True, eq=False)
class Curves:
    """What a pool teaches of the curves of any model.

    Parameters
    ----------
    scale : how values become damages
    methods : names of the curves, in the order of the coefficients
    spread : between models
    size : mean logarithm of the parameters of the pool's models
    sizes : parameters of the smallest and of the largest of them
    models : of the pool
    coefficients, covariance : of the methods' means, (P,) and (P, P)
    inflation : by shots (0, 1, and 2 or more) and level: how many standard deviations a held-out interval needed
    clusters : models on which `inflation` was measured
    """

    scale: Scale
    methods: tuple[str, ...]
    spread: Spread
    size: float
    sizes: tuple[float, float]
    models: tuple[str, ...]
    coefficients: Array
    covariance: Array
    inflation: Mapping[tuple[int, float], float] = field(default_factory=lambda: dict[tuple[int, float], float]())
    clusters: int = 0

    def posterior(self, params: float, questions: Sequence[tuple[str, float]], own: Sequence[Sample] = ()) -> Posterior:
        """What is believed of a model's curves.

        Parameters
        ----------
        params : of the dense model
        questions : methods and amounts
        own : measured points of this very model

        Raises
        ------
        FitError
            For a method of which neither the pool nor the model has a point.
        """
        index = {name: i for i, name in enumerate(self.methods)}
        if strange := [name for name, _ in questions if name not in index]:
            raise FitError(f"no curve of {strange[0]!r} is known: known are {', '.join(self.methods)}")
        x_Q = _places([amount for _, amount in questions])
        method_Q = np.array([index[name] for name, _ in questions], dtype=np.int64)
        params = min(max(params, self.sizes[0] / NEAR_SIZE), self.sizes[1] * NEAR_SIZE)
        size = math.log(params) - self.size
        asked_QP = _design(x_Q, method_Q, np.full_like(x_Q, size), len(self.methods))
        mean_Q = asked_QP @ self.coefficients
        covariance = asked_QP @ self.covariance @ asked_QP.T
        covariance += _covariance(self.spread, x_Q, x_Q, method_Q[:, None] == method_Q[None, :])
        known = [replace(sample, params=params) for sample in own if sample.method in index]
        if not known:
            return Posterior(mean_Q, covariance, self.spread.jitter)
        points = _points(known, index, self.scale, self.size)
        seen_MP = _design(points.x_M, points.method_M, points.size_M, len(self.methods))
        prior_MM = seen_MP @ self.covariance @ seen_MP.T + _covariance(self.spread, points.x_M, points.x_M, points.own)
        noise_M = _noise(points, self.scale, self.spread)
        cross_QM = asked_QP @ self.covariance @ seen_MP.T + _covariance(
            self.spread, x_Q, points.x_M, method_Q[:, None] == points.method_M[None, :]
        )
        solved = np.linalg.solve(prior_MM + np.diag(noise_M), cross_QM.T).T
        mean_Q = mean_Q + solved @ (points.z_M - seen_MP @ self.coefficients)
        return Posterior(mean_Q, covariance - solved @ cross_QM.T, self.spread.jitter)

    def widening(self, shots: int, level: float) -> float:
        """Standard deviations on either side of an interval: as held-out models needed, else the normal's."""
        normal = NormalDist().inv_cdf(0.5 + level / 2)
        return self.inflation.get((min(shots, MOST_SHOTS), level), normal)


def _places(amounts: Sequence[float]) -> Array:
    a = np.clip(np.asarray(amounts, dtype=np.float64), 1e-3, 1 - 1e-3)
    return np.log(a / (1 - a)) + _CENTRE


def _points(samples: Sequence[Sample], index: Mapping[str, int], scale: Scale, size: float) -> _Points:
    damages = [scale.damage(s.base, s.value) for s in samples]
    return _Points(
        x_M=_places([s.amount for s in samples]),
        z_M=np.array([scale.logarithm(d) for d in damages]),
        method_M=np.array([index[s.method] for s in samples], dtype=np.int64),
        size_M=np.array([math.log(s.params) - size for s in samples]),
        damage_M=np.array(damages),
        se=tuple(s.se for s in samples),
    )


def _noise(points: _Points, scale: Scale, spread: Spread) -> Array:
    return np.array([scale.noise(d, se, spread.jitter) for d, se in zip(points.damage_M, points.se, strict=True)])


@dataclass(frozen=True, eq=False)
class _Information:
    """What one model says of the coefficients, and the rest of its likelihood."""

    matrix: Array
    vector: Array
    constant: float


def _informed(points: _Points, spread: Spread, scale: Scale, prior: Array, methods: int) -> _Information:
    design = _design(points.x_M, points.method_M, points.size_M, methods)
    covariance = _covariance(spread, points.x_M, points.x_M, points.own)
    covariance[np.diag_indices_from(covariance)] += _noise(points, scale, spread)
    lower = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(lower, np.column_stack([design, points.z_M - design @ prior]))
    x, y = whitened[:, :-1], whitened[:, -1]
    return _Information(x.T @ x, x.T @ y, float(-0.5 * y @ y - np.log(np.diag(lower)).sum()))


def _combined(found: Sequence[_Information], precision: Array) -> tuple[Array, Array, float]:
    """Coefficients less their prior mean, their covariance, and the logarithm of the likelihood of all."""
    matrix = precision + sum((i.matrix for i in found), np.zeros_like(precision))
    vector = sum((i.vector for i in found), np.zeros(len(precision)))
    covariance = np.linalg.inv(matrix).astype(np.float64)
    shift = covariance @ vector
    _, logarithm = np.linalg.slogdet(matrix)
    likelihood = sum(i.constant for i in found) + 0.5 * float(vector @ shift) - 0.5 * float(logarithm)
    return shift, covariance, likelihood + 0.5 * float(np.linalg.slogdet(precision)[1])


def _prior_precision(methods: int) -> Array:
    """(P, P) of the coefficients of all methods before the pool."""
    covariance = np.zeros((COLUMNS * methods, COLUMNS * methods))
    for column, (sd, common) in enumerate(zip(_PRIOR_SD, _PRIOR_COMMON, strict=True)):
        covariance[column::COLUMNS, column::COLUMNS] = sd**2 * (common + (1 - common) * np.eye(methods))
    return np.linalg.inv(covariance).astype(np.float64)


_GRID: Mapping[str, tuple[float, ...]] = {
    "level": (0.3, 0.5, 0.8, 1.2),
    "slope": (0.1, 0.25, 0.5, 0.8),
    "smooth": (0.1, 0.2, 0.35, 0.6),
    "jitter": (0.05, 0.1, 0.2, 0.35),
    "common": (0.0, 0.25, 0.5, 0.75),
    "pivot": (0.0, 0.8, 1.6, 2.4),
}


def learn(
    samples: Sequence[Sample],
    scale: Scale,
    *,
    methods: Sequence[str] = (),
    levels: Sequence[float] = (0.8, 0.9),
) -> Curves:
    """What a pool teaches.

    Parameters
    ----------
    samples : of several models and methods, one metric and protocol
    scale : of the metric
    methods : curves to know beside those of the pool; of them only the prior is known
    levels : of the intervals to calibrate

    Raises
    ------
    FitError
        When there is no point to learn from.
    """
    if not samples:
        raise FitError(
            "nothing to learn from: the pool has no point of this metric; measure some cuts of any model first"
        )
    names = tuple(dict.fromkeys([*(s.method for s in samples), *methods]))
    index = {name: i for i, name in enumerate(names)}
    size = float(np.mean([math.log(p) for p in {s.model: s.params for s in samples}.values()]))
    by_model = {m: [s for s in samples if s.model == m] for m in dict.fromkeys(s.model for s in samples)}
    points = {m: _points(some, index, scale, size) for m, some in by_model.items()}
    prior, precision = np.tile(_PRIOR_MEAN, len(names)), _prior_precision(len(names))
    centre, slope, bend = _prior_of(scale)
    prior[0::COLUMNS], prior[1::COLUMNS], prior[2::COLUMNS] = centre, slope, bend

    def informed(spread: Spread) -> dict[str, _Information]:
        return {m: _informed(p, spread, scale, prior, len(names)) for m, p in points.items()}

    spread, best = Spread(), -math.inf
    if len(points) > 1:
        best = _combined([*informed(spread).values()], precision)[2]
        for _ in range(2):  # coordinate by coordinate: the scales hardly depend on one another
            for name, values in _GRID.items():
                for value in values:
                    tried = replace(spread, **{name: value})
                    likelihood = _combined([*informed(tried).values()], precision)[2]
                    if likelihood > best + 1e-9:
                        spread, best = tried, likelihood
    found = informed(spread)
    shift, covariance, _ = _combined([*found.values()], precision)
    curves = Curves(
        scale=scale,
        methods=names,
        spread=spread,
        size=size,
        sizes=(min(s.params for s in samples), max(s.params for s in samples)),
        models=tuple(points),
        coefficients=prior + shift,
        covariance=covariance,
    )
    if len(points) < 3:
        return curves
    return replace(
        curves, inflation=_calibrated(curves, by_model, found, prior, precision, levels), clusters=len(points)
    )


def _prior_of(scale: Scale) -> tuple[float, float, float]:
    return (-1.5, 1.6, 0.0) if scale.kind == "loss" else (-1.5, 1.7, 0.0)


def _standard(scale: Scale, damage: float, mean: float, sd: float) -> float:
    """The least number of standard deviations with which an interval would have held a damage.

    A gain counts as no damage: no curve of damage reaches it, and no floor is broken by it.
    """
    e = scale.resolution
    above = (scale.ceiled(damage - e) - mean) / sd if damage > e else 0.0
    below = (mean - scale.ceiled(max(damage, 0.0) + e)) / sd
    return max(above, below, 0.0)


def _calibrated(
    curves: Curves,
    by_model: Mapping[str, Sequence[Sample]],
    found: Mapping[str, _Information],
    prior: Array,
    precision: Array,
    levels: Sequence[float],
) -> dict[tuple[int, float], float]:
    """How many standard deviations held-out models' points lay away, by the number of points of the same curve.

    Every model is left out of the methods' means in turn. Points count where the prediction says that they are `MILD`,
    the region of plans; each model has the same weight. What is asked of an interval is what is printed of it: the
    measure's resolution lies beyond its ends.
    """
    far: dict[int, list[tuple[float, float]]] = {shots: [] for shots in range(MOST_SHOTS + 1)}
    for name, samples in by_model.items():
        others = [i for m, i in found.items() if m != name]
        shift, covariance, _ = _combined(others, precision)
        left = replace(curves, coefficients=prior + shift, covariance=covariance)
        methods = list(dict.fromkeys(s.method for s in samples))
        for shots in far:
            scores: list[float] = []
            for method in methods:
                curve = sorted((s for s in samples if s.method == method), key=lambda s: s.amount)
                # The second mildest, the mildest being often below the resolution; then one from the middle on.
                own = [curve[min(place, len(curve) - 1)] for place in (1, len(curve) // 2 + 1)[:shots]]
                asked = [s for s in curve if s not in own]
                if not asked:
                    continue
                belief = left.posterior(asked[0].params, [(s.method, s.amount) for s in asked], own)
                predicted = curves.scale.damage_of(belief.mean_Q)
                for s, mean, sd, expected in zip(asked, belief.mean_Q, belief.sd, predicted, strict=True):
                    if expected <= MILD * (s.base if curves.scale.kind == "loss" else 1.0):
                        scores.append(_standard(curves.scale, curves.scale.damage(s.base, s.value), mean, sd))
            far[shots] += [(score, 1 / len(scores)) for score in scores]
    found_by: dict[tuple[int, float], float] = {}
    clusters = len(by_model)
    for shots, weighted in far.items():
        ordered = sorted(weighted)
        total = sum(weight for _, weight in ordered)
        for level in levels:
            wanted, reached = min(level * (1 + 1 / clusters), 0.995) * total, 0.0
            for score, weight in ordered:
                reached += weight
                if reached >= wanted:
                    found_by[(shots, level)] = score
                    break
    return found_by

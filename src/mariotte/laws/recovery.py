"""What further recovery would bring: curves of too few points lend their shape from one another.

`mariotte.laws.forms.recovery_curve` needs four amounts of recovery data for its four parameters. Curves of three, or
the first three of a longer one, are described here with two of their own, L∞ and Lcut, while Dc and κ are learned from
other curves, as is the share of the predicted gain that is believed: those that would have predicted the others' ends
best. `learn_tail` learns of curves of many amounts how the gains of doublings follow one another.

Shape legend: M amounts of recovery data, S shapes tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mariotte.errors import FitError
from mariotte.gains import continued
from mariotte.laws.base import Array, Inputs
from mariotte.laws.catalogue import find

SEEN = 3
"""Amounts of recovery data that a curve is predicted from."""

SCALES = tuple(float(10.0**power) for power in np.arange(2.5, 12.1, 0.5))
EXPONENTS = (0.15, 0.3, 0.5, 0.8, 1.2, 2.0, 4.0)
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shapes tried: Dc in tokens, κ, and how much of the gain that they predict is believed."""

_EXPONENTS_OF_TAILS, _HALVINGS = (1e-3, 8.0), 40
_NORMAL_PER_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True, eq=False)
class Curve:
    """One model, cut in one way, recovered with several amounts of data.

    Parameters
    ----------
    name : for people
    cluster : what is independent of the other clusters, the model as a rule
    tokens_M : amounts, ascending, 0 for none
    value_M : loss in nats or score as a fraction after each
    """

    name: str
    cluster: str
    tokens_M: Array
    value_M: Array

    def __post_init__(self) -> None:
        if len(self.tokens_M) != len(self.value_M) or np.any(np.diff(self.tokens_M) <= 0) or np.any(self.tokens_M < 0):
            raise FitError(
                f"a recovery curve needs ascending amounts of data with one value each, {self.name!r} has "
                f"{len(self.tokens_M)} and {len(self.value_M)}: sort them and average repeats"
            )
        if not (np.all(np.isfinite(self.tokens_M)) and np.all(np.isfinite(self.value_M))):
            raise FitError(f"a recovery curve needs finite numbers, {self.name!r} has others: leave them out")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What curves share.

    Parameters
    ----------
    scale : Dc, in the unit of the curves' tokens
    exponent : κ
    share : of the change that the curve predicts beyond its last point, how much is believed
    curves, clusters : how many it was learned from
    """

    scale: float
    exponent: float
    share: float
    curves: int
    clusters: int

    def predict(self, curve: Curve, tokens_M: Array) -> Array:
        """(M,) values expected at further amounts, from all points of `curve`.

        Raises
        ------
        FitError
            When the curve has fewer than two points.
        """
        if len(curve.tokens_M) < 2:
            raise FitError(
                f"a recovery curve needs at least 2 amounts of data, {curve.name!r} has 1: recover with more"
            )
        last = curve.value_M[-1]
        return last + self.share * (_continued(curve, tokens_M, self.scale, self.exponent) - last)


@dataclass(frozen=True, kw_only=True)
class Tail:
    """How what further amounts bring follows from what the last one brought: L = L∞ + A D^-κ beyond the first amount.

    Parameters
    ----------
    exponent : κ
    spread : standard deviation of ln(measured drop / expected drop), by the median absolute deviation
    steps, clusters : drops and clusters that it was learned from
    """

    exponent: float
    spread: float
    steps: int
    clusters: int


@dataclass(frozen=True, kw_only=True)
class HeldOutCurve:
    """The end of one curve, predicted from its beginning.

    Parameters
    ----------
    curve : whole
    errors : root mean squared error by predictor: persist, v1 (the D term of the compression law, fitted to this
        curve), and curve (this module, its shape learned from other clusters)
    shape : that was learned
    """

    curve: Curve
    errors: Mapping[str, float]
    shape: Shape


def learn(curves: Sequence[Curve], seen: int = SEEN) -> Shape:
    """The shape with which the ends of `curves` would have been predicted best from their first `seen` points.

    Raises
    ------
    FitError
        When no curve has more than `seen` points.
    """
    long = [curve for curve in curves if len(curve.tokens_M) > seen]
    if not long:
        raise FitError(
            f"the shape of recovery is learned from curves of more than {seen} amounts of data, none counted as one; "
            f"of {len(curves)} given none has so many: recover with more amounts"
        )
    return _best([_errors(curve, seen) for curve in long], [curve.cluster for curve in long])


def hold_out(curves: Sequence[Curve], seen: int = SEEN) -> list[HeldOutCurve]:
    """The end of every curve from its first `seen` points, the shape learned from curves of other clusters.

    Raises
    ------
    FitError
        When there are fewer than two clusters of curves with more than `seen` points.
    """
    long = [curve for curve in curves if len(curve.tokens_M) > seen]
    errors = [_errors(curve, seen) for curve in long]
    clusters = [curve.cluster for curve in long]
    if len(set(clusters)) < 2:
        raise FitError(
            f"a hold-out of recovery curves needs two clusters with more than {seen} amounts of data, "
            f"got {len(set(clusters))}: add another model"
        )
    shapes: dict[str, Shape] = {}
    for cluster in set(clusters):
        others = [i for i, other in enumerate(clusters) if other != cluster]
        shapes[cluster] = _best([errors[i] for i in others], [clusters[i] for i in others])
    found: list[HeldOutCurve] = []
    for curve in long:
        start = Curve(curve.name, curve.cluster, curve.tokens_M[:seen], curve.value_M[:seen])
        tokens_M, value_M = curve.tokens_M[seen:], curve.value_M[seen:]
        predictions = {
            "persist": np.full_like(value_M, start.value_M[-1]),
            "v1": _first_law(start, tokens_M),
            "curve": shapes[curve.cluster].predict(start, tokens_M),
        }
        rmse = {name: float(np.sqrt(np.mean((p_M - value_M) ** 2))) for name, p_M in predictions.items()}
        found.append(HeldOutCurve(curve=curve, errors=rmse, shape=shapes[curve.cluster]))
    return found


def learn_tail(curves: Sequence[Curve]) -> Tail:
    """The exponent at which half of all drops are larger than expected from the drop before them, and their spread.

    The amount none, from which nothing is doubled, says nothing; nor do drops of nothing or less, and drops after them.

    Raises
    ------
    FitError
        When no curve has three amounts beside none with a loss that falls twice.
    """
    steps = [
        (tokens_M[i : i + 3], value_M[i] - value_M[i + 1], value_M[i + 1] - value_M[i + 2], curve.cluster)
        for curve in curves
        for tokens_M, value_M in [(curve.tokens_M[curve.tokens_M > 0], curve.value_M[curve.tokens_M > 0])]
        for i in range(len(tokens_M) - 2)
    ]
    steps = [step for step in steps if step[1] > 0 and step[2] > 0]
    if not steps:
        raise FitError(
            f"the tail of recovery is learned from three amounts of data over which the loss falls twice; of "
            f"{len(curves)} curves given none has them: recover with more amounts"
        )

    def surprises(exponent: float) -> Array:
        """(steps,) ln(measured / expected), which rises with the exponent."""
        lefts = [tokens_M**-exponent for tokens_M, *_ in steps]
        expected = [
            step[1] * (left[1] - left[2]) / (left[0] - left[1]) for step, left in zip(steps, lefts, strict=True)
        ]
        return np.log(np.array([step[2] for step in steps]) / np.array(expected))

    low, high = _EXPONENTS_OF_TAILS
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if np.median(surprises(middle)) < 0 else (low, middle)
    left = surprises(low)
    spread = _NORMAL_PER_MAD * float(np.median(np.abs(left - np.median(left))))
    return Tail(exponent=low, spread=spread, steps=len(steps), clusters=len({cluster for *_, cluster in steps}))


def _continued(curve: Curve, tokens_M: Array, scale: float, exponent: float) -> Array:
    return continued(curve.tokens_M, curve.value_M, tokens_M, scale, exponent)


def _errors(curve: Curve, seen: int) -> Array:
    """(S,) root mean squared error of every shape on the end of one curve."""
    start = Curve(curve.name, curve.cluster, curve.tokens_M[:seen], curve.value_M[:seen])
    last, end_M = float(start.value_M[-1]), curve.value_M[seen:]
    found: list[float] = []
    for scale, exponent in itertools.product(SCALES, EXPONENTS):
        change_M = _continued(start, curve.tokens_M[seen:], scale, exponent) - last
        found += [float(np.sqrt(np.mean(np.square(last + share * change_M - end_M)))) for share in SHARES]
    return np.array(found)


def _best(errors: Sequence[Array], clusters: Sequence[str]) -> Shape:
    mean_S = np.mean(np.stack(errors), axis=0)
    scale, exponent, share = list(itertools.product(SCALES, EXPONENTS, SHARES))[int(np.argmin(mean_S))]
    return Shape(scale=scale, exponent=exponent, share=share, curves=len(errors), clusters=len(set(clusters)))


def _first_law(curve: Curve, tokens_M: Array) -> Array:
    """(M,) the compression law's own dependence on D: within one curve ln L on 1 and ln(1 + 1/(D + 1))."""
    law = find("compression-law")
    # The dense value is a constant there, and any but 1 (whose logarithm is none) gives the same predictions.
    known, asked = (
        replace(Inputs.at(2.0, np.full_like(d_M, 0.5), 0.0), tokens_M=d_M) for d_M in (curve.tokens_M, tokens_M)
    )
    return law.f(law.estimate(known, curve.value_M).theta, asked)

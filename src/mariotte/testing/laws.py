"""The conformance suite of laws: what every form must do, ours or another package's.

Each check takes a law and raises `AssertionError`; `CHECKS` lists them, so that a test file is one parametrisation::

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_law(check):
        check(MyLaw())
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from mariotte.errors import FitError
from mariotte.laws.base import Array, Inputs, Law, Point, values
from mariotte.laws.fitting import fit
from mariotte.laws.result import Fit
from mariotte.laws.validation import predicted, rolling

Check = Callable[[Law], None]


def typical(law: Law) -> Array:
    """(P,) the parameters that synthetic data are made with."""
    return np.array([p.typical for p in law.params])


def synthetic(law: Law, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Points on a law with its typical parameters: three models, four ratios, three amounts of recovery.

    A law that uses bits gets four of them as well, one of recovery six amounts, and one of many parameters more ratios.

    Parameters
    ----------
    law : describes a loss, or else a score or a speed
    noise : standard deviation of the logarithm of the value
    seed : of the noise
    """
    generator = np.random.default_rng(seed)
    metric = next(m for kind, m in _METRICS.items() if kind in law.metric_kinds)
    # Scores are fractions: dense ones that leave room for noise below 1.
    bases = (3.1, 2.4, 1.9) if metric != "score" else (0.62, 0.55, 0.48)
    points: list[Point] = []
    for model, params, base in zip(("small", "middle", "large"), (4e8, 2e9, 1.4e10), bases, strict=True):
        for tokens, bits, ratio in itertools.product(*_levels(law)):
            value = float(law.f(typical(law), at(law, base, ratio, tokens, params=params, bits=bits))[0])
            value *= math.exp(noise * float(generator.standard_normal()))
            points.append(
                Point(
                    value=min(value, 1.0) if metric == "score" else value,
                    base=base,
                    ratio=ratio,
                    ratio_kind="parameters",
                    metric=metric,
                    protocol="synthetic",
                    tokens=tokens,
                    params=params if "params" in law.inputs else None,
                    bits=None if math.isnan(bits) else bits,
                    chance=_chance(law) if metric == "score" else None,
                    model=model,
                    method="cut",
                    recovery=f"train@{tokens:g}" if tokens else "",
                )
            )
    return points


_METRICS = {"loss": "loss", "score": "score", "speed": "speedup"}


def _levels(law: Law) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """The tokens, bits and ratios at which a law is measured: as many as its own covariates need."""
    tokens: Sequence[float] = (0.0, 1.0, 9.0)
    if "recovery" in law.inputs:  # a law with other axes after recovery draws one curve without it
        tokens = (0.0,)
    elif law.inputs == ("tokens",):
        tokens = (0.0, 1.0, 3.0, 9.0, 30.0, 100.0)
    elif {"params", "tokens"} <= set(law.inputs):
        tokens = (2e8, 1e9, 9e9)
    bits: Sequence[float] = (2.0, 3.0, 4.0, 6.0) if "bits" in law.inputs else (math.nan,)
    few = len(law.params) < 8 or "recovery" in law.inputs  # a prior says what so few ratios do not
    return tokens, bits, (0.1, 0.2, 0.35, 0.5) if few else [tenth / 10 for tenth in range(1, 10)]


def _chance(law: Law) -> float | None:
    """What a guesser scores where the law uses it: its parameter of that name, if it is one."""
    if "chance" not in law.inputs:
        return None
    return next((p.typical for p in law.params if p.name == "c"), 0.25)


def at(law: Law, base: float, ratio: float | Array, tokens: float, *, params: float = 2e9, bits: float = 4.0) -> Inputs:
    """Inputs with the parameters and bits that the law uses, and without those that it does not."""
    return Inputs.at(
        base,
        ratio,
        tokens,
        params=params if "params" in law.inputs else math.nan,
        bits=bits if "bits" in law.inputs else math.nan,
    )


def recovers_its_own_parameters(law: Law) -> None:
    """From exact data, to twelve digits."""
    found = fit(law, synthetic(law)).theta
    np.testing.assert_allclose(found, typical(law), rtol=1e-10, atol=1e-12)


def ignores_the_order_of_points(law: Law) -> None:
    """The same points shuffled give the same JSON, bit for bit."""
    points = synthetic(law, noise=0.05)
    shuffled = points.copy()
    random.Random(1).shuffle(shuffled)
    assert fit(law, points).to_json() == fit(law, shuffled).to_json()


def stays_possible(law: Law) -> None:
    """Whatever the noise, what is estimated through its logarithm is positive and the law gives a number everywhere."""
    for theta in _noisy(law):
        for param, value in zip(law.params, theta, strict=True):
            assert math.isfinite(value), f"{param.name} = {value}"
            assert value > 0 or not param.log, f"{param.name} = {value} has no logarithm"
        for tokens in (0.0, 9.0, 1e12):
            for base in (1e-3, 2.4, 1e3):
                with np.errstate(over="ignore"):  # what is infinite is clipped where it is printed
                    curve_M = law.f(theta, at(law, base, np.linspace(-0.5, 0.99, 50), tokens))
                assert not np.any(np.isnan(curve_M)), f"no number for L0 = {base:g}, D = {tokens:g}"


def _noisy(law: Law) -> list[Array]:
    """(P,) each: parameters as estimated from noisy data."""
    return [fit(law, synthetic(law, noise=0.3, seed=seed)).theta for seed in range(5)]


def survives_json(law: Law) -> None:
    """A fit read back is equal, predicts the same bits and writes the same text."""
    fitted = fit(law, synthetic(law, noise=0.05))
    again = Fit.from_json(fitted.to_json())
    for ratio in (0.0, 0.15, 0.5, 0.9):
        for tokens in (0.0, 9.0):
            ours, theirs = (f.predict(ratio, base=2.4, tokens=tokens, level=0.5) for f in (fitted, again))
            assert ours == theirs
    assert again == fitted
    assert again.to_json() == fitted.to_json()


def derives_correctly(law: Law) -> None:
    """`jac` equals central differences of `f`."""
    x = Inputs.of(synthetic(law))
    theta = typical(law)
    for i in range(len(theta)):
        step = 1e-6 * max(1.0, abs(theta[i]))
        up, down = theta.copy(), theta.copy()
        up[i] += step
        down[i] -= step
        np.testing.assert_allclose(
            law.jac(theta, x)[:, i], (law.f(up, x) - law.f(down, x)) / (2 * step), rtol=1e-6, atol=1e-7
        )


def inverts_itself(law: Law) -> None:
    """The ratio found for a predicted value is the ratio that it was predicted at."""
    fitted = fit(law, synthetic(law))
    points = synthetic(law)
    # To ask for what a law ignores is outside its data.
    base = sorted(p.base for p in points)[len(points) // 2] if "base" in law.inputs else None
    tokens = sorted({p.tokens for p in points})[1] if "tokens" in law.inputs else None
    for ratio in (0.15, 0.3, 0.45):
        target = fitted.predict(ratio, base=base, tokens=tokens).mean
        found = fitted.invert(target, base=base, tokens=tokens)
        if law.ratio_param is None:
            assert found.status == "not_identified"
        else:
            assert found.status == "ok", found
            assert found.r is not None
            assert abs(found.r - ratio) < 1e-9


def is_anchored_if_it_says_so(law: Law) -> None:
    """With nothing removed an anchored law, and no other, gives back the dense value whatever its parameters."""
    found = [
        float(law.f(theta, at(law, base, 0.0, 0.0, bits=math.nan))[0]) / base
        for theta in (typical(law), *_noisy(law))
        for base in (1.9, 2.4)
    ]
    assert np.allclose(found, 1.0, rtol=1e-12) == law.anchored, f"at ratio 0 it gives {found} times the dense value"


def predicts_what_was_held_out(law: Law) -> None:
    """On its own exact data a law's hold-out has no error (but for one that knows no ratio).

    The end of a series is predicted from its beginning; with a law that describes sizes, bits or tokens, which are the
    same along a series, or models by one another, every model from the two others.
    """
    points = synthetic(law)
    held_out = rolling(points, [law])
    scores = held_out.scores(before_collapse=False)
    assert all(score.mean < 1e-9 for score in scores), scores
    across = bool(set(law.inputs) & {"params", "bits", "tokens"}) or law.baseline
    assert scores or across, held_out.refused()
    if not scores:
        _predicts_other_models(law, points)


def _predicts_other_models(law: Law, points: Sequence[Point]) -> None:
    for model in sorted({p.model for p in points}):
        train, test = ([p for p in points if (p.model == model) == inside] for inside in (False, True))
        try:
            found_M = predicted(law, train, test)
        except FitError:
            # A law of the size of models may need three of them.
            assert "params" in law.inputs, law.name
            continue
        np.testing.assert_allclose(found_M, values(test), rtol=1e-9)


CHECKS: tuple[Check, ...] = (
    recovers_its_own_parameters,
    ignores_the_order_of_points,
    stays_possible,
    survives_json,
    derives_correctly,
    inverts_itself,
    is_anchored_if_it_says_so,
    predicts_what_was_held_out,
)

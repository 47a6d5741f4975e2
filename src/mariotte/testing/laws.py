"""The conformance suite of laws: what every form must do, ours or another package's.

Each check takes a law and raises `AssertionError`; `CHECKS` lists them, so that a test file is one parametrisation::

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_law(check):
        check(MyLaw())
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np

from mariotte.laws.base import Array, Inputs, Law, Point
from mariotte.laws.fitting import fit
from mariotte.laws.result import Fit
from mariotte.laws.validation import rolling

Check = Callable[[Law], None]


def typical(law: Law) -> Array:
    """(P,) the parameters that synthetic data are made with."""
    return np.array([p.typical for p in law.params])


def synthetic(law: Law, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Points on a law with its typical parameters: three models, four ratios, three amounts of recovery.

    Parameters
    ----------
    law : describes a loss, or else a speed
    noise : standard deviation of the logarithm of the value
    seed : of the noise
    """
    generator = np.random.default_rng(seed)
    metric = "loss" if "loss" in law.metric_kinds else "speedup"
    points: list[Point] = []
    for model, base in (("small", 3.1), ("middle", 2.4), ("large", 1.9)):
        for tokens in (0.0, 1.0, 9.0):
            for ratio in (0.1, 0.2, 0.35, 0.5):
                value = float(law.f(typical(law), Inputs.at(base, ratio, tokens))[0])
                points.append(
                    Point(
                        value=value * math.exp(noise * float(generator.standard_normal())),
                        base=base,
                        ratio=ratio,
                        ratio_kind="parameters",
                        metric=metric,
                        protocol="synthetic",
                        tokens=tokens,
                        model=model,
                        method="cut",
                        recovery=f"train@{tokens:g}" if tokens else "",
                    )
                )
    return points


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
                    curve_M = law.f(theta, Inputs.at(base, np.linspace(-0.5, 0.99, 50), tokens))
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
    base = 2.4 if "base" in law.inputs else None  # to ask for what a law ignores is outside its data
    tokens = 1.0 if "tokens" in law.inputs else None
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
        float(law.f(theta, Inputs.at(base, 0.0, 0.0))[0]) / base
        for theta in (typical(law), *_noisy(law))
        for base in (1.9, 2.4)
    ]
    assert np.allclose(found, 1.0, rtol=1e-12) == law.anchored, f"at ratio 0 it gives {found} times the dense value"


def predicts_what_was_held_out(law: Law) -> None:
    """On its own exact data a law's rolling hold-out has no error (but for one that knows no ratio)."""
    (score,) = rolling(synthetic(law), [law]).scores(before_collapse=False)
    assert score.mean < 1e-9, score


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

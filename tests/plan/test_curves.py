"""Curves learn from other models and bend to the points of one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mariotte.errors import FitError
from mariotte.plan.curves import Sample, Scale, learn

AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def made(
    model: str, size: float, shift: float, slope: float = 1.8, method: str = "cut", noise: float = 0.0
) -> list[Sample]:
    rng = np.random.default_rng(int(1000 + 10 * shift))
    found: list[Sample] = []
    for amount in AMOUNTS:
        z = -1.2 + shift + slope * (math.log(amount / (1 - amount)) + 0.8) + noise * rng.standard_normal()
        found.append(Sample(model=model, params=size, method=method, amount=amount, base=2.0, value=2.0 + math.exp(z)))
    return found


def world() -> list[Sample]:
    shifts = (0.3, -0.8, 0.7, -0.4, 1.0, 0.0)  # unrelated to size
    return [
        sample
        for i, shift in enumerate(shifts)
        for method in ("cut", "other")
        for sample in made(f"m{i}", 1e6 * 2**i, shift, method=method, noise=0.05)
    ]


SCALE = Scale(kind="loss")


def test_a_mild_point_halves_the_error_of_an_unseen_model() -> None:
    curves = learn(world(), SCALE)
    new = made("new", 8e6, 0.9)
    asked = [("cut", amount) for amount in AMOUNTS[3:5]]
    truth = np.array([SCALE.logarithm(s.value - 2.0) for s in new[3:5]])
    without = np.abs(curves.posterior(8e6, asked).mean_Q - truth).mean()
    with_one = np.abs(curves.posterior(8e6, asked, new[1:2]).mean_Q - truth).mean()
    assert with_one < without / 2


def test_a_point_of_one_method_tells_of_another() -> None:
    curves = learn(world(), SCALE)
    asked = [("cut", 0.4)]
    before = curves.posterior(4e6, asked)
    after = curves.posterior(4e6, asked, made("new", 4e6, 1.5, method="other"))
    assert after.mean_Q[0] > before.mean_Q[0]
    assert after.sd[0] < before.sd[0]


def test_many_points_are_followed() -> None:
    curves = learn(world(), SCALE)
    new = made("new", 4e6, -2.0, slope=2.5)
    belief = curves.posterior(4e6, [("cut", a) for a in AMOUNTS[2:]], new)
    truth = [SCALE.logarithm(s.value - 2.0) for s in new[2:]]
    assert belief.mean_Q == pytest.approx(truth, abs=0.15)


def test_intervals_are_calibrated_on_models_held_out() -> None:
    curves = learn(world(), SCALE)
    assert set(curves.inflation) == {(shots, level) for shots in (0, 1, 2) for level in (0.8, 0.9)}
    assert curves.inflation[0, 0.8] <= curves.inflation[0, 0.9]
    assert not learn(made("a", 1e6, 0.0) + made("b", 1e6, 0.5), SCALE).inflation


def test_the_order_of_points_does_not_matter() -> None:
    curves, turned = learn(world(), SCALE), learn(world()[::-1], SCALE)
    own = made("new", 4e6, 0.5)[:2]
    first = curves.posterior(4e6, [("cut", 0.5)], own)
    second = turned.posterior(4e6, [("cut", 0.5)], own[::-1])
    assert first.mean_Q == pytest.approx(second.mean_Q, rel=1e-9)


def test_what_nobody_measured_is_refused() -> None:
    with pytest.raises(FitError, match="nothing to learn from"):
        learn([], SCALE)
    with pytest.raises(FitError, match="no curve of 'slice'"):
        learn(world(), SCALE).posterior(1e6, [("slice", 0.3)])


def test_damage_of_a_score_is_above_chance() -> None:
    scale = Scale(kind="score", chance=0.25)
    assert scale.value(0.75, scale.damage(0.75, 0.5)) == pytest.approx(0.5)
    assert scale.value(0.75, 100.0) == pytest.approx(0.25)
    with pytest.raises(FitError, match="above chance"):
        scale.damage(0.27, 0.26)

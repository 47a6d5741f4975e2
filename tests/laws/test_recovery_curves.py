"""Curves that lend their shape from one another: exact ones, the published ones, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mariotte.errors import FitError
from mariotte.laws.recovery import Curve, Shape, hold_out, learn, learn_tail

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "recovery_curves.py"
LEVELS = np.array([0.0, 4e3, 1.6e4, 6.4e4, 2.56e5])


def curve(end: float, cut: float, cluster: str, levels: np.ndarray = LEVELS) -> Curve:
    return Curve("exact", cluster, levels, end + (cut - end) * (1 + levels / 1e4) ** -1.2)


def test_the_shape_of_exact_curves_is_learned_and_predicts_their_ends():
    curves = [curve(2.0 + 0.1 * i, 3.0 + 0.3 * i, f"m{i % 3}") for i in range(6)]
    shape = learn(curves)
    assert shape == Shape(scale=1e4, exponent=1.2, share=1.0, curves=6, clusters=3)
    for found in hold_out(curves):
        assert found.errors["curve"] < 1e-9
        assert found.errors["persist"] > 0.01
        assert found.errors["v1"] > 0.01
        assert found.shape.clusters == 2


def test_half_of_a_gain_that_never_comes_is_better_believed_by_half():
    curves = [curve(2.0, 3.0, f"m{i}") for i in range(3)]
    halved = []
    for c in curves:
        value_M = c.value_M.copy()
        value_M[3:] = value_M[2] + 0.5 * (value_M[3:] - value_M[2])
        halved.append(Curve(c.name, c.cluster, c.tokens_M, value_M))
    assert learn(halved).share == 0.5


def test_a_score_rises_as_a_loss_falls():
    rising = curve(0.7, 0.3, "m")
    predicted = learn([rising]).predict(Curve("start", "m", LEVELS[:3], rising.value_M[:3]), LEVELS[3:])
    np.testing.assert_allclose(predicted, rising.value_M[3:], rtol=1e-9)


@pytest.mark.parametrize(
    ("curves", "said"),
    [
        ([curve(2, 3, "m", LEVELS[:3])], r"more than 3 amounts of data.* of 1 given none"),
        ([], "of 0 given none"),
    ],
)
def test_too_short_curves_teach_nothing(curves: list[Curve], said: str):
    with pytest.raises(FitError, match=said):
        learn(curves)


def test_one_model_cannot_be_held_out():
    with pytest.raises(FitError, match=r"two clusters .* got 1"):
        hold_out([curve(2, 3, "m"), curve(2, 4, "m")])


@pytest.mark.parametrize(
    ("tokens", "values", "said"),
    [
        ([0.0, 0.0], [2.0, 2.0], "ascending"),
        ([0.0, 1.0], [2.0], "has 2 and 1"),
        ([-1.0, 1.0], [2.0, 2.0], "ascending"),
        ([0.0, 1.0], [2.0, np.nan], "finite numbers"),
    ],
)
def test_what_is_no_curve_is_refused(tokens: list[float], values: list[float], said: str):
    with pytest.raises(FitError, match=said):
        Curve("c", "m", np.array(tokens), np.array(values))


def test_one_point_is_no_curve():
    with pytest.raises(FitError, match="at least 2 amounts"):
        learn([curve(2, 3, "m")]).predict(curve(2, 3, "m", LEVELS[:1]), LEVELS)


def test_published_and_shipped_curves_as_the_results_page_has_them():
    spec = importlib.util.spec_from_file_location("recovery_curves", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (BENCHMARK.parent / "results" / "recovery_curves.md").read_text(encoding="utf-8")
    for curves, n in ((module.nvidia(), 23), (module.testbed("recovery"), 44)):
        found = hold_out(curves)
        assert len(found) == n
        assert "\n".join(module.table(found)) in page


def test_the_exponent_of_exact_tails_is_learned_from_any_amounts():
    curves = [
        Curve("exact", f"m{i % 3}", levels, np.where(levels > 0, 2.0 + (1 + i) * (levels + 1e-9) ** -0.4, 9.0))
        for i, levels in enumerate([LEVELS, LEVELS[1:], LEVELS[[0, 2, 3, 4]], np.array([1e3, 2e3, 3e3, 1e4])])
    ]
    tail = learn_tail(curves)
    assert (tail.exponent, tail.spread) == pytest.approx((0.4, 0.0), abs=1e-6)
    assert (tail.steps, tail.clusters) == (2 + 2 + 1 + 2, 3)


def test_the_spread_of_a_tail_is_that_of_its_drops():
    rng = np.random.default_rng(0)
    drops = np.exp(rng.normal(np.log(2**-0.5), 0.4, 4000))
    tail = learn_tail([Curve("two", "m", LEVELS[1:4] ** 0 * [1, 2, 4], np.array([3.0, 2.0, 2.0 - d])) for d in drops])
    assert (tail.exponent, tail.spread) == pytest.approx((0.5, 0.4), abs=0.03)


def test_a_loss_that_does_not_fall_twice_has_no_tail():
    rising = Curve("rising", "m", LEVELS, np.array([3.0, 2.0, 2.1, 2.2, 2.3]))
    with pytest.raises(FitError, match="over which the loss falls twice; of 1 curves given none"):
        learn_tail([rising])

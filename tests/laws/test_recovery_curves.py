"""Curves that lend their shape from one another: exact ones, the published ones, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mariotte.errors import FitError
from mariotte.laws.recovery import Curve, Shape, hold_out, learn

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

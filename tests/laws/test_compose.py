"""Steps one after another: by hand, and on the published joint grids that ship with the package."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from mariotte.errors import FitError, MariotteError
from mariotte.laws import Point, fit
from mariotte.laws.compose import compose, composed, recovered
from mariotte.laws.facts import Prediction

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "composition.py"


def prediction(mean: float, lo: float | None = None, hi: float | None = None, note: str = "") -> Prediction:
    return Prediction(mean=mean, lo=lo, hi=hi, inside_box=True, collapsed=False, note=note)


def test_rules_by_hand():
    assert composed(2.0, [2.5, 2.2]) == pytest.approx(2.7)
    assert composed(2.0, [2.5, 2.2], "max") == pytest.approx(2.5)
    assert composed(2.0, [2.5, 2.2], "multiply") == pytest.approx(2.75)
    assert composed(2.0, [2.5]) == 2.5


@pytest.mark.parametrize(
    ("base", "values", "rule", "said"),
    [
        (2.0, [], "add", "at least one step"),
        (2.0, [math.nan], "add", "positive losses in nats, got 2, nan"),
        (0.0, [2.0], "add", "positive losses"),
        (2.0, [2.0], "ad", "did you mean 'add'"),
    ],
)
def test_what_cannot_be_composed_is_refused(base: float, values: list[float], rule: str, said: str):
    with pytest.raises(MariotteError, match=said):
        composed(base, values, rule)


def test_intervals_add_at_both_ends():
    both = compose(2.0, [prediction(2.5, 2.4, 2.7), prediction(2.2, 2.1, 2.4)])
    assert (both.mean, both.lo, both.hi) == pytest.approx((2.7, 2.5, 3.1))
    assert not both.collapsed
    assert compose(2.0, [prediction(3.5), prediction(2.7)]).collapsed
    one = compose(2.0, [prediction(2.5, 2.4, 2.7), prediction(2.2, note="why")])
    assert one.lo is None
    assert one.note == "why; not calibrated: a step has no interval"


def recovery() -> list[Point]:
    levels = (0.0, 2.0, 8.0, 32.0, 128.0)
    known = {"base": 2.0, "ratio": 0.3, "ratio_kind": "p", "metric": "loss", "protocol": "p"}
    return [Point(value=2.2 + 1.8 * (1 + d / 5) ** -0.8, tokens=d, **known) for d in levels]


def test_recovery_takes_the_same_share_of_any_damage():
    curve = fit("recovery-curve", recovery())
    share = (2.2 + 1.8 * (1 + 20 / 5) ** -0.8 - 2.0) / 2.0
    after = recovered(3.0, prediction(3.5, 3.4, 3.6), curve, 20.0)
    assert (after.mean, after.lo, after.hi) == pytest.approx((3 + 0.5 * share, 3 + 0.4 * share, 3 + 0.6 * share))
    assert after.inside_box
    assert not recovered(3.0, prediction(3.5), curve, 1e6).inside_box
    assert recovered(3.0, prediction(3.5), curve, 0.0).mean == pytest.approx(3.5)


def test_recovery_on_top_needs_a_curve_of_damage():
    points = [Point(value=2 + r, base=2.0, ratio=r, ratio_kind="p", metric="loss", protocol="p") for r in (0.1, 0.2)]
    with pytest.raises(FitError, match="needs a fit of recovery-curve, got one of line"):
        recovered(3.0, prediction(3.5), fit("line", points), 20.0)


def test_damages_add_on_the_published_grids():
    spec = importlib.util.spec_from_file_location("composition", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rmse = {rule: [] for rule in ("add", "max", "multiply")}
    for grid in module.GRIDS:
        errors = module.misses(grid)
        assert 0.001 < np.median(np.abs(errors["add"])) < 0.0125
        for rule, found in errors.items():
            rmse[rule].append(float(np.sqrt(np.mean(np.square(found)))))
    assert max(rmse["add"]) < 0.11
    assert max(rmse["max"]) > 0.17
    assert max(rmse["multiply"]) > 0.16
    assert all(ours < theirs for ours, theirs in zip(rmse["add"], rmse["max"], strict=True))
    assert len(list(module.table())) == 2 + 3 * 3

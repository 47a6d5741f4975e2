"""Points that no law should answer for silently: each gives a sentence, or a result that is marked."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from mariotte.errors import FitError
from mariotte.laws.analysis import analyse
from mariotte.laws.base import Point
from mariotte.laws.fitting import fit
from mariotte.laws.validation import leave_one_out, rolling


def point(ratio: float, value: float, **changes: Any) -> Point:
    values: dict[str, Any] = {
        "metric": "loss", "base": 2.0, "family": "slice", "ratio_kind": "k", "protocol": "p", "model": "m",
        "method": "cut",
    }  # fmt: skip
    return Point(ratio=ratio, value=value, **{**values, **changes})


def remarks(points: list[Point], law: str = "family") -> str:
    return "\n".join(fit(law, points).report().remarks)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number(value: float):
    with pytest.raises(FitError, match="must be finite"):
        point(0.1, value)
    with pytest.raises(FitError, match="must be finite"):
        point(0.1, 2.0, base=value)


def test_a_dense_value_of_zero():
    with pytest.raises(FitError, match="must be positive, got 0"):
        point(0.1, 2.0, base=0.0)


def test_fewer_points_than_parameters():
    with pytest.raises(FitError, match="needs at least as many points, got 1"):
        fit("quadratic", [point(0.1, 2.1)])
    assert "α is not identified and was left out" in remarks([point(0.1, 2.1)], "pruning-law")
    assert "fewer than two points: mostly the family's curve" in remarks([point(0.1, 2.1)])


def test_one_ratio_only():
    several = [point(0.2, v) for v in (2.1, 2.12, 2.09)]
    assert fit("pruning-law", several).critical(1.05).status == "not_identified"
    found = fit("family", several)
    inside, outside = found.predict(0.2, level=0.8), found.predict(0.4, level=0.8)
    assert inside.inside_box
    assert not outside.inside_box
    assert outside.lo is not None
    with pytest.raises(FitError, match="needs a series with at least 3 ratios"):
        analyse(several, law="best")


def test_duplicated_points_are_told():
    assert "1 of 3 points repeat another" in remarks([point(0.1, 2.1), point(0.1, 2.1), point(0.2, 2.2)])
    assert "repeat" not in remarks([point(0.1, 2.1), point(0.1, 2.11), point(0.2, 2.2)])


def test_a_series_that_goes_the_wrong_way_is_told():
    points = [point(0.1, 2.5), point(0.2, 2.1), point(0.3, 2.2)]
    for law in ("family", "line"):
        assert "loss falls in 1 of 2 steps to a larger ratio" in remarks(points, law)
    assert "steps" not in remarks([point(0.1, 2.1), point(0.2, 2.09), point(0.3, 2.2)])
    falling = fit("line", [point(0.1, 2.5), point(0.2, 2.3), point(0.3, 2.05)])
    assert falling.critical(1.05).status == "not_identified"


def test_scores_below_chance_are_told():
    scores = [point(r, v, metric="mmlu", base=0.6, chance=0.25) for r, v in ((0.1, 0.5), (0.3, 0.2))]
    assert "1 of 2 scores are below chance" in remarks(scores)
    assert fit("family", scores).predict(0.9).mean >= 0.25


@pytest.mark.parametrize("name", ["protocol", "metric", "ratio_kind"])
def test_points_of_two_kinds_are_never_pooled(name: str):
    other = {"protocol": "q", "metric": "wiki_ppl", "ratio_kind": "blocks"}[name]
    mixed = [point(0.1, 2.1), replace(point(0.2, 2.2), **{name: other})]
    with pytest.raises(FitError, match=f"keep one with --where {name}="):
        fit("family", mixed)
    with pytest.raises(FitError, match="keep one with --where"):
        leave_one_out([replace(p, model=f"m{i}") for i, p in enumerate(mixed)], "model")


def test_mixed_recovery_and_families_are_refused_or_told():
    mixed = [point(0.1, 2.1), point(0.2, 2.2, tokens=5.0, recovery="lora")]
    with pytest.raises(FitError, match="--by recovery"):
        fit("family", mixed)
    assert "one curve for 2 families" in remarks([point(0.1, 2.1), point(0.2, 2.2, family="depth")])


def test_auto_falls_back_where_the_default_refuses():
    scores = [point(r, v, metric="ifeval", base=0.30, chance=0.27) for r, v in ((0.1, 0.29), (0.2, 0.28), (0.3, 0.279))]
    found = analyse(scores)
    assert found.law != "family"
    assert (
        "within 0.05 of chance" in found.held_out.refused()[[r[0] for r in found.held_out.refused()].index("family")][2]
    )


def test_leaving_out_models_predicts_each_from_the_others():
    points = [
        point(r, base * (1 - r) ** -0.5, model=f"m{i}", base=base)
        for i, base in enumerate((1.8, 2.0, 2.3))
        for r in (0.1, 0.2, 0.3)
    ]
    found = leave_one_out(points, "model", ["pruning-law", "family", "persist"])
    assert len(found.rows) == 9
    assert {r.k for r in found.rows} == {0}
    scores = {s.law: s for s in found.scores()}
    assert scores["pruning-law"].mean < 1e-9
    assert scores["family"].mean < scores["persist"].mean
    with pytest.raises(FitError, match="needs two groups, there is one"):
        leave_one_out(points, "method")
    with pytest.raises(FitError, match="cannot be grouped by 'colour'"):
        leave_one_out(points, "colour")


def test_published_points_are_held_out_by_priors_that_do_not_know_them():
    from mariotte.laws.published import points as published

    own = [p for p in published() if p.model == "OPT-30B" and p.method == "SliceGPT" and p.metric == "wikitext2_ppl"]
    strict = analyse(own).held_out
    knowing = rolling(own, ["family"])
    ours, theirs = ([r.predictions["family"] for r in found.rows] for found in (strict, knowing))
    assert ours != theirs
    anonymous = [replace(p, source="mine") for p in own]
    assert [r.predictions["family"] for r in analyse(anonymous).held_out.rows] == theirs

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from mariotte.errors import FitError, UnknownNameError
from mariotte.laws import Fit, Point, fit, rolling
from mariotte.laws.analysis import analyse
from mariotte.laws.catalogue import find
from mariotte.laws.uncertainty import Calibration, clusters_needed
from mariotte.testing.laws import synthetic


def point(ratio: float, value: float, **changes) -> Point:
    values = {
        "value": value, "base": 2.0, "ratio": ratio, "ratio_kind": "parameters", "metric": "loss", "protocol": "p",
        "model": "m", "method": "cut",
    }  # fmt: skip
    return Point(**{**values, **changes})


def power_series(exponent: float, **changes) -> list[Point]:
    return [point(r, 2.0 * (1 - r) ** exponent, **changes) for r in (0.1, 0.2, 0.3, 0.4, 0.5)]


def many_clusters(n: int, spread: float = 0.05) -> list[Point]:
    generator = np.random.default_rng(4)
    return [p for i in range(n) for p in power_series(-0.6 + spread * generator.standard_normal(), model=f"m{i}")]


def test_importing_laws_and_fitting_loads_neither_torch_nor_scipy_stats():
    program = (
        "import sys, mariotte.laws as laws; assert 'numpy' not in sys.modules;"
        "from mariotte.testing.laws import synthetic; laws.fit('pruning-law', synthetic(laws.find('pruning-law')));"
        "bad = {'torch', 'transformers', 'scipy.stats', 'pandas', 'sqlalchemy'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# What a fit predicts


def test_prediction_marks_box_and_collapse():
    fitted = fit("pruning-law", power_series(-0.9))
    assert fitted.predict(0.3).inside_box
    assert not fitted.predict(0.05).inside_box
    assert not fitted.predict(0.6).inside_box
    assert not fitted.predict(0.3, base=2.1).inside_box
    assert not fitted.predict(0.5).collapsed
    assert fitted.predict(0.6).collapsed


def test_predictions_are_clipped_to_what_is_possible():
    falling = [point(r, 0.5 - 0.8 * r, base=0.5, metric="accuracy") for r in (0.1, 0.2, 0.3)]
    assert fit("line", falling).predict(0.9).mean == 0.0
    assert fit("pruning-law", power_series(-20.0)).predict(0.9).mean == 30.0


def test_score_collapses_a_quarter_above_chance():
    scores = [point(r, 0.75 - r, base=0.75, metric="top1", chance=0.25) for r in (0.1, 0.2, 0.3, 0.4)]
    assert [p.before_collapse for p in scores] == [True, True, True, False]
    assert fit("line", scores).predict(0.39).collapsed
    assert not fit("line", scores).predict(0.37).collapsed


@pytest.mark.parametrize(("ratio", "said"), [(1.0, "got 1"), (40.0, "as a fraction")])
def test_a_ratio_out_of_range_is_refused(ratio: float, said: str):
    with pytest.raises(FitError, match=said):
        fit("line", power_series(-0.6)).predict(ratio)
    with pytest.raises(FitError, match=said):
        point(ratio, 2.0)


def test_levels_and_tokens_out_of_range_are_refused():
    fitted = fit("line", power_series(-0.6))
    with pytest.raises(FitError, match=r"level must lie in \(0, 1\), got 90"):
        fitted.predict(0.2, level=90)
    with pytest.raises(FitError, match="tokens must be 0 or more"):
        fitted.predict(0.2, tokens=-1)
    with pytest.raises(FitError, match="dense value must be positive"):
        fitted.predict(0.2, base=0)


@pytest.mark.parametrize(
    ("tokens", "inside"),
    [
        ((0.0, 0.0), True),  # nobody recovered and nobody asks for it
        ((0.0, 9.0), False),  # one curve through both: it is that of neither
        ((9.0, 9.0), False),
    ],
)
def test_what_the_law_ignores_is_not_claimed_as_inside(tokens: tuple[float, float], inside: bool):
    points = [p for n in tokens for p in power_series(-0.6, tokens=n)]
    fitted = fit("pruning-law", points)
    assert fitted.predict(0.3).inside_box
    assert fitted.predict(0.3).note == ""
    asked = fitted.predict(0.3, tokens=0.0)
    assert asked.inside_box is inside
    assert asked.note == "pruning-law ignores recovery tokens: any value gives the same prediction"


def test_a_line_says_that_it_ignores_the_dense_value():
    fitted = fit("line", [*power_series(-0.6), *power_series(-0.6, base=2.5, model="n")])
    asked = fitted.predict(0.3, base=2.2)
    assert "line ignores the dense value" in asked.note
    assert not asked.inside_box


def test_tokens_outside_the_data_are_outside_although_a_parameter_was_left_out():
    points = [p for n in (1e6, 2e6) for p in power_series(-0.6, tokens=n, base=1.0)]
    fitted = fit("compression-law", points)
    assert [c.name for c in fitted.report().coefficients if c.dropped] == ["α"]
    assert not fitted.predict(0.3).inside_box  # at 0 tokens, its default for data that differ
    assert fitted.predict(0.3, tokens=1.5e6).inside_box


# What is pooled


def test_recovery_that_the_law_ignores_is_said():
    points = [*power_series(-0.6), *power_series(-0.5, tokens=64e3, recovery="lora@64k")]
    said = "the law ignores recovery data, which runs from 0 to 64000: fit each alone with --by series"
    assert said in fit("pruning-law", points).report().remarks
    assert said not in fit("compression-law", points).report().remarks
    assert not any("recover" in r for r in fit("pruning-law", power_series(-0.6)).report().remarks)


def test_methods_and_recoveries_in_one_curve_are_said():
    points = [*power_series(-0.6), *power_series(-0.5, recovery="50k samples"), *power_series(-0.4, method="drop")]
    for law in ("pruning-law", "compression-law"):
        remarks = fit(law, points).report().remarks
        assert "one curve for 2 methods (cut, drop): fit each alone with --by method" in remarks
        assert "one curve for 2 recoveries (none, 50k samples): fit each alone with --by recovery" in remarks


# Intervals


def test_one_series_has_nothing_to_calibrate_on():
    found = fit("pruning-law", power_series(-0.6)).predict(0.3, level=0.8)
    assert found.lo is found.hi is None
    assert found.note.startswith("not calibrated: the points are one cluster")


@pytest.mark.parametrize(("level", "needed"), [(0.8, 4), (0.9, 9), (0.5, 1)])
def test_clusters_needed_by_split_conformal(level: float, needed: int):
    assert clusters_needed(level) == needed
    errors = tuple(i / 10 for i in range(needed))

    def make(e: tuple[float, ...]) -> Calibration:
        weights = (1.0,) * len(e)
        return Calibration(method="leave one cluster out", errors=e, weights=weights, clusters=len(e), reach=0)

    assert make(errors).half_width(level) == errors[-1]
    if needed > 1:
        assert make(errors[1:]).half_width(level) is None


def test_too_few_clusters_for_a_level_are_said():
    fitted = fit("pruning-law", many_clusters(5))
    assert fitted.predict(0.3, level=0.8).lo is not None
    assert fitted.predict(0.3, level=0.9).note == "not calibrated: 0.9 needs errors from 9 clusters, there are 5"


def test_an_interval_is_that_of_the_errors_left_out():
    fitted = fit("pruning-law", many_clusters(6))
    assert isinstance(fitted.calibration, Calibration)
    assert fitted.calibration.method == "leave one cluster out"
    found = fitted.predict(0.4, level=0.8)
    assert found.lo is not None
    assert found.hi is not None
    assert math.log(found.hi / found.mean) == pytest.approx(fitted.calibration.half_width(0.8))
    assert "outside 0.1 to 0.5" in fitted.predict(0.8, level=0.8).note


@pytest.mark.slow
def test_intervals_cover_what_they_promise():
    """New clusters drawn from the same world: 80 % intervals from 12 clusters cover about 80 % of their points."""
    generator = np.random.default_rng(0)
    covered: list[bool] = []
    for world in range(60):
        exponents = -0.6 + 0.1 * generator.standard_normal(13)
        fitted = fit(
            "pruning-law", [p for i, e in enumerate(exponents[:12]) for p in power_series(e, model=f"{world}-{i}")]
        )
        found = fitted.predict(0.5, level=0.8)
        assert found.lo is not None
        assert found.hi is not None
        covered.append(found.lo <= 2.0 * 0.5 ** exponents[12] <= found.hi)
    # The errors of all ratios set the width, so that the largest ratio is covered less than the average one.
    assert 0.5 <= np.mean(covered) <= 0.97


def test_a_single_series_is_calibrated_by_the_beginnings_of_others():
    everything = many_clusters(6)
    own = [p for p in everything if p.model == "m0"]
    fitted = fit("line", own, pool=everything)
    assert isinstance(fitted.calibration, Calibration)
    assert (fitted.calibration.method, fitted.calibration.clusters) == ("rolling hold-out of other clusters", 5)
    assert fitted.calibration.reach == pytest.approx(0.3)
    assert fitted.predict(0.7, level=0.8).lo is not None
    assert fitted.predict(0.9, level=0.8).lo is None


# Inversion


def test_status_of_the_critical_ratio():
    fitted = fit("pruning-law", power_series(-0.6))
    inside = fitted.critical(1.1)
    assert (inside.status, inside.r) == ("ok", pytest.approx(1 - 1.1 ** (-1 / 0.6)))
    beyond = fitted.critical(1.9)
    assert (beyond.status, beyond.r) == ("beyond_box", pytest.approx(1 - 1.9 ** (-1 / 0.6)))
    assert beyond.note.startswith("extrapolated: ratio 0.65")
    assert beyond.note.endswith(" (the data run from 0.1 to 0.5)")
    other = fitted.critical(1.1, base=2.5)
    assert (other.status, other.note) == ("beyond_box", "extrapolated: the dense value 2.5 (the data run from 2 to 2)")


def test_unlimited_recovery_is_named_where_the_law_uses_it():
    law = find("compression-law")
    found = fit(law, synthetic(law)).critical(1.3, "law", level=0.5)
    assert found.status == "beyond_box"
    assert found.note.startswith("extrapolated: unlimited recovery tokens (the data run from 0 to 9); not calibrated")
    # Of a law that ignores them there is nothing to extrapolate.
    assert fit("pruning-law", power_series(-0.6)).critical(1.1, "law").status == "ok"


def test_a_target_behind_the_start_or_never_reached_is_unreachable():
    high = fit("line", [point(r, 2.3 + r) for r in (0.1, 0.2, 0.3)])
    assert high.critical(1.05).status == "unreachable"
    assert "already beyond the target 2.1" in high.critical(1.05).note
    flat = fit("line", [point(r, 2.0 + 0.01 * r) for r in (0.1, 0.2, 0.3)])
    assert flat.critical(1.05).note == "the law stays within the target 2.1 at every ratio below 1"


def test_what_the_data_do_not_say_is_not_identified():
    assert fit("persist", power_series(-0.6)).critical(1.05).status == "not_identified"
    noisy = fit("line", [point(0.1, 2.0), point(0.2, 2.3), point(0.3, 1.9), point(0.4, 2.2)])
    assert "contains 0" in noisy.critical(1.05).note
    one_ratio = fit("pruning-law", [point(0.2, 2.1), point(0.2, 2.2)])
    assert one_ratio.critical(1.05).note == "α was left out: all points have the same ratio, 0.2"


def test_critical_interval_brackets_the_ratio():
    found = fit("pruning-law", many_clusters(6)).critical(1.2, level=0.8)
    assert found.lo is not None
    assert found.hi is not None
    assert found.r is not None
    assert 0 <= found.lo < found.r < found.hi < 1


def test_sigma_must_be_a_worsening():
    with pytest.raises(FitError, match=r"sigma must be above 1 for a loss, got 0\.95"):
        fit("line", power_series(-0.6)).critical(0.95)
    scores = [point(r, 0.8 - 0.5 * r, base=0.8, metric="accuracy") for r in (0.1, 0.2, 0.3)]
    with pytest.raises(FitError, match=r"sigma must be in \(0, 1\) for a score"):
        fit("line", scores).critical(1.05)
    assert fit("line", scores).critical(0.9).r == pytest.approx(0.16)


# What cannot be fitted


def test_no_points():
    with pytest.raises(FitError, match="pruning-law cannot be fitted to no points"):
        fit("pruning-law", [])


def test_too_few_points():
    with pytest.raises(
        FitError, match=r"line estimates 2 parameters \(a, b\) and needs at least as many points, got 1"
    ):
        fit("line", [point(0.1, 2.1)])


def test_equal_ratios_cannot_carry_a_line():
    with pytest.raises(FitError, match="cannot tell a and b apart"):
        fit("line", [point(0.1, 2.1), point(0.1, 2.2), point(0.1, 2.3)])


@pytest.mark.parametrize(("name", "value"), [("protocol", "q"), ("metric", "other_loss"), ("ratio_kind", "neurons")])
def test_what_differs_in_kind_is_never_pooled(name: str, value: str):
    points = power_series(-0.6)
    points[2] = dataclasses.replace(points[2], **{name: value})
    with pytest.raises(FitError, match=rf"points of 2 .* are never pooled .*--where {name}=\.\.\., or .* --by {name}"):
        fit("pruning-law", points)


@pytest.mark.parametrize(("value", "base"), [(1e308, 2.0), (2.0, 1e-320), (2.0, 1e300), (-1e200, 2.0)])
def test_numbers_that_overflow_are_refused(value: float, base: float):
    with pytest.raises(FitError, match="too large or too small to compute with"):
        point(0.1, value, base=base)


@pytest.mark.parametrize("law", ["line", "pruning-law", "compression-law", "persist"])
@pytest.mark.parametrize("values", [(1e99, 1e-99, 1e99), (1e99, 1e99, 1e99), (1e-99, 1e-99, 1e-98)])
def test_extreme_numbers_give_finite_answers_or_a_sentence(law: str, values: tuple[float, ...]):
    points = [point(r, v, base=1e-90) for r, v in zip((0.1, 0.1 + 1e-9, 0.9), values, strict=True)]
    rolling(points)
    try:
        fitted = fit(law, points)
    except FitError as error:
        said = str(error)
    else:
        said = ""
        json.dumps(dataclasses.asdict(fitted.report()), allow_nan=False)
        assert 0 <= fitted.predict(0.99, level=0.5).mean <= 30
    assert said == "" or said.endswith("leave out the extreme ones")


def test_unknown_law():
    with pytest.raises(UnknownNameError, match="no law named 'prunning-law'; did you mean 'pruning-law'"):
        fit("prunning-law", power_series(-0.6))


def test_percents_are_no_score():
    with pytest.raises(FitError, match=r"'accuracy' is read as a score and must be a fraction in \[0, 1\], got 62"):
        point(0.1, 62.0, base=70.0, metric="accuracy")


def test_a_zero_has_no_logarithm():
    scores = [point(r, max(0.0, 0.4 - r), base=0.8, metric="top1") for r in (0.1, 0.2, 0.5)]
    with pytest.raises(FitError, match="takes logarithms and needs values above 0, got 0"):
        fit("pruning-law", scores)


# Stored fits


def test_the_recipe_is_complete():
    values = json.loads(fit("pruning-law", many_clusters(3)).to_json())["facts"]
    assert len(values["data_hash"]) == 64
    assert values["recipe"].startswith("ordinary least squares of ln L")
    assert set(values["versions"]) == {"mariotte", "numpy", "python"}
    assert (values["n_points"], values["n_series"], values["n_clusters"]) == (15, 3, 3)


def test_a_changed_point_changes_the_hash():
    points = power_series(-0.6)
    other = [*points[:-1], dataclasses.replace(points[-1], value=points[-1].value + 1e-12)]
    assert fit("line", points).report().data_hash != fit("line", other).report().data_hash


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "this is none"),
        ("{}", "has no 'facts'"),
        ('{"format": 9, "facts": {}}', "layout 9, this version reads 1"),
        ('{"format": 1, "facts": {"law": "line"}}', "incomplete or damaged"),
        ('{"format": [1], "facts": 5}', r"layout \[1\], this version reads 1"),
        ('{"format": 1, "facts": 5}', "incomplete or damaged"),
        ("[" * 100_000, "this is none"),
        ("1" * 5000, "this is none"),
        (b"SQLite format 3\x00\xff\xfe", "this is none"),
        (b"\xff\xfe\xfd", "this is none"),
    ],
)
def test_what_is_no_fit_is_refused_in_a_sentence(text: str | bytes, said: str):
    with pytest.raises(FitError, match=said) as caught:
        Fit.from_json(text)
    assert "\n" not in str(caught.value)


JUNK = [None, 5, -5, 0, "x", "", True, math.nan, math.inf, -math.inf, [], [1], {}, {"a": 1}, [[]]]


def paths(value: object, before: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where a JSON value holds others, at any depth."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, each in inner for path in ((*before, key), *paths(each, (*before, key)))]


def test_a_damaged_fit_is_refused_or_still_predicts_numbers():
    """Every value of a stored fit is replaced by everything, or removed: never a traceback, never NaN."""
    text = fit("pruning-law", many_clusters(4)[:12]).to_json()
    refused: list[str] = []
    for *inside, last in paths(json.loads(text)):
        for junk in (*JUNK, "remove it"):
            stored = json.loads(text)
            holder = stored
            for key in inside:
                holder = holder[key]
            if junk == "remove it":
                del holder[last]
            else:
                holder[last] = junk
            try:
                found = Fit.from_json(json.dumps(stored)).predict(0.3, base=2.1, tokens=5, level=0.5)
            except (FitError, UnknownNameError) as error:
                refused.append(str(error))
            else:
                assert all(math.isfinite(n) for n in (found.mean, found.lo or 0.0, found.hi or 0.0))
    assert len(refused) > 500
    assert not any("\n" in sentence for sentence in refused)


def test_a_fit_of_another_law_than_its_numbers_is_damaged():
    text = fit("line", power_series(-0.6)).to_json()
    with pytest.raises(FitError, match="pruning-law has the parameters P0, α"):
        Fit.from_json(text.replace('"law": "line"', '"law": "pruning-law"'))


def test_a_fit_read_back_is_equal():
    fitted = fit("compression-law", many_clusters(5))
    assert Fit.from_json(fitted.to_json()) == fitted
    assert Fit.from_json(fitted.to_json().encode()) == fitted
    assert fitted != fit("line", many_clusters(5))


# Hold-out and choice


def test_folds_of_a_series_by_hand():
    held_out = rolling([point(0.1, 2.1), point(0.2, 2.2), point(0.3, 2.3), point(0.4, 2.6)], ["line", "persist"])
    assert [(r.k, r.step, r.point.ratio) for r in held_out.rows] == [(2, 1, 0.3), (2, 2, 0.4), (3, 1, 0.4)]
    line, persist = held_out.scores()
    assert (line.law, persist.law) == ("line", "persist")
    assert line.mean == pytest.approx((math.sqrt(0.2**2 / 2) + 0.2) / 2)
    assert persist.mean == pytest.approx((math.sqrt((0.1**2 + 0.4**2) / 2) + 0.3) / 2)
    assert line.n_folds == 2
    assert line.n_points == 3
    (next_line, _) = held_out.scores(next_step=True)
    assert next_line.mean == pytest.approx((0.0 + 0.2) / 2, abs=1e-12)


def test_seeds_at_one_ratio_are_trained_on_together():
    points = [point(r, 2.0 + r + e) for r in (0.1, 0.2, 0.3) for e in (-0.01, 0.01)]
    held_out = rolling(points, ["line"])
    assert [(r.k, r.step) for r in held_out.rows] == [(2, 1), (2, 1)]
    assert held_out.rows[0].predictions["line"] == pytest.approx(2.3)


def test_scores_by_field_and_unknown_fields():
    points = many_clusters(2)
    assert {s.group for s in rolling(points, ["line"]).scores(by="model")} == {"m0", "m1"}
    with pytest.raises(FitError, match="cannot be grouped by 'colour'"):
        rolling(points, ["line"]).scores(by="colour")


def test_a_law_that_cannot_be_fitted_is_recorded_not_hidden():
    scores = [point(r, max(0.0, 0.4 - r), base=0.8, metric="top1") for r in (0.1, 0.4, 0.5)]
    held_out = rolling(scores, ["line", "pruning-law"])
    (refusal,) = held_out.refusals
    assert held_out.refused() == [("pruning-law", 1, refusal.reason)]
    assert refusal.law == "pruning-law"
    assert "above 0" in refusal.reason
    assert held_out.scores(before_collapse=False) == []
    assert [s.law for s in held_out.scores(before_collapse=False, common=False)] == ["line"]


def test_the_true_law_wins():
    assert rolling(many_clusters(4)).winners() == ("pruning-law",)
    assert analyse(many_clusters(4), law="best").law == "pruning-law"


def test_series_too_short_for_a_choice():
    short = [point(0.1, 2.1), point(0.2, 2.3)]
    with pytest.raises(FitError, match="needs a series with at least 3 ratios"):
        analyse(short, law="best")
    assert analyse(short, law="line").fits[""].theta == pytest.approx([1.9, 2.0])


def test_kinds_of_ratio_can_be_fitted_apart():
    points = [*power_series(-0.6), *power_series(-0.5, ratio_kind="neurons")]
    assert list(analyse(points, law="line", by="ratio_kind").fits) == ["neurons", "parameters"]


def test_refused_folds_are_in_the_answer():
    scores = [
        point(r, v, base=0.8, metric="top1") for r, v in ((0.1, 0.7), (0.2, 0.6), (0.3, 0.5), (0.4, 0.0), (0.5, 0.0))
    ]
    (refused,) = analyse(scores, law="line", keep_collapsed=True).to_dict()["hold_out"]["refused"][:1]
    assert refused["law"] == "compression-law"
    assert refused["trained_on"] == 4
    assert "above 0" in refused["reason"]
    assert refused["series"]["model"] == "m"


def test_losses_and_scores_are_not_compared():
    with pytest.raises(FitError, match="needs one kind of metric, got several"):
        rolling([point(0.1, 2.1), point(0.1, 0.5, base=0.6, metric="top1")])
    with pytest.raises(FitError, match="got no points"):
        rolling([])


def test_groups_are_fitted_apart_and_failures_told():
    points = [*many_clusters(5), point(0.1, 2.1, model="lonely")]
    found = analyse(points, law="line", by="model")
    assert sorted(found.fits) == [f"m{i}" for i in range(5)]
    assert "got 1" in found.refused["lonely"]
    assert found.critical["m1"].lo is not None
    json.dumps(found.to_dict(), allow_nan=False)


def test_series_can_be_fitted_apart():
    points = [*power_series(-0.6), *power_series(-0.5, recovery="lora@1M", tokens=1e6)]
    assert list(analyse(points, law="line", by="series").fits) == ["m × cut", "m × cut | lora@1M"]


def test_points_beyond_collapse_are_counted():
    fitted = fit("pruning-law", [point(r, 2.0 * (1 - r) ** -0.9) for r in (0.1, 0.3, 0.5, 0.7)])
    assert "1 of 4 points lie beyond collapse and pull the curve all the same" in fitted.report().remarks


def test_typical_points_are_losses():
    assert all(p.kind == "loss" for p in synthetic(find("line")))

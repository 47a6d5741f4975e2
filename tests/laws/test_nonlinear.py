"""Robust searches: what pulls, what is weighted, what is censored, and what the report says of the search."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from mariotte.errors import FitError
from mariotte.laws import fit, published
from mariotte.laws.base import Inputs, Point, values
from mariotte.laws.catalogue import LAWS, find
from mariotte.laws.forms.odds import Odds
from mariotte.laws.nonlinear import NonlinearLaw
from mariotte.laws.result import Fit

A, G = 1.1, 1.6


def odds(ratio: float, off: float = 0.0, **fields: object) -> Point:
    value = 2.0 + A * (ratio / (1 - ratio)) ** G + off
    return dataclasses.replace(
        Point(value=value, base=2.0, ratio=ratio, ratio_kind="p", metric="loss", protocol="p", model="m", method="cut"),
        **fields,
    )


RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def theta(points: list[Point]) -> np.ndarray:
    return find("odds").estimate(Inputs.of(points), values(points)).theta


def test_one_wild_point_hardly_moves_the_curve():
    points = [odds(r) for r in RATIOS]
    points[2] = odds(0.3, off=1.0)
    robust = abs(theta(points)[0] - A)

    class Plain(Odds):
        loss = "linear"

    plain = abs(Plain().estimate(Inputs.of(points), values(points)).theta[0] - A)
    assert robust < 0.4 * plain


@pytest.mark.parametrize("loss", ["linear", "soft_l1", "huber"])
def test_every_loss_recovers_exact_data(loss: str):
    law = type("Other", (Odds,), {"loss": loss})()
    points = [odds(r) for r in RATIOS]
    assert law.estimate(Inputs.of(points), values(points)).theta == pytest.approx([A, G], rel=1e-10)


def test_standard_errors_are_weights():
    points = [odds(r, off=0.05 if r == 0.5 else 0.0, se=0.5 if r == 0.5 else 0.001) for r in RATIOS]
    alike = [dataclasses.replace(p, se=0.01) for p in points]
    assert abs(theta(points)[1] - G) < 0.1 * abs(theta(alike)[1] - G)
    # One point without an error: nothing says how far to trust it, and all count alike.
    assert theta([dataclasses.replace(points[0], se=None), *points[1:]]) == pytest.approx(theta(alike), rel=1e-6)


def test_a_point_beyond_a_guess_says_only_that_it_is_beyond():
    guess = 2.0 + A * (0.75 / 0.25) ** G - 1.0  # the true curve is beyond a guess there
    known = [odds(r, chance=guess) for r in RATIOS]
    wild = odds(0.75, off=12.0, chance=guess)
    assert theta([*known, wild]) == pytest.approx([A, G], rel=1e-9)
    moved = theta([dataclasses.replace(p, chance=None) for p in (*known, wild)])
    assert abs(moved[1] - G) > 0.01
    assert "1 points worse than a guesser censored" in fit("odds", [*known, wild]).report().recipe


def test_a_prediction_below_a_guess_is_still_wrong_for_a_censored_point():
    points = [odds(r) for r in RATIOS]
    wild = odds(0.55, off=15.0, chance=10.0)
    assert theta([*(dataclasses.replace(p, chance=10.0) for p in points), wild])[1] > G


def test_the_report_says_how_the_search_ended():
    fitted = fit("odds", [odds(r, off=0.01 * math.sin(40 * r)) for r in RATIOS])
    search = fitted.report().search
    assert search is not None
    assert search.starts == search.agreeing == 6
    assert search.spread is not None
    assert search.spread < 1e-3
    assert search.gradient < 1e-6
    assert "condition is satisfied" in search.status
    assert fitted.report().recipe == "soft-L1 least squares of L, scale 0.1, from the best 6 of 30 starts, unweighted"
    assert Fit.from_json(fitted.to_json()) == fitted


def test_no_damage_leaves_the_amplitude_at_its_bound_and_nothing_is_critical():
    fitted = fit("odds", [odds(r, value=1.99) for r in RATIOS])
    a, _ = fitted.report().coefficients
    assert a.estimate == pytest.approx(math.exp(-9))
    assert a.lo is None
    assert any("A has no interval: it ended at its bound" in remark for remark in fitted.report().remarks)


@pytest.mark.parametrize(
    ("name", "points", "said"),
    [
        ("odds", [odds(0.3), odds(0.3)], "at least two ratios to tell A from g, all points have 0.3"),
        ("exponential", [odds(0.3), odds(0.3)], "measure another ratio"),
        ("power", [odds(0.3), odds(0.3)], "measure another ratio"),
        ("weibull", [odds(0.3), odds(0.3)], "measure another ratio"),
        ("quadratic", [odds(0.3), odds(0.3)], "measure another ratio"),
        ("odds", [odds(0.3)], "estimates 2 parameters .* got 1"),
        ("kbits", [odds(0.3), odds(0.4)], "no point says its bits"),
        ("kbits", [odds(0.3, bits=4.0), odds(0.4, bits=4.0)], "all points have 4"),
        ("precision-law", [odds(0.3, bits=b) for b in (3.0, 4.0, 5.0)], "at least two sizes"),
        ("sparse-law", [odds(r) for r in RATIOS], "at least two sizes"),
        ("p2", [odds(r) for r in (*RATIOS, 0.6, 0.7)], "trained after pruning"),
        ("p2", [odds(r, tokens=1e9) for r in (*RATIOS, 0.6, 0.7)], "three sizes"),
        ("recovery-curve", [odds(0.3, tokens=t) for t in (0.0, 1.0, 2.0, 2.0)], "at least 4 amounts .* got 0, 1, 2"),
        ("median-curve", [odds(r) for r in RATIOS], "at least two dense values, got 2 alone"),
        ("odds-pooled", [odds(0.0), odds(0.0)], "a ratio above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(name: str, points: list[Point], said: str):
    with pytest.raises(FitError, match=said) as caught:
        fit(name, points)
    assert "\n" not in str(caught.value)


SCORES = [odds(r, metric="top1", base=0.6, chance=0.25, value=0.25 + 0.35 * (1 - r) ** 0.9) for r in RATIOS]


def test_a_score_falls_to_chance_and_not_to_nothing():
    fitted = fit("chance-pruning-law", SCORES)
    assert fitted.theta == pytest.approx([0.9, 0.25])
    assert fitted.predict(0.999).mean == pytest.approx(0.25, abs=0.001)
    sigma = 0.95
    assert fitted.critical(sigma).r == pytest.approx(1 - ((sigma * 0.6 - 0.25) / 0.35) ** (1 / 0.9))
    assert any("c has no interval: it is that of the points" in r for r in fitted.report().remarks)


def test_a_score_without_room_above_chance_is_refused():
    low = [dataclasses.replace(p, base=0.28, value=0.26) for p in SCORES]
    with pytest.raises(FitError, match=r"at least 0\.05 above chance, got 0\.28 with a chance of 0\.25"):
        fit("chance-pruning-law", low)
    with pytest.raises(FitError, match=r"one chance, got 0\.25, 0\.5"):
        fit("chance-pruning-law", [*SCORES, dataclasses.replace(SCORES[0], chance=0.5)])


def test_a_score_that_rises_is_described_as_one_that_stays():
    fitted = fit("chance-pruning-law", [dataclasses.replace(p, value=0.65) for p in SCORES])
    assert fitted.theta[0] == 0.0
    assert fitted.critical(0.95).status == "not_identified"


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("odds", lambda t, d: (u := (d / t[0]) ** (1 / t[1])) / (1 + u)),
        ("odds-pooled", lambda t, d: (u := (d / t[0]) ** (1 / t[1])) / (1 + u)),
        ("exponential", lambda t, d: math.log(1 + d / t[0]) / t[1]),
        ("log-line", lambda t, d: math.log(1 + d / 2.0) / t[0]),
        ("power", lambda t, d: 0.3 * (d / t[0]) ** (1 / t[1])),
    ],
)
def test_largest_ratio_for_an_allowance_in_nats(name: str, closed):
    fitted = fit(name, [odds(r) for r in RATIOS])
    assert fitted.critical(1.1).r == pytest.approx(closed(fitted.theta, 0.2), rel=1e-9)


def test_the_exponent_of_pooled_odds_is_that_of_the_family():
    slices = fit("odds-pooled", [odds(r, family="slice") for r in RATIOS])
    unknown = fit("odds-pooled", [odds(r, family="slice" if r < 0.3 else "depth") for r in RATIOS])
    depth = fit("odds-pooled", [odds(r, family="depth") for r in RATIOS])
    assert [f.theta[1] for f in (slices, unknown, depth)] == [1.49, 1.49, 1.31]
    assert any("median of published series of the family depth" in r for r in depth.report().remarks)


def test_bits_are_asked_of_a_fit_that_knows_them():
    points = [
        Point(
            value=2 + 30 * math.exp(-b / 0.7), base=2.0, ratio=0.0, ratio_kind="b", metric="loss", protocol="p", bits=b
        )
        for b in (3.0, 4.0, 5.0, 6.0)
    ]
    fitted = fit("kbits", points)
    assert fitted.predict(0.0, bits=3.5).mean == pytest.approx(2 + 30 * math.exp(-5))
    assert fitted.predict(0.0, bits=3.5).inside_box
    assert not fitted.predict(0.0, bits=2.0).inside_box
    assert fitted.predict(0.0).mean == pytest.approx(2 + 30 * math.exp(-4.5 / 0.7))
    with pytest.raises(FitError, match="bits a weight must be positive"):
        fitted.predict(0.0, bits=0.0)
    assert "ignores bits" in fit("odds", [odds(r) for r in RATIOS]).predict(0.3, bits=4.0).note


def test_searched_laws_are_not_tried_unasked():
    searched = [name for name in LAWS.names() if isinstance(find(name), NonlinearLaw)]
    assert len(searched) >= 9
    assert not any(find(name).screened for name in searched)


def test_a_fit_written_before_searches_were_told_is_still_read():
    fitted = fit("line", [odds(r) for r in RATIOS])
    stored = json.loads(fitted.to_json())
    for name in ("params", "bits", "family", "search"):
        del stored["facts"][name]
    again = Fit.from_json(json.dumps(stored))
    assert again.predict(0.35) == fitted.predict(0.35)
    assert again.report().search is None


def test_repeated_points_count_as_weights_and_change_no_exact_fit():
    once = [odds(r) for r in RATIOS]
    assert theta([*once, *once, once[0]]) == pytest.approx([A, G], rel=1e-10)


def ladders() -> dict[str, list[Point]]:
    """The shipped bit ladders of models that were quantised and not pruned, by model."""
    found: dict[str, list[Point]] = {}
    for p in published.points(quantised=True):
        plain = p.ratio_kind.startswith(("file-size", "1 - nominal"))
        if p.bits is not None and p.metric == "wikitext2_ppl" and plain:
            found.setdefault(p.model, []).append(p)
    return found


def test_bits_below_three_are_predicted_from_those_above_better_than_by_a_power():
    """The figures of the documentation, on ladders that ship."""
    ours, power = [], []
    for ladder in ladders().values():
        low, high = ([p for p in ladder if (p.bits < 3) == below] for below in (True, False))
        if not low or len(high) < 3:
            continue
        law = find("kbits")
        damage_M = values(low) - np.array([p.base for p in low])
        theta_P = law.estimate(Inputs.of(high), values(high)).theta
        ours.append(float(np.median(np.abs((law.f(theta_P, Inputs.of(low)) - values(low)) / damage_M))))
        logs = np.log([max(p.value - p.base, 0.005) for p in high])
        slope, level = np.polyfit(np.log([p.bits for p in high]), logs, 1)
        guess_M = np.exp(level + slope * np.log([p.bits for p in low]))
        power.append(float(np.median(np.abs(guess_M / damage_M - 1))))
    assert len(ours) == 12
    assert round(float(np.median(ours)), 2) == 0.21
    assert round(float(np.median(power)), 2) == 0.5


def test_bits_from_five_on_say_nothing_of_two():
    ladder = ladders()["Llama-3-8B"]
    low, high = ([p for p in ladder if a <= p.bits < b] for a, b in ((0, 3), (4.9, 99)))
    law = find("kbits")
    found_M = law.f(law.estimate(Inputs.of(high), values(high)).theta, Inputs.of(low))
    assert np.min(np.abs(found_M - values(low)) / (values(low) - low[0].base)) > 30

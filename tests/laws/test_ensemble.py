from __future__ import annotations

import numpy as np
import pytest

from mariotte.errors import FitError, UnknownNameError
from mariotte.laws.analysis import analyse
from mariotte.laws.base import Inputs, Point, values
from mariotte.laws.catalogue import find
from mariotte.laws.fitting import fit
from mariotte.laws.result import Fit
from mariotte.laws.validation import HeldOut, HoldOut, rolling
from mariotte.testing.laws import CHECKS, Check, predicts_what_was_held_out, recovers_its_own_parameters


def series(form, base: float = 2.0, ratios=(0.1, 0.2, 0.3, 0.4, 0.5), **about) -> list[Point]:
    same = {"ratio_kind": "parameters", "metric": "loss", "protocol": "p", "model": "m", "method": "slice"}
    return [Point(value=form(r), base=base, ratio=r, **{**same, **about}) for r in ratios]


# Members are fitted alone, so that none of them recovers what the median of all has made.
SINGLE = (recovers_its_own_parameters, predicts_what_was_held_out)


@pytest.mark.parametrize("name", ["line + pruning-law", "odds + power + pruning-law"])
@pytest.mark.parametrize("check", [c for c in CHECKS if c not in SINGLE], ids=lambda check: check.__name__)
def test_an_ensemble_conforms(name: str, check: Check):
    check(find(name))


def test_two_laws_are_averaged_and_three_give_the_one_in_the_middle():
    points = series(lambda r: 2.0 + 0.3 * r + 2.0 * r**3)
    x, asked = Inputs.of(points), Inputs.at(2.0, np.array([0.15, 0.6, 0.8]), 0.0)
    alone = {n: find(n).f(find(n).estimate(x, values(points)).theta, asked) for n in ("line", "pruning-law", "power")}
    both, three = find("line + pruning-law"), find("power+line + pruning-law")
    mean_M = both.f(both.estimate(x, values(points)).theta, asked)
    assert mean_M == pytest.approx((alone["line"] + alone["pruning-law"]) / 2)
    middle_M = three.f(three.estimate(x, values(points)).theta, asked)
    assert middle_M == pytest.approx(np.sort(list(alone.values()), axis=0)[1])
    assert len({tuple(np.argsort([a[i] for a in alone.values()])) for i in range(3)}) > 1  # not always the same one


def test_a_fit_of_an_ensemble_names_its_members_and_is_read_back():
    fitted = fit("pruning-law + line", series(lambda r: 2.0 + 0.3 * r + r**2))
    assert fitted.law.name == "line + pruning-law"
    names = [c.name for c in fitted.report().coefficients]
    assert names == ["line.a", "line.b", "pruning-law.P0", "pruning-law.α"]
    again = Fit.from_json(fitted.to_json())
    assert again == fitted
    assert again.predict(0.35) == fitted.predict(0.35)
    reached = fitted.critical(1.05)
    assert reached.status == "ok"
    assert fitted.predict(reached.r or 0.0).mean == pytest.approx(2.1)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("line + line", "of two or more different laws"),
        ("line + persist", "persist has no parameter of the ratio"),
        ("family + line", "family has intervals of its own"),
        ("chance-pruning-law + odds", "must describe the same metrics"),
    ],
)
def test_what_makes_no_ensemble_is_said(name: str, sentence: str):
    with pytest.raises(FitError, match=sentence):
        find(name)


def test_an_unknown_member_is_named():
    with pytest.raises(UnknownNameError, match="oods"):
        find("oods + line")


def test_laws_that_are_tied_are_chosen_together_and_held_out_together():
    points = [
        p
        for i, shape in enumerate((lambda r: 2.0 + 0.4 * r, lambda r: 2.0 * 1.01 * (1 - r) ** -0.25))
        for p in series(shape, model=f"m{i}")
    ]
    found = analyse(points, law="best")
    assert found.law == "line + pruning-law"
    assert "equally simple" in found.why
    scores = {s.law: s for s in found.held_out.scores()}
    assert scores[found.law].n_folds == scores["line"].n_folds == 6
    # Each is exact where the other is not, so that the mean of both is off by half of either's error.
    assert scores[found.law].mean == pytest.approx((scores["line"].mean + scores["pruning-law"].mean) / 2)
    assert found.fits[""].law == find("line + pruning-law")


def test_a_law_that_is_better_or_simpler_is_chosen_alone():
    points = [p for i in range(3) for p in series(lambda r: 2.0 * (1.0 + 0.1 * r), model=f"m{i}")]
    assert analyse(points, law="best").law == "line"


def test_the_ensemble_is_held_out_where_all_of_its_members_are():
    points = series(lambda r: 2.0 + r**2)
    held_out = rolling(points, ["line", "pruning-law"])
    first, *rest = held_out.rows
    cut = HoldOut(
        kind="loss",
        laws=held_out.laws,
        rows=(HeldOut(point=first.point, k=first.k, step=first.step, predictions={"line": 2.0}), *rest),
        refusals=(),
    ).joined(("line", "pruning-law"))
    name = "line + pruning-law"
    assert name not in cut.rows[0].predictions
    for row in cut.rows[1:]:
        assert row.predictions[name] == pytest.approx((row.predictions["line"] + row.predictions["pruning-law"]) / 2)

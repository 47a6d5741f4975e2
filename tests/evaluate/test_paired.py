"""Paired statistics: what equals a hand count, what is exact, and how often the intervals hold the truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mariotte.errors import ChainError, DataError
from mariotte.evaluate import conditions, paired
from mariotte.evaluate.paired import bootstrap, flips, mcnemar


def test_a_model_with_itself_differs_in_nothing() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = bootstrap(values, values, np.arange(1, 51))
    assert (found.difference, found.lo, found.hi, found.items) == (0, 0, 0, 50)
    assert flips([True, False], [True, False]).p == 1


def test_the_number_is_the_ratio_of_sums_averaged_over_strata() -> None:
    found = bootstrap([2, 6, 1, 0], [3, 9, 1, 1], [2, 2, 1, 1], [0, 0, 1, 1])
    assert found.base == pytest.approx((8 / 4 + 1 / 2) / 2)
    assert found.other == pytest.approx((12 / 4 + 2 / 2) / 2)
    assert found.difference == pytest.approx(found.other - found.base)


def test_strata_count_as_much_as_asked() -> None:
    found = bootstrap([2, 6, 1, 0], [3, 9, 1, 1], [2, 2, 1, 1], [0, 0, 1, 1], (0.75, 0.25))
    assert found.difference == pytest.approx(0.75 * 4 / 4 + 0.25 * 1 / 2)
    assert found.lo is not None
    assert found.hi is not None
    assert found.lo <= found.difference <= found.hi


def test_the_percentile_interval_is_that_of_all_resamples() -> None:
    values = np.array([0.0, 1.0, 5.0, 2.5])
    every = np.array([np.mean(drawn) for drawn in itertools.product(values, repeat=4)])
    drawn = paired._resampled(values, np.ones(4), 200_000, np.random.default_rng(0))
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(drawn, share) == pytest.approx(np.quantile(every, share), abs=0.03)


def test_equal_items_are_drawn_by_their_count() -> None:
    values = np.repeat([-1.0, 0.0, 1.0], (30, 150, 20))
    counted = paired._resampled(values, np.ones(200), 20_000, np.random.default_rng(0))
    one_by_one = np.random.default_rng(1).choice(values, (20_000, 200)).mean(1)
    assert counted.std() == pytest.approx(one_by_one.std(), rel=0.03)
    assert counted.mean() == pytest.approx(-0.05, abs=1e-3)


def test_pairing_removes_what_both_models_find_hard() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(3, 1, 200)
    found = bootstrap(hard, hard + generator.normal(0.1, 0.05, 200))
    assert found.lo is not None
    assert found.hi is not None
    assert 0.08 < found.lo < found.difference < found.hi < 0.12


def test_the_expanded_tail_makes_students_interval() -> None:
    # A resample's standard error lacks sqrt((n - 1) / n); with it the half width must be Student's.
    n, tail = 10, paired._expanded(0.025, 9)
    half = -stats.norm.ppf(tail) * math.sqrt((n - 1) / n)
    assert half == pytest.approx(stats.t.ppf(0.975, 9))


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=40)
    whole = bootstrap(values, 2 * values, seed=3)
    monkeypatch.setattr(paired, "DRAWS_AT_ONCE", 400)
    assert bootstrap(values, 2 * values, seed=3) == whole


def test_an_item_that_weighs_as_much_as_all_leaves_no_interval() -> None:
    found = bootstrap([1e17, 1.0], [1e17, 2.0], [1e17, 1.0])
    assert (found.lo, found.hi) == (None, None)


def test_one_item_has_no_interval() -> None:
    found = bootstrap([1.0], [2.0])
    assert (found.difference, found.lo, found.hi) == (1, None, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], []), "needs items, got none"),
        (([1.0], [1.0, 2.0]), "the same items"),
        (([math.nan, 1.0], [1.0, 2.0]), "must be finite"),
        (([1.0, 1.0], [1.0, 2.0], [0.0, 1.0]), "weights positive"),
    ],
)
def test_bad_items_are_one_sentence(arguments: tuple[list[float], ...], said: str) -> None:
    with pytest.raises(DataError, match=said):
        bootstrap(*arguments)
    with pytest.raises(DataError, match="got 1 and 2"):
        flips([True], [True, False])


def test_flips_go_both_ways() -> None:
    found = flips([True, True, False, False, True], [True, False, True, False, False])
    assert (found.kept, found.lost, found.gained) == ((0,), (1, 4), (2,))
    assert found.p == 1


@pytest.mark.parametrize(("lost", "gained"), [(0, 1), (5, 0), (10, 2), (3, 3), (40, 61)])
def test_mcnemar_is_the_binomial_sum(lost: int, gained: int) -> None:
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    assert mcnemar(lost, gained) == mcnemar(gained, lost) == pytest.approx(min(1, 2 * tail))


def test_mcnemar_of_nothing_is_one() -> None:
    assert mcnemar(0, 0) == 1
    with pytest.raises(DataError, match="must not be negative"):
        mcnemar(-1, 2)


@pytest.mark.parametrize(
    ("text", "base", "other", "change", "holds"),
    [
        ("loss > +3%", 2.0, 2.07, 3.5, True),
        ("loss > +3%", 2.0, 2.05, 2.5, False),
        ("knowledge.top1 < -2pp", 0.5, 0.47, -3.0, True),
        ("knowledge.top1<−2pp", 0.5, 0.49, -1.0, False),
        ("loss >= +0", 1.0, 1.0, 0.0, True),
        ("loss > +.5e-1", 1.0, 1.06, 0.06, True),
        ("kl > +1%", 0.0, 0.1, math.inf, True),
        ("kl > +1%", 0.0, 0.0, 0.0, False),
        ("x <= -10 %", -2.0, -2.2, -10.0, True),
    ],
)
def test_conditions(text: str, base: float, other: float, change: float, holds: bool) -> None:
    found = conditions.parse(text)
    assert found.change(base, other) == pytest.approx(change)
    assert found.holds(base, other) is holds


@pytest.mark.parametrize("text", ["", "loss", "loss > 3%", "loss = +3%", "> +3%", "loss > +3 pounds", "loss > +"])
def test_a_broken_condition_is_one_sentence(text: str) -> None:
    with pytest.raises(ChainError, match="a condition is METRIC OP ±NUMBER") as caught:
        conditions.parse(text)
    assert "\n" not in str(caught.value)


def test_a_condition_finds_its_metric() -> None:
    found = [("loss:testbed/all(rows=4)", "loss"), ("loss:file:a.b/c", "loss"), ("knowledge:testbed", "top1")]
    for text, place in (
        ("top1 < -1pp", 2),
        ("knowledge.top1 < -1pp", 2),
        ("loss:file:a.b/c.loss > +1%", 1),
        ("loss:testbed/all(rows=4).loss > +1%", 0),
    ):
        assert conditions.find(conditions.parse(text), found) == place
    with pytest.raises(ChainError, match=r"ambiguous: write one of loss:testbed/all\(rows=4\).loss, loss:file"):
        conditions.find(conditions.parse("loss > +1%"), found)
    with pytest.raises(ChainError, match=r"no metric named 'top2' .* there are loss.loss, knowledge.top1"):
        conditions.find(conditions.parse("top2 > +1%"), found)


def _documents(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of unequal length whose difference a token depends on the document: the truth is 0.1."""
    tokens = generator.geometric(0.02, n) + 5.0
    rate = 0.1 + 0.05 * generator.standard_exponential(n) - 0.05
    base = tokens * generator.normal(3, 0.5, n)
    return base, base + tokens * rate + generator.normal(0, 0.1, n) * np.sqrt(tokens), tokens


def _answers(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Questions: 10 % are lost, 4 % gained: the truth is -0.06."""
    kind = generator.choice(4, n, p=[0.5, 0.36, 0.1, 0.04])
    return np.isin(kind, (0, 2)) * 1.0, np.isin(kind, (0, 3)) * 1.0, np.ones(n)


def _normal(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    base = generator.normal(0, 1, n)
    return base, base + generator.normal(0.2, 1, n), np.ones(n)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "n", "truth"), [(_documents, 40, 0.1), (_documents, 200, 0.1), (_answers, 200, -0.06), (_normal, 8, 0.2)]
)
def test_coverage_of_the_95_percent_intervals(draw: object, n: int, truth: float) -> None:
    generator = np.random.default_rng(5)
    trials, held = 2000, 0
    for trial in range(trials):
        base, other, weights = draw(generator, n)  # type: ignore[operator]
        found = bootstrap(base, other, weights, resamples=999, seed=trial)
        assert found.lo is not None
        assert found.hi is not None
        held += found.lo <= truth <= found.hi
    print(f"{held / trials:.4f}")
    assert 0.925 < held / trials < 0.97

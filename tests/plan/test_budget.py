"""Budgets as users write them."""

from __future__ import annotations

import math

import pytest

from mariotte.chain import parse_change
from mariotte.errors import ChainError, MariotteError
from mariotte.evaluate import conditions
from mariotte.plan.budget import Budget, max_loss, parse_floor, parse_size, parse_times, read_budget


@pytest.mark.parametrize(
    ("text", "of_dense", "expected"),
    [
        ("12GB", 1e9, 12e9),
        ("8GiB", 1e9, 8 * 2**30),
        ("500 MB", 1e9, 5e8),
        ("1.5kB", 1e9, 1500),
        ("4096", 1e9, 4096),
        ("60%", 1e9, 6e8),
    ],
)
def test_sizes_are_bytes_or_shares(text: str, of_dense: float, expected: float) -> None:
    assert parse_size(text).of(of_dense) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "0%", "12 parsecs", "12gb", "nan", "1e999GB"])
def test_what_is_no_size_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ChainError, match="a size"):
        parse_size(text)


def test_speed_ups_carry_an_x() -> None:
    assert parse_times("1.3x") == 1.3
    for text in ("1.3", "x", "-2x", "0x"):
        with pytest.raises(ChainError, match="speed-up"):
            parse_times(text)


@pytest.mark.parametrize("change", ["+3%", "-2pp", "+0.05", "\N{MINUS SIGN}2pp", "+ 3 %", "+1e-2", "-.5pp"])
def test_changes_are_read_as_conditions_of_compare_are(change: str) -> None:
    condition = conditions.parse(f"loss > {change}")
    assert parse_change(change) == (condition.number, condition.unit)


@pytest.mark.parametrize("change", ["3%", "+", "+3 apples", "", "+1e999"])
def test_what_conditions_refuse_is_no_change(change: str) -> None:
    with pytest.raises(ChainError):
        conditions.parse(f"loss > {change}")
    with pytest.raises(ChainError):
        parse_change(change)


@pytest.mark.parametrize(("change", "base", "other"), [("+3%", 1.5, 1.545), ("+0.05", 1.5, 1.55), ("-2pp", 0.9, 0.88)])
def test_a_limit_is_where_compare_begins_to_fail(change: str, base: float, other: float) -> None:
    number, unit = parse_change(change)
    floor = parse_floor(f"m {'<=' if number > 0 else '>='} {change}")
    assert floor.limit(base) == pytest.approx(other)
    assert conditions.parse(f"m > {change}").change(base, floor.limit(base)) == pytest.approx(number)
    assert unit == floor.unit


def test_a_floor_allows_the_side_to_which_compression_moves() -> None:
    assert parse_floor("knowledge.top1 >= -2pp").name == "top1"
    assert math.isclose(max_loss("+5%").limit(2.0), 2.1)
    for text in ("loss <= -3%", "top1 >= +2pp", "top1 -2pp", "loss"):
        with pytest.raises(ChainError):
            parse_floor(text)
    for text in ("-3%", "+3pp", "3"):
        with pytest.raises(ChainError):
            max_loss(text)


def test_a_budget_states_one_floor_a_metric() -> None:
    with pytest.raises(ChainError, match="one floor a metric"):
        read_budget(max_loss="+3%", keep=["loss <= +5%"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"speedup": 0.0}, "speedup must be a number above 0"),
        ({"gpu_hours": math.nan}, "gpu_hours must be"),
        ({"context": 0}, "context must be at least 1"),
        ({"recovery_tokens": -1}, "recovery tokens"),
        ({"sure": 1.0}, "sure is the probability"),
        ({"money": 3.0}, "price"),
    ],
)
def test_impossible_numbers_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(MariotteError, match=said):
        Budget(**fields)  # type: ignore[arg-type]


def test_recovery_tokens_are_whole() -> None:
    assert read_budget(recovery_tokens="64k").recovery_tokens == 64_000
    with pytest.raises(ChainError, match="whole number"):
        read_budget(recovery_tokens="1.5")

"""The schedule: warm up, constant, linear to zero; the trunk does not depend on the length."""

from __future__ import annotations

import pytest

from mariotte.errors import MariotteError
from mariotte.training.schedule import ConstantThenLinear


def test_factors_by_hand() -> None:
    schedule = ConstantThenLinear(steps=8, decay=3, warmup=2)
    assert [schedule(step) for step in range(9)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_a_run_too_short_for_both_rises_and_falls_by_the_lower_of_the_two() -> None:
    schedule = ConstantThenLinear(steps=4, decay=3, warmup=3)
    assert [schedule(step) for step in range(4)] == [1 / 3, 2 / 3, 0.5, 0.25]
    assert [ConstantThenLinear(steps=1, decay=1, warmup=4)(step) for step in range(2)] == [0.25, 0]


def test_without_decay_it_never_falls() -> None:
    schedule = ConstantThenLinear(steps=4)
    assert [schedule(step) for step in (0, 3, 100)] == [1, 1, 1]


def test_the_constant_part_is_the_same_for_every_length() -> None:
    short, long = ConstantThenLinear(steps=20, decay=5, warmup=3), ConstantThenLinear(steps=90, decay=9, warmup=3)
    assert [short(step) for step in range(15)] == [long(step) for step in range(15)]


@pytest.mark.parametrize("fields", [{"steps": 0}, {"steps": 4, "decay": -1}, {"steps": 4, "decay": 5}])
def test_impossible_schedules_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(MariotteError):
        ConstantThenLinear(**fields)

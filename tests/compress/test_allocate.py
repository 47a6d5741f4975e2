"""Amounts of blocks: their mean, their order, and the greedy path against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mariotte.compress.allocate import (
    ALLOCATIONS,
    MOST,
    along,
    by_influence,
    check_allocation,
    gather,
    greedy_path,
    spread,
)
from mariotte.cuts.common import whole
from mariotte.errors import ChainError, ModelError
from mariotte.testing.methods import context_of
from mariotte.testing.tiny import tiny

SIZES = (100, 300, 50, 200)


def mean(amounts, sizes=SIZES) -> float:
    return sum(a * s for a, s in zip(amounts, sizes, strict=True)) / sum(sizes)


def damage(amounts) -> float:
    """A loss in which the second block is dear, the third nearly free, and damage grows ever faster."""
    return 1.0 + sum(w * a**2 / (1.01 - a) for w, a in zip((3.0, 9.0, 0.1, 1.0), amounts, strict=True))


@pytest.mark.parametrize("amount", [0.0, 1e-6, 0.1, 0.37, 0.5, 0.8, 0.94, 0.99])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_mean_is_the_amount_and_no_block_loses_too_much(allocation, amount):
    path = greedy_path(SIZES, damage, 0.95)
    tensors = {"influence": torch.tensor([0.5, 0.9, 0.01, 0.3]), "path": torch.tensor(path)}
    found = spread(allocation, tensors, amount, SIZES)
    assert mean(found) == pytest.approx(amount, abs=1e-12)
    assert all(-1e-12 <= a <= max(MOST, amount) + 1e-9 for a in found)
    if allocation == "uniform":
        assert found == [amount] * 4


def test_influence_follows_the_softmax_by_hand():
    # Influences 1 and 3, a mean of 2: at temperature 0.5 the unit is 1, and the weights are as 1 to exp(-2).
    found = by_influence(0.2, [1.0, 3.0], [10, 10], temperature=0.5)
    assert found[1] / found[0] == pytest.approx(math.exp(-2))
    assert sum(found) == pytest.approx(0.4)


def test_what_exceeds_the_most_goes_to_the_others_in_proportion():
    found = by_influence(0.6, [0.0, 1.0, 2.0], [1, 1, 1], temperature=1.0, most=0.8)
    assert found[0] == 0.8
    assert found[2] / found[1] == pytest.approx(math.exp(-1))
    assert sum(found) == pytest.approx(1.8)


@pytest.mark.parametrize("influence", [[0.0] * 4, [0.3] * 4, [1e-320] * 4])
def test_equal_influence_is_uniform(influence):
    assert by_influence(0.3, influence, SIZES) == pytest.approx([0.3] * 4)


def test_an_influence_far_above_the_rest_does_not_overflow():
    found = by_influence(0.9, [1e-9, 1e-9, 1e-9, 2.0], SIZES, temperature=1e-4)
    assert mean(found) == pytest.approx(0.9)
    assert found[:3] == pytest.approx([MOST] * 3)


@pytest.mark.parametrize("allocation", ["influence", "greedy"])
def test_no_block_gets_back_what_it_lost_when_more_is_asked(allocation):
    tensors = {
        "influence": torch.tensor([0.5, 0.9, 0.01, 0.3]),
        "path": torch.tensor(greedy_path(SIZES, damage, 0.95)),
    }
    found = [spread(allocation, tensors, amount / 100, SIZES) for amount in range(100)]
    for less, more in itertools.pairwise(found):
        assert all(a <= b + 1e-12 for a, b in zip(less, more, strict=True))


def test_a_lazy_path_equals_trying_every_block_each_time():
    sizes = (10, 10, 10, 10)
    tries = 0

    def counted(amounts) -> float:
        nonlocal tries
        tries += 1
        return damage(amounts)

    path = greedy_path(sizes, counted, 0.6)
    amounts, expected = [0.0] * 4, []
    while mean(amounts, sizes) < 0.6 - 1e-9:
        rises = {}
        for block in range(4):
            if (given := min(0.1, MOST - amounts[block])) > 1e-9:
                trial = list(amounts)
                trial[block] += given
                rises[block] = (damage(trial) - damage(amounts)) / given
        block = min(rises, key=rises.__getitem__)
        amounts[block] += min(0.1, MOST - amounts[block])
        expected.append(block)
    assert path == expected
    assert tries < 4 + 2 * len(path) + 4
    assert along(path, mean(amounts, sizes), sizes) == pytest.approx(amounts)


def test_a_path_for_less_begins_a_path_for_more():
    short, long = (greedy_path(SIZES, damage, until) for until in (0.3, 0.8))
    assert long[: len(short)] == short
    assert along(short, 0.3, SIZES) == along(long, 0.3, SIZES)
    assert greedy_path(SIZES, damage, 0.0) == []


def test_a_loss_that_is_not_finite_ends_the_path():
    with pytest.raises(ModelError, match="must be finite, got nan"):
        greedy_path(SIZES, lambda amounts: math.nan if amounts[1] else 1.0, 0.5)


def test_whole_parameters_add_up():
    assert whole([0.25, 0.25, 0.5], [5, 5, 3], 4) == [1, 1, 2]
    assert whole([0.5, 0.5, 0.5], [3, 3, 3], 5) == [2, 2, 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 60, (9,), generator=generator).tolist()
        amounts = by_influence(0.4, torch.rand(9, generator=generator).tolist(), sizes)
        counts = whole(amounts, sizes, round(0.4 * sum(sizes)))
        assert sum(counts) == round(0.4 * sum(sizes))
        assert all(abs(c - a * s) < 1 for c, a, s in zip(counts, amounts, sizes, strict=True))


def test_unknown_allocations_are_refused():
    with pytest.raises(ChainError, match="wanda: allocation must be one of uniform, influence, greedy, got 'best'"):
        check_allocation("wanda", "best")


def test_gathering_asks_only_for_what_is_needed(tmp_path):
    model = tiny("llama")
    context = context_of(model, tmp_path)

    def never(_amounts) -> float:
        raise AssertionError("only the greedy allocation tries")

    assert gather("uniform", model, context, "magnitude", [1, 1], [0.5], never) == {}
    assert gather("influence", model, context, "magnitude", [1, 1], [0.5], never)["influence"].shape == (2,)
    path = gather("greedy", model, context, "magnitude", [1, 1], [0.3, 0.2], lambda a: a[0] + 2 * a[1])["path"]
    assert path.tolist() == [0] * 6

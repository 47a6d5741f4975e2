"""What a measurement is worth, on beliefs whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mariotte.plan.worth import Decision, State, cdf


def decision(
    mean: list[float], sd: list[float], saving: list[float], *, curve: list[int] | None = None, done: float = 0.0
) -> Decision:
    """Cuts that do not speak of one another, with a floor at a damage of 1 (its logarithm is 0)."""
    n = len(mean)
    return Decision(
        state=State(np.array(mean), np.diag(np.square(sd)), np.ones(n, dtype=bool), np.array(done)),
        wide_O=np.ones(n),
        jitter=1e-3,
        resolution=1e-6,
        log_allowed=0.0,
        others_O=np.ones(n),
        saving_O=np.array(saving),
        fits_O=np.ones(n, dtype=bool),
        may_O=np.ones(n, dtype=bool),
        curve_O=np.array(curve or range(n)),
        amount_O=np.array(saving),
        sure=0.8,
        by_damage=False,
    )


def test_cdf_is_the_normal_one() -> None:
    x = np.linspace(-5, 5, 101)
    assert cdf(x) == pytest.approx([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x], abs=2e-7)


def test_a_cut_nobody_is_sure_of_is_worth_its_chance_times_its_saving() -> None:
    """At a mean on the floor itself the chance is one half."""
    (gain,) = decision([0.0], [1.0], [0.4]).gains()
    assert gain == pytest.approx(0.5 * 0.4, abs=1e-3)


def test_only_what_goes_beyond_the_best_measured_counts() -> None:
    below, beyond = decision([0.0, 0.0], [1.0, 1.0], [0.2, 0.5], done=0.3).gains()
    assert below == pytest.approx(0.0, abs=1e-9)
    assert beyond == pytest.approx(0.5 * 0.2, abs=1e-3)


def test_a_choice_that_is_sure_enough_is_worth_what_it_keeps() -> None:
    """Measuring a choice that is likely to hold cannot be worse than taking it unmeasured."""
    one = decision([-1.0], [1.0], [0.4])
    (gain,) = one.gains()
    assert gain == pytest.approx(0.0, abs=2e-3)


def test_the_least_is_worth_what_it_adds_to_a_second() -> None:
    """Of two chances as good alone, one that leaves another to try is worth more together than either."""
    one = decision([0.0, 0.0], [1.0, 1.0], [0.3, 0.4])
    alone, two = one.gains(), one.gains(ahead=2)
    assert two[1] == pytest.approx(0.5 * 0.4 + 0.5 * 0.5 * 0.3, abs=2e-3)
    assert two[0] == pytest.approx(0.5 * (0.3 + 0.5 * 0.1) + 0.5 * 0.5 * 0.4, abs=2e-3)
    assert two.max() > alone.max()


def test_a_cut_that_breaks_the_floor_speaks_for_all_larger_ones() -> None:
    """Two cuts of one method: the larger is worth nothing once the smaller one failed."""
    apart = decision([0.0, 0.0], [1.0, 1.0], [0.3, 0.4], curve=[0, 1])
    same = decision([0.0, 0.0], [1.0, 1.0], [0.3, 0.4], curve=[0, 0])
    after, share_N = same._imagined(same.state, 0, 2)
    assert share_N == pytest.approx([0.25] * 4)
    assert after.open_O.tolist() == [[False, True]] * 2 + [[False, False]] * 2
    assert apart._imagined(apart.state, 0, 2)[0].open_O.tolist() == [[False, True]] * 4


def test_results_move_what_goes_with_them() -> None:
    together = decision([0.5, 0.5], [1.0, 1.0], [0.3, 0.4])
    covariance = np.array([[1.0, 0.9], [0.9, 1.0]])
    together = replace(together, state=replace(together.state, covariance_OO=covariance))
    after, _ = together._imagined(together.state, 0, 4)
    assert after.mean_O[:, 1] == pytest.approx(0.5 + 0.9 * (after.mean_O[:, 0] - 0.5), abs=1e-5)
    assert after.covariance_OO[1, 1] == pytest.approx(1 - 0.81, abs=1e-5)
    assert together.narrows(0, 1) == pytest.approx(1 - math.sqrt(0.19), abs=1e-5)
    assert together.narrows(1, 1) == 1.0


def test_with_a_size_asked_for_the_least_damage_is_the_worth() -> None:
    one = replace(decision([-2.0, -1.0], [0.1, 1.5], [0.3, 0.3], done=-math.inf), by_damage=True)
    assert one.gains()[1] > one.gains()[0]

from __future__ import annotations

import numpy as np
import pytest

from mariotte.laws.analysis import analyse
from mariotte.laws.base import Point


def point(ratio: float, value: float, method: str = "ffn") -> Point:
    return Point(
        value=value,
        base=2.0,
        ratio=ratio,
        ratio_kind="parameters",
        metric="loss",
        protocol="p",
        model="m",
        method=method,
    )


def mild_then_collapsed(method: str = "ffn") -> list[Point]:
    """An exact pruning law (P0 = 1, alpha = -.3) as far as half the parameters, then ruin."""
    mild = [point(r, 2 * (1 - r) ** -0.3, method) for r in (0.1, 0.2, 0.3, 0.4, 0.5)]
    return [*mild, point(0.6, 7.0, method), point(0.7, 9.0, method)]


def test_what_collapsed_does_not_bend_the_fit() -> None:
    found = analyse(mild_then_collapsed(), law="pruning-law")
    (fitted,) = found.fits.values()
    estimates = [c.estimate for c in fitted.report().coefficients]
    assert estimates == pytest.approx([1.0, -0.3])
    assert found.left_out == {"": 2}
    assert found.critical[""].r == pytest.approx(1 - 1.05 ** (-1 / 0.3))
    assert found.to_dict()["left_out_beyond_collapse"] == {"": 2}


def test_it_can_be_kept() -> None:
    found = analyse(mild_then_collapsed(), law="pruning-law", keep_collapsed=True)
    (fitted,) = found.fits.values()
    assert fitted.report().n_points == 7
    assert fitted.report().coefficients[0].estimate < 0.9
    assert not found.left_out


def test_the_hold_out_sees_every_point_either_way() -> None:
    without, with_all = (analyse(mild_then_collapsed(), keep_collapsed=keep).held_out for keep in (False, True))
    assert len(without.rows) == len(with_all.rows) == sum(7 - k for k in range(2, 7))


def test_a_group_that_collapsed_whole_is_told_and_passed_over() -> None:
    ruined = [point(r, 9 + r, "slice") for r in (0.1, 0.2, 0.3)]
    found = analyse([*mild_then_collapsed(), *ruined], law="pruning-law", by="method")
    assert list(found.fits) == ["ffn"]
    assert list(found.refused) == ["slice"]
    assert np.isfinite([c.estimate for c in found.fits["ffn"].report().coefficients]).all()

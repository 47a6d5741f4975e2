"""The least squares against statsmodels on the same table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mariotte.laws import fit
from mariotte.laws.base import Point
from mariotte.laws.catalogue import find
from mariotte.testing.laws import synthetic

sm = pytest.importorskip("statsmodels.api")


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return synthetic(find("compression-law"), noise=0.1, seed=3)


def columns(points: list[Point]):
    base, ratio, tokens, value = (
        np.array([getattr(p, n) for p in points]) for n in ("base", "ratio", "tokens", "value")
    )
    return np.log(base), np.log1p(ratio), np.log1p(1 / (tokens + 1)), np.log(value)


def test_compression_law_equals_a_regression_without_intercept(points: list[Point]):
    base, ratio, tokens, y = columns(points)
    theirs = sm.OLS(y, np.column_stack([base, ratio, tokens])).fit()
    ours = fit("compression-law", points).report()
    assert ours.recipe == "ordinary least squares of ln L, without an intercept, unweighted"
    np.testing.assert_allclose([c.estimate for c in ours.coefficients], theirs.params, rtol=1e-10)
    np.testing.assert_allclose([c.se for c in ours.coefficients], theirs.bse, rtol=1e-10)
    np.testing.assert_allclose([(c.lo, c.hi) for c in ours.coefficients], theirs.conf_int(), rtol=1e-9)
    assert ours.f_statistic == pytest.approx(theirs.fvalue, rel=1e-10)
    assert ours.f_dof == (theirs.df_model, theirs.df_resid)
    assert ours.adj_r2_uncentred == pytest.approx(theirs.rsquared_adj, rel=1e-12)
    centred = 1 - (theirs.ssr / theirs.df_resid) / (theirs.centered_tss / (len(y) - 1))
    assert ours.adj_r2_centred == pytest.approx(centred, rel=1e-12)
    assert ours.adj_r2_uncentred > ours.adj_r2_centred
    damage = y - base
    assert ours.r2_log_ratio == pytest.approx(1 - theirs.ssr / np.sum((damage - damage.mean()) ** 2), rel=1e-12)
    assert ours.residual_sd == pytest.approx(np.sqrt(theirs.scale), rel=1e-12)


def test_compression_law_without_recovery_equals_the_two_term_regression(points: list[Point]):
    dense = [p for p in points if p.tokens == 0]
    base, ratio, _, y = columns(dense)
    theirs = sm.OLS(y, np.column_stack([base, ratio])).fit()
    ours = fit("compression-law", dense).report()
    np.testing.assert_allclose([c.estimate for c in ours.coefficients[:2]], theirs.params, rtol=1e-10)
    np.testing.assert_allclose([c.se for c in ours.coefficients[:2]], theirs.bse, rtol=1e-10)
    assert ours.f_statistic == pytest.approx(theirs.fvalue, rel=1e-10)
    assert ours.coefficients[2].dropped == "all points have the same recovery data, D = 0"
    assert ours.coefficients[2].estimate == 0
    assert any(r.startswith("γ is not identified") for r in ours.remarks)


def test_within_one_series_the_base_term_is_the_free_intercept(points: list[Point]):
    one = [p for p in points if p.tokens == 0 and p.model == "small"]
    _, ratio, _, y = columns(one)
    theirs = sm.OLS(y, sm.add_constant(ratio)).fit()
    ours = fit("compression-law", one)
    assert ours.theta[0] * np.log(3.1) == pytest.approx(theirs.params[0], rel=1e-9)
    assert ours.theta[1] == pytest.approx(theirs.params[1], rel=1e-9)
    assert any("free intercept" in r for r in ours.report().remarks)


def test_pruning_law_equals_a_regression_with_intercept(points: list[Point]):
    base, _, _, y = columns(points)
    kept = np.log1p(-np.array([p.ratio for p in points]))
    theirs = sm.OLS(y - base, sm.add_constant(kept)).fit()
    ours = fit("pruning-law", points).report()
    level, alpha = ours.coefficients
    assert np.log(level.estimate) == pytest.approx(theirs.params[0], rel=1e-10)
    assert level.se / level.estimate == pytest.approx(theirs.bse[0], rel=1e-10)
    assert np.log([level.lo, level.hi]) == pytest.approx(theirs.conf_int()[0], rel=1e-9)
    assert (alpha.estimate, alpha.se) == pytest.approx((theirs.params[1], theirs.bse[1]), rel=1e-10)
    assert ours.f_statistic == pytest.approx(theirs.fvalue, rel=1e-10)
    assert ours.r2_log_ratio == pytest.approx(theirs.rsquared, rel=1e-10)


def test_line_equals_a_regression_with_intercept(points: list[Point]):
    ratio = np.array([p.ratio for p in points])
    theirs = sm.OLS([p.value for p in points], sm.add_constant(ratio)).fit()
    ours = fit("line", points).report()
    np.testing.assert_allclose([c.estimate for c in ours.coefficients], theirs.params, rtol=1e-10)
    np.testing.assert_allclose([c.se for c in ours.coefficients], theirs.bse, rtol=1e-10)
    assert ours.adj_r2_centred == pytest.approx(theirs.rsquared_adj, rel=1e-10)
    assert ours.f_statistic == pytest.approx(theirs.fvalue, rel=1e-10)


def test_as_many_points_as_parameters_give_no_errors(points: list[Point]):
    two = [dataclasses.replace(p, value=1.0 + p.ratio) for p in points[:2]]
    report = fit("line", two).report()
    assert report.dof == 0
    assert [c.se for c in report.coefficients] == [None, None]
    assert report.f_statistic is report.adj_r2_centred is None

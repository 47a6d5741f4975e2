"""The family law: the trial's own figures, what it does without points, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from mariotte.errors import FitError
from mariotte.laws import axes, priors
from mariotte.laws.axes import DEFAULTS
from mariotte.laws.base import Array, Inputs, Point, values
from mariotte.laws.fitting import fit
from mariotte.laws.forms.family import Family
from mariotte.laws.learning import learn
from mariotte.laws.pool import Pool
from mariotte.laws.priors import Curve, Priors
from mariotte.laws.published import points
from mariotte.laws.result import Fit

FROZEN = "4088f48d488713b8f6bf92ddb52360e4a9ed1eb53164b03cd526eb1bb227ad2a"
"""Of the defaults that ship. Whoever changes them changes what the documented hold-out figures stand for."""


def curve(mean: tuple[float, float, float], *upper: float) -> Curve:
    a, b, c, d, e, f = upper
    return Curve(mean=mean, covariance=((a, b, c), (b, d, e), (c, e, f)), clusters=1, series=1)


def trial() -> Priors:
    """The priors that the trial printed, and its own spread of recovered series."""
    frozen = priors.frozen()
    # It knew of no series that lies far from its family.
    settings = {scale: replace(own, tail=1e9) for scale, own in frozen.settings.items()}
    settings["recovered"] = replace(settings["recovered"], level=0.040, slope=0.129)
    perplexity = {
        **frozen.curves["perplexity"],
        "unstructured": curve((-2.34, 2.06, 0.28), 0.3491, -0.0050, -0.0029, 0.0630, -0.0040, 0.0087),
        "slice": curve((-0.99, 1.42, 0.0), 0.1627, 0.0043, -0.0003, 0.0363, 0.0058, 0.0049),
    }
    recovered = {"?": curve((-0.035, 0.457, 0.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)}
    return Priors(
        settings=settings, curves={**frozen.curves, "perplexity": perplexity, "recovered": recovered}, data_hash=""
    )


def series(family: str | None, base: float, values_: dict[float, float], metric: str = "wikitext2_ppl", **more: object):
    shared = {"ratio_kind": "k", "protocol": "p", "model": "m", "method": "c", **more}
    return [
        Point(value=value, base=base, ratio=ratio, metric=metric, family=family, **shared)  # type: ignore[arg-type]
        for ratio, value in values_.items()
    ]


def expected(law: Family, known: list[Point], ratios: list[float]) -> Array:
    first = known[0]
    theta = law.estimate(Inputs.of(known), values(known)).theta
    asked = [replace(first, ratio=r) for r in ratios]
    return law.f(theta, Inputs.of(asked))


@pytest.mark.parametrize(
    ("family", "base", "known", "recovery", "found"),
    [
        ("unstructured", 1.633, {0.1: 1.636, 0.2: 1.654, 0.3: 1.679}, "", {0.4: 1.7431, 0.5: 1.8981, 0.6: 2.3175}),
        ("slice", 1.699, {0.1: 1.773, 0.2: 1.893}, "", {0.25: 1.9735, 0.3: 2.0708, 0.5: 2.7165}),
        ("depth", 2.839, {0.2: 2.934, 0.45: 3.611}, "lora", {0.6: 4.2645, 0.8: 6.1632}),
    ],
)
def test_the_trials_own_figures(
    family: str, base: float, known: dict[float, float], recovery: str, found: dict[float, float]
):
    known_points = series(family, base, known, recovery=recovery, tokens=1.0 if recovery else 0.0)
    got = expected(Family(trial()), known_points, list(found))
    # Its smooth residual is exact where ours is a sum of bumps, and its priors are printed with two decimals.
    np.testing.assert_allclose(got, list(found.values()), atol=2e-3)


def test_the_bumps_are_a_stationary_gaussian_process():
    settings = DEFAULTS["perplexity"]
    x_M = np.linspace(-3.5, 3.5, 41)
    rows = axes.design(x_M, settings)[:, axes.N_LINE :]
    covariance = rows @ axes.spread(settings)[axes.N_LINE :, axes.N_LINE :] @ rows.T
    exact = settings.smooth**2 * np.exp(-(((x_M[:, None] - x_M) / settings.length) ** 2) / 2)
    inner = np.abs(x_M) < 3
    np.testing.assert_allclose(covariance[np.ix_(inner, inner)], exact[np.ix_(inner, inner)], atol=2e-3 * 0.25**2 * 16)


def test_the_defaults_are_frozen():
    assert priors.frozen().hash == FROZEN
    assert priors.frozen().settings == dict(DEFAULTS)


def test_the_defaults_are_learned_from_the_shipped_data():
    learned = learn(points())
    frozen = priors.frozen()
    assert learned.data_hash == frozen.data_hash
    for scale, curves in frozen.curves.items():
        assert set(learned.curves[scale]) == set(curves)
        for family, one in curves.items():
            np.testing.assert_allclose(learned.curves[scale][family].mean, one.mean, atol=1e-6)
            np.testing.assert_allclose(learned.curves[scale][family].covariance, one.covariance, atol=1e-6)
    assert set(learned.calibration) == set(frozen.calibration) == {"perplexity", "score"}
    for scale, found in frozen.calibration.items():
        for name, bin_ in found.bins.items():
            again = learned.calibration[scale].bins[name]
            assert (again.points, again.clusters) == (bin_.points, bin_.clusters)
            np.testing.assert_allclose(again.values, bin_.values, rtol=1e-4, atol=1e-6)


def test_priors_survive_json():
    frozen = priors.frozen()
    assert Priors.from_dict(json.loads(json.dumps(frozen.to_dict()))) == frozen
    with pytest.raises(FitError, match="mariotte laws --learn"):
        Priors.from_dict({"settings": {}})


def test_order_of_the_pool_is_irrelevant_and_a_left_out_cluster_is_not_learned_from():
    found = [p for p in points() if p.family == "slice"]
    one, other = Pool(found).priors(), Pool(list(reversed(found))).priors()
    assert one.data_hash == other.data_hash
    assert one.curves["perplexity"]["slice"].mean == pytest.approx(other.curves["perplexity"]["slice"].mean)
    without = Pool(found).priors(lambda cluster: cluster.startswith("OPT-125M"))
    direct = Pool([p for p in found if p.model != "OPT-125M"]).priors()
    assert without.curves["perplexity"]["slice"] == direct.curves["perplexity"]["slice"]
    with pytest.raises(FitError, match="no series is left"):
        Pool(found).priors(lambda _cluster: True)


def test_with_many_exact_points_it_is_nearly_the_data():
    truth = {r: 2.0 + 1.2 * (r / (1 - r)) ** 1.5 for r in np.linspace(0.1, 0.6, 12).round(3).tolist()}
    known = series("slice", 2.0, truth)
    got = expected(Family(), known, [0.15, 0.33, 0.55])
    np.testing.assert_allclose(got, [2.0 + 1.2 * (r / (1 - r)) ** 1.5 for r in (0.15, 0.33, 0.55)], rtol=0.02)


def test_a_series_like_no_other_of_its_family_is_followed():
    """Published width pruning costs early; a method that is free up to a third and then collapses is no such curve."""
    known = series("width", 1.32, {0.06: 1.32, 0.2: 1.3204, 0.27: 1.3245, 0.34: 1.342, 0.4: 1.416, 0.47: 1.905})
    found = expected(Family(), known, [0.2, 0.34, 0.4])
    np.testing.assert_allclose(found, [1.3204, 1.342, 1.416], atol=0.012)
    alone = replace(priors.frozen(), settings=trial().settings)
    assert expected(Family(alone), known, [0.34])[0] > 1.36  # what one scale for all series makes of it


def test_a_standard_error_of_a_loss_is_mostly_shared_with_the_dense_model_s():
    """Unpaired errors of .02 must not hide that a cut of 20 % costs nothing."""
    exact = series("width", 1.32, {0.06: 1.32, 0.2: 1.3204, 0.34: 1.342, 0.4: 1.416})
    noisy = [replace(p, se=0.02) for p in exact]
    assert expected(Family(), noisy, [0.34]) == pytest.approx(expected(Family(), exact, [0.34]), rel=1e-3)


def test_the_mixture_of_scales_is_that_of_single_solutions():
    generator = np.random.default_rng(3)
    n, w = 5, 4
    root = generator.standard_normal((w, w))
    mean_W, covariance_WW = generator.standard_normal(w), root @ root.T
    drawn = axes.Drawn(generator.standard_normal((n, w)), 5 * generator.standard_normal(n), generator.random(n) + 0.1)
    settings = axes.DEFAULTS["perplexity"]
    logs, found = [], []
    for scale in axes.SCALES:
        total = drawn.design_MW @ (scale * covariance_WW) @ drawn.design_MW.T + np.diag(drawn.variance_M)
        off = drawn.z_M - drawn.design_MW @ mean_W
        density = -0.5 * (off @ np.linalg.solve(total, off) + np.linalg.slogdet(total)[1])
        logs.append(density - settings.tail * math.log(scale))
        found.append(axes.condition(mean_W, scale * covariance_WW, drawn))
    share = np.exp(np.array(logs) - max(logs))
    share /= share.sum()
    mean = sum(p * m for p, (m, _) in zip(share, found, strict=True))
    covariance = sum(p * (c + np.outer(m - mean, m - mean)) for p, (m, c) in zip(share, found, strict=True))
    got_W, got_WW = axes.adapted(mean_W, covariance_WW, drawn, settings)
    np.testing.assert_allclose(got_W, mean, rtol=1e-9)
    np.testing.assert_allclose(got_WW, covariance, rtol=1e-7, atol=1e-9)


def test_an_unknown_family_is_marked():
    known = series("origami", 2.0, {0.1: 2.1, 0.2: 2.3})
    assert any("'origami' has no published series" in r for r in fit("family", known).report().remarks)
    known = series(None, 2.0, {0.1: 2.1, 0.2: 2.3})
    assert any("the points say no family" in r for r in fit("family", known).report().remarks)
    known = series("lowrank", 2.0, {0.1: 2.1, 0.2: 2.3})
    assert not any("no published series" in r for r in fit("family", known).report().remarks)


def test_nothing_removed_is_no_damage_whatever_the_points():
    law = Family()
    for family in ("unstructured", "slice", "low-rank", "depth", "width", None):
        known = series(family, 2.0, {0.1: 2.5, 0.2: 2.1, 0.3: 2.2})
        assert expected(law, known, [0.0, -0.01, 1e-12]) == pytest.approx([2.0, 2.0, 2.0], abs=1e-4)


def test_duplicated_points_and_points_without_removal_change_little():
    law = Family()
    known = series("slice", 2.0, {0.1: 2.1, 0.2: 2.3})
    once = expected(law, known, [0.4])
    assert expected(law, known + known, [0.4]) == pytest.approx(once, rel=0.02)
    assert expected(law, [*known, *series("slice", 2.0, {0.0: 2.0})], [0.4]) == pytest.approx(once, rel=1e-12)


def test_more_damage_makes_it_worse():
    law = Family()
    mild, harsh = (series("slice", 2.0, {0.1: 2.05, 0.2: v}) for v in (2.12, 2.2))
    assert expected(law, harsh, [0.4])[0] > expected(law, mild, [0.4])[0]


def test_several_series_give_the_curve_of_one_more():
    known = [
        p
        for model, factor in (("a", 1.0), ("b", 1.5), ("c", 0.8))
        for p in series("slice", 2.0, {r: 2.0 + factor * r**1.4 for r in (0.1, 0.2, 0.3)}, model=model)
    ]
    fitted = fit("family", known)
    assert any("one more series" in r for r in fitted.report().remarks)
    assert 2.0 + 0.8 * 0.3**1.4 < fitted.predict(0.3).mean < 2.0 + 1.5 * 0.3**1.4


def test_recovered_and_unrecovered_points_are_not_one_curve():
    known = series("slice", 2.0, {0.1: 2.1}) + series("slice", 2.0, {0.2: 2.1}, recovery="lora", tokens=5.0)
    with pytest.raises(FitError, match="fit each alone with --by recovery"):
        fit("family", known)


def test_scores_at_chance_and_scores_that_rise_are_refused():
    with pytest.raises(FitError, match=r"within 0.05 of chance \(0.25\) and cannot fall"):
        fit("family", series("slice", 0.28, {0.1: 0.27, 0.2: 0.26}, metric="mmlu", chance=0.25))
    with pytest.raises(FitError, match="2 scores are above the dense one"):
        fit("family", series("slice", 0.4, {0.1: 0.45, 0.2: 0.47}, metric="ifeval", chance=0.0))
    # Below chance is a collapsed model and no error.
    low = fit("family", series("slice", 0.6, {0.1: 0.5, 0.3: 0.2}, metric="mmlu", chance=0.25))
    assert 0.25 <= low.predict(0.5).mean < 0.4


@pytest.mark.parametrize(
    ("metric", "scale"),
    [
        ("loss", "perplexity"),
        ("wikitext2_ppl", "perplexity"),
        ("bits_per_byte", "perplexity"),
        ("loss_nats_math", "answer"),
        ("mmlu", "score"),
        ("top1", "score"),
        ("tokens_per_s", None),
        ("file_bytes", None),
    ],
)
def test_the_scale_of_a_metric(metric: str, scale: str | None):
    assert axes.scale_of(metric) == scale


def test_standard_errors_make_small_damage_say_less():
    law = Family()
    known = series("slice", 2.0, {0.05: 2.012, 0.1: 2.03})
    noisy = [replace(p, se=0.1) for p in known]  # of each loss; of their difference on one text it is a fraction
    theta, spread = ({}, {})
    for name, some in (("exact", known), ("noisy", noisy)):
        estimate = law.estimate(Inputs.of(some), values(some))
        theta[name] = estimate.theta
        asked = Inputs.of([replace(known[0], ratio=0.3)])
        assert estimate.covariance is not None
        spread[name] = float(law.deviation(estimate.theta, estimate.covariance, asked)[0])
    assert spread["noisy"] > spread["exact"] > 0
    assert math.isfinite(spread["noisy"])


def test_a_fit_has_calibrated_intervals_and_survives_json():
    fitted = fit("family", series("slice", 2.0, {0.1: 2.1, 0.2: 2.3}))
    near, far = fitted.predict(0.25, level=0.8), fitted.predict(0.5, level=0.8)
    assert near.lo is not None
    assert near.hi is not None
    assert far.lo is not None
    assert far.hi is not None
    assert 2.1 < near.lo < near.mean < near.hi < far.mean < far.hi
    assert near.hi - near.lo < far.hi - far.lo
    wide = fitted.predict(0.25, level=0.9)
    assert wide.lo is not None
    assert wide.lo <= near.lo
    again = Fit.from_json(fitted.to_json())
    assert again == fitted
    assert again.predict(0.5, level=0.8) == far
    damaged = json.loads(fitted.to_json())
    damaged["posterior"].pop()
    with pytest.raises(FitError, match="has a posterior of 231 numbers"):
        Fit.from_json(json.dumps(damaged))


def test_no_interval_where_no_error_was_measured():
    fitted = fit("family", series("unstructured", 2.0, {0.1: 2.1, 0.2: 2.3}, metric="loss_nats_math"))
    said = fitted.predict(0.3, level=0.8)
    assert said.lo is None
    assert said.note.startswith("not calibrated: too few series of the scale answer")
    fitted = fit("family", series("slice", 2.0, {0.01: 2.001, 0.02: 2.002}))
    assert "no error was measured that far beyond 0.02" in fitted.predict(0.9, level=0.8).note
    assert "needs errors from 99 clusters" in fitted.predict(0.03, level=0.99).note


def test_the_critical_ratio_has_an_interval_and_a_status():
    fitted = fit("family", series("slice", 2.0, {0.1: 2.1, 0.2: 2.25, 0.3: 2.45}))
    inside, beyond = fitted.critical(1.1, level=0.8), fitted.critical(1.5, level=0.8)
    assert (inside.status, beyond.status) == ("ok", "beyond_box")
    for found, sigma in ((inside, 1.1), (beyond, 1.5)):
        assert found.r is not None
        assert found.lo is not None
        assert found.hi is not None
        assert 0 < found.lo < found.r < found.hi < 1
        assert fitted.predict(found.r).mean == pytest.approx(sigma * 2.0)
        at_lo = fitted.predict(found.lo, level=0.8).hi
        assert at_lo is not None
        assert at_lo <= sigma * 2.0 * 1.001
    assert fitted.invert(40.0).status == "unreachable"


def test_intervals_are_open_where_nothing_is_damaged():
    fitted = fit("family", series("unstructured", 2.0, {0.1: 2.0, 0.2: 2.0}))
    found = fitted.predict(0.1, level=0.8)
    assert found.lo is not None
    assert found.hi is not None
    assert found.lo < 2.0 < found.hi

"""The published hold-out with nothing of a cluster known: what the default law must reach, from the shipped tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from mariotte.errors import FitError
from mariotte.laws.axes import scale_of
from mariotte.laws.learning import coverage, missed, strict
from mariotte.laws.pool import Pool
from mariotte.laws.published import points
from mariotte.laws.validation import HoldOut, cluster_ratio, protocol_series, rolling

FOLDS = Path(__file__).resolve().parents[2].parent / "shared" / "published" / "protocol" / "folds.csv"
LAWS = ("family", "pruning-law", "line", "compression-law", "persist")


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(points())


def of_scale(scale: str) -> list:
    return [p for s in protocol_series(points()) if scale_of(s[0].metric) == scale for p in s]


@pytest.fixture(scope="module")
def text(pool: Pool) -> HoldOut:
    return strict(of_scale("perplexity"), LAWS, pool)


def test_the_series_of_the_protocol_are_regenerated_from_the_shipped_tables():
    series = protocol_series(points())
    assert Counter(scale_of(s[0].metric) for s in series) == {"perplexity": 50, "answer": 15, "score": 13}
    assert sum(len({p.ratio for p in s}) - 2 for s in series) == 194 + 120 + 38


@pytest.mark.skipif(not FOLDS.is_file(), reason="the published measurements are not beside the repository")
def test_every_fold_and_prediction_of_the_protocol_is_regenerated_from_them():
    published = pd.read_csv(FOLDS, keep_default_na=False)
    theirs = {
        (r.model, r.method, r.metric, r.recovery_tokens, r.source.partition(" ")[0] + r.source[-3:], r.k,
         round(float(r.test_ratio), 6)): r
        for r in published.itertuples()
    }  # fmt: skip
    assert len(theirs) == len(published) == 1229
    laws = {"persist": "persist", "line": "line", "compression-law": "v1", "pruning-law": "v2"}
    seen = 0
    for series in protocol_series(points()):
        for row in rolling(series, list(laws)).rows:
            p = row.point
            # The tables give no recovery as 0, the points as the empty text.
            key = (p.model, p.method, p.metric, p.recovery or "0", p.source.partition(" ")[0] + p.source[-3:], row.k,
                   round(p.ratio, 6))  # fmt: skip
            found = theirs[key]
            seen += 1
            assert row.step == found.step
            assert p.before_collapse == (str(found.before_collapse) == "True")
            for law, column in laws.items():
                assert row.predictions[law] == pytest.approx(float(getattr(found, column)), abs=0.5e-5 + 1e-9)
    assert seen == len(theirs)


def test_the_default_predicts_perplexities_better_than_what_is_published(text: HoldOut):
    scores = {s.law: s for s in text.scores()}
    own, published = scores["family"], scores["pruning-law"]
    assert own.n_folds == 149
    assert own.mean <= 0.14
    assert own.median <= 0.08
    assert round(published.mean, 3) == 0.283
    ratio, low, high = cluster_ratio(text, "family", "pruning-law")
    assert low < ratio <= 0.5
    assert high < 0.8
    by_family = {(s.group, s.law): s.mean for s in text.scores(by="family")}
    for family in ("slice", "depth", "width"):
        assert by_family[family, "family"] <= 1.05 * by_family[family, "pruning-law"]


@pytest.mark.parametrize(("low", "high"), [(2, 2), (3, 3), (4, 4), (5, 99)])
def test_it_is_never_above_the_pruning_law_by_training_ratios(text: HoldOut, low: int, high: int):
    kept = HoldOut(
        kind=text.kind, laws=text.laws, rows=tuple(r for r in text.rows if low <= r.k <= high), refusals=text.refusals
    )
    scores = {s.law: s.mean for s in kept.scores()}
    assert scores["family"] <= scores["pruning-law"]


def test_it_predicts_accuracies_better_than_the_pruning_law_above_chance(pool: Pool):
    scores = {s.law: s for s in strict(of_scale("score"), LAWS, pool).scores(before_collapse=False)}
    assert scores["family"].n_folds == 38
    assert scores["family"].mean < 0.019  # the chance-adjusted pruning law, as the protocol prints it
    assert scores["family"].mean == min(s.mean for s in scores.values())


def test_intervals_cover_what_they_promise_without_the_cluster(pool: Pool):
    rows = [r for r in missed(pool) if scale_of(r.point.metric) == "perplexity"]
    of_protocol = [i for i, r in enumerate(rows) if r.n_ratios >= 4 and r.k >= 2]
    assert len(of_protocol) == 608
    for level, low, high in ((0.8, 0.75, 0.85), (0.9, 0.86, 0.96)):
        covered = coverage(rows, level)
        for before in (True, False):
            own = [covered[i] for i in of_protocol if rows[i].point.before_collapse or not before]
            share = sum(k is not None and r.by <= k for r, k in own) / len(own)
            assert low <= share <= high, (level, before, share)


def test_a_ratio_of_errors_needs_folds_of_both(text: HoldOut):
    with pytest.raises(FitError, match="no fold has predictions of both"):
        cluster_ratio(text, "family", "weibull")

"""The hold-out protocol of the published measurements, prediction by prediction.

The tables and the predictions are reference data beside the repository; without them these tests skip.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest

from mariotte.laws.base import Point
from mariotte.laws.points import from_table
from mariotte.laws.validation import HoldOut, rolling

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "published"
LAWS = {"persist": "persist", "line": "line", "v1": "compression-law", "v2": "pruning-law"}

pytestmark = pytest.mark.skipif(
    not (PUBLISHED / "protocol" / "folds.csv").is_file(),
    reason="the published measurements are not beside the repository",
)


@pytest.fixture(scope="module")
def folds() -> pd.DataFrame:
    return pd.read_csv(PUBLISHED / "protocol" / "folds.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def series_of(folds: pd.DataFrame) -> dict[int, list[Point]]:
    """The points of every series of the protocol, found in the tables by its README."""
    tables = {path.stem: pd.read_csv(path) for path in PUBLISHED.glob("*.csv")}
    found: dict[int, list[Point]] = {}
    for row in folds.drop_duplicates("sid").itertuples():
        joint = row.file == "mpt_joint(16bit rows)"
        table = tables["mpt_joint_prune_quant" if joint else row.file]
        same = (table.model == row.model) & (table.method == row.method) & (table.metric == row.metric)
        # SliceGPT's Table 12 continues the Table 1 series, though its source names another table.
        sources = (
            {row.source, row.source.replace("Table 1", "Table 12")} if row.source.endswith("Table 1") else {row.source}
        )
        chosen = table[same & table.source.isin(sources) & (table.recovery_tokens.astype(str) == row.recovery_tokens)]
        chosen = chosen[chosen.bits == 16] if joint else chosen[chosen.bits.isna() & (chosen.protocol == row.protocol)]
        points = from_table(chosen.assign(source=row.source, family=row.family), metric=row.metric).points
        found[row.sid] = [dataclasses.replace(p, bits=None) for p in points]
    return found


@pytest.fixture(scope="module")
def held_out(series_of: dict[int, list[Point]]) -> dict[int, HoldOut]:
    return {sid: rolling(points, list(LAWS.values())) for sid, points in series_of.items()}


def half_unit(text: str) -> float:
    """Half of the last digit kept by a table of five decimals, with room for the last bit."""
    assert len(text.partition(".")[2]) <= 5, text
    return 0.5e-5 + 1e-9


def test_every_published_prediction_is_reproduced_within_its_rounding(
    folds: pd.DataFrame, held_out: dict[int, HoldOut]
):
    rows = {(sid, r.k, round(r.point.ratio, 6)): r for sid, result in held_out.items() for r in result.rows}
    assert len(folds) == len(rows) == 1229
    misses: list[str] = []
    for published in folds.itertuples():
        row = rows[published.sid, published.k, round(float(published.test_ratio), 6)]
        assert row.step == published.step
        for column, law in LAWS.items():
            text = str(getattr(published, column))
            if abs(row.predictions[law] - float(text)) > half_unit(text):
                misses.append(
                    f"{published.sid} k={published.k} r={published.test_ratio} {law}: {row.predictions[law]} != {text}"
                )
        for text, ours in ((str(published.value), row.point.value), (str(published.base), row.point.base)):
            assert abs(ours - float(text)) <= half_unit(text)
    assert not misses, f"{len(misses)} of {4 * len(folds)}: {misses[:10]}"


def test_the_collapse_mark_of_losses_is_the_published_one(folds: pd.DataFrame, held_out: dict[int, HoldOut]):
    losses = folds[folds.kind != "acc"]
    rows = {(sid, r.k, round(r.point.ratio, 6)): r for sid, result in held_out.items() for r in result.rows}
    for published in losses.itertuples():
        row = rows[published.sid, published.k, round(float(published.test_ratio), 6)]
        assert row.point.before_collapse == (str(published.before_collapse) == "True")


def test_hold_out_errors_are_those_of_the_protocol(folds: pd.DataFrame, series_of: dict[int, list[Point]]):
    """On all 149 perplexity folds before collapse, mean and median RMSE as published (three decimals)."""
    perplexities = set(folds[folds.kind == "ppl"].sid)
    # One series a sid: sources, protocols and families differ between them, and metric names may too.
    points = [dataclasses.replace(p, source=f"{sid}") for sid in perplexities for p in series_of[sid]]
    scores = {s.law: s for s in rolling(points, list(LAWS.values())).scores()}
    assert {s.n_folds for s in scores.values()} == {149}
    for law, mean, median in (
        ("pruning-law", 0.283, 0.264),
        ("line", 0.343, 0.340),
        ("compression-law", 0.346, 0.342),
        ("persist", 0.445, 0.432),
    ):
        assert (round(scores[law].mean, 3), round(scores[law].median, 3)) == (mean, median)
    assert all(math.isfinite(s.se or 0.0) for s in scores.values())

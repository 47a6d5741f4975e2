"""The hold-out protocol of the published measurements, prediction by prediction.

The tables and the predictions are reference data beside the repository; without them these tests skip.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.optimize

from mariotte.laws.base import Inputs, Point, values
from mariotte.laws.forms.odds_pooled import OddsPooled, exponent
from mariotte.laws.forms.quadratic import Quadratic
from mariotte.laws.points import from_table
from mariotte.laws.validation import HoldOut, predicted, rolling
from mariotte.laws.validation import folds as cut

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


SEARCHED = {"quadratic": "quadratic", "odds": "odds"}
EARLY = 24
"""Rows of the parabola in which the published optimiser stopped before its minimum, at most."""

CHANCE = {
    "arc_c_norm": 0.25,
    "boolq": 0.5,
    "hellaswag_norm": 0.25,
    "mmlu": 0.25,
    "piqa_norm": 0.5,
    "winogrande": 0.5,
    # BoolQ, PIQA and WinoGrande have two answers, HellaSwag, ARC-e, ARC-c and OpenBookQA four.
    "avg7": (3 * 0.5 + 4 * 0.25) / 7,
}


@pytest.fixture(scope="module")
def losses(folds: pd.DataFrame) -> list[int]:
    return sorted(set(folds[folds.kind != "acc"].sid))


@pytest.fixture(scope="module")
def searched(losses: list[int], series_of: dict[int, list[Point]]) -> dict[int, HoldOut]:
    return {sid: rolling(series_of[sid], list(SEARCHED.values())) for sid in losses}


def published(folds: pd.DataFrame, column: str) -> dict[tuple[int, int, float], str]:
    rows = zip(folds.sid, folds.k, folds.test_ratio.astype(float).round(6), folds[column].astype(str), strict=True)
    return {(sid, k, ratio): text for sid, k, ratio, text in rows if text}


def stopped_early(train: Sequence[Point]) -> np.ndarray:
    """(2,) a and b as published: the optimiser's default tolerances, the better of two starts."""
    ratio_M = np.array([p.ratio for p in train])
    damage_M = np.array([p.value - p.base for p in train])
    ends = [
        scipy.optimize.least_squares(
            lambda theta: theta[0] * ratio_M + theta[1] * ratio_M**2 - damage_M,
            start,
            bounds=([-2, 0], [50, 200]),
            loss="soft_l1",
            f_scale=0.1,
        )
        for start in ((0.1, 0.1), (1.0, 5.0))
    ]
    return min(ends, key=lambda end: end.cost).x


def test_the_parabola_is_the_published_one(
    folds: pd.DataFrame, losses: list[int], series_of: dict[int, list[Point]], searched: dict[int, HoldOut]
):
    """To the fifth decimal; where it is another, the published search stopped before its minimum, and is repeated."""
    texts = published(folds, "quadratic")
    ours = {(sid, r.k, round(r.point.ratio, 6)): r for sid in losses for r in searched[sid].rows}
    cuts = {(sid, f.k): f.train for sid in losses for f in cut(series_of[sid])}
    differ = [
        key for key, text in texts.items() if abs(ours[key].predictions["quadratic"] - float(text)) > half_unit(text)
    ]
    assert len(texts) == 1148
    assert len(differ) <= EARLY
    for key in differ:
        train, point = cuts[key[:2]], ours[key].point
        early = stopped_early(train)
        again = min(30.0, max(0.0, point.base + early[0] * point.ratio + early[1] * point.ratio**2))
        assert abs(again - float(texts[key])) <= half_unit(texts[key]), key
        assert soft_l1(train, Quadratic().estimate(Inputs.of(train), values(train)).theta) < soft_l1(train, early)


def soft_l1(train: Sequence[Point], theta: np.ndarray) -> float:
    miss_M = np.array([p.base + theta[0] * p.ratio + theta[1] * p.ratio**2 - p.value for p in train])
    return float(np.sum(np.sqrt(1 + (miss_M / 0.1) ** 2) - 1))


def test_odds_are_the_published_ones_within_two_percent(folds: pd.DataFrame, searched: dict[int, HoldOut]):
    texts = published(folds, "odds")
    assert len(texts) == 1148
    for sid, result in searched.items():
        for row in result.rows:
            text = texts[sid, row.k, round(row.point.ratio, 6)]
            assert row.predictions["odds"] == pytest.approx(float(text), rel=0.02)


def test_pooled_odds_are_the_published_ones_within_two_percent(
    folds: pd.DataFrame, losses: list[int], series_of: dict[int, list[Point]]
):
    texts = published(folds, "odds_pooled")
    about = {r.sid: (r.kind, r.family, r.model, r.method) for r in folds.itertuples()}
    n = 0
    for sid in losses:
        kind_and_family = about[sid][:2]
        others = [series_of[s] for s in losses if about[s][:2] == kind_and_family and about[s][2:] != about[sid][2:]]
        if sum(exponent(points) is not None for points in others) < 3:
            continue
        law = OddsPooled.of(others)
        for fold in cut(series_of[sid]):
            theirs = [float(texts[sid, fold.k, round(p.ratio, 6)]) for p in fold.test]
            assert predicted(law, fold.train, fold.test) == pytest.approx(theirs, rel=0.02)
            n += len(theirs)
    assert n == len(texts) == 1058


def test_chance_adjusted_scores_are_the_published_ones_within_two_percent(
    folds: pd.DataFrame, series_of: dict[int, list[Point]]
):
    texts = published(folds, "chance_v2")
    n = 0
    for sid in sorted(set(folds[folds.kind == "acc"].sid)):
        points = [dataclasses.replace(p, chance=CHANCE[p.metric]) for p in series_of[sid]]
        for row in rolling(points, ["chance-pruning-law"]).rows:
            text = texts[sid, row.k, round(row.point.ratio, 6)]
            assert row.predictions["chance-pruning-law"] == pytest.approx(float(text), rel=0.02)
            n += 1
    assert n == len(texts)

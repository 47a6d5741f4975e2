"""The shipped tables of other people's measurements."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from mariotte.laws import published
from mariotte.laws.names import chance_of, family_of
from mariotte.laws.points import from_table

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "published"


def test_every_row_has_a_source_and_the_columns_of_all_tables():
    assert [t.name for t in published.TABLES] == sorted(t.name for t in published.TABLES)
    for table in published.TABLES:
        rows = published.measurements(table.name)
        assert rows
        for row in rows:
            assert tuple(row) == published.COLUMNS
            assert row["source"].startswith(("arXiv:", "github:"))
            assert row["family"]
            assert row["left_out"] in ("", "semi-structured", "size sweep", "one significant digit", "not monotone",
                                       "near its floor")  # fmt: skip
            assert not row["chance"] or 0 < float(row["chance"]) < 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published measurements are not beside the repository")
@pytest.mark.parametrize("name", [t.name for t in published.TABLES])
def test_numbers_are_those_of_the_sources(name: str):
    with (SHARED / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        theirs = list(csv.DictReader(file))
    ours = published.measurements(name)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert other["source"].startswith(one["source"].partition(" ")[0])
        assert other["source"].endswith(one["source"].partition(" ")[2])
        assert all(one[column] == other[column] for column in other if column != "source")


def test_points_are_in_nats_and_fractions_and_keep_their_kind_of_ratio():
    points = published.points()
    assert len(points) == 1847
    assert Counter(p.kind for p in points) == {"score": 1169, "loss": 678}
    (slicegpt,) = [p for p in points if p.model == "OPT-30B" and p.method == "SliceGPT" and p.ratio == 0.1]
    assert slicegpt.base == pytest.approx(2.257588)  # ln 9.56
    assert slicegpt.ratio_kind == "slicing level (fraction of hidden dim)"
    assert slicegpt.family == "slice"
    assert slicegpt.group == "OPT-30B × slice"
    assert all(p.bits is None for p in points)
    assert {p.bits for p in published.points(quantised=True)} > {None, 2.0, 4.0, 8.0}
    assert not any("Table 12" in p.source for p in points)


def test_chat_models_are_in_the_cluster_of_their_base():
    assert published.base_model("LLaMA-2-7B-chat(?)") == "LLaMA-2-7B"
    assert published.base_model("Vicuna-7B") == "LLaMA-7B"
    assert published.base_model("Qwen2.5-72B (instruct per README)") == "Qwen2.5-72B"
    assert published.base_model("Llama-3.1-8B-Instruct") == "Llama-3.1-8B"
    assert published.base_model("gemma3-1b") == "gemma3-1b"


def test_reading_them_is_quick_and_needs_no_pandas():
    assert importlib.util.find_spec("pandas")
    code = "import sys; from mariotte.laws.published import points; points(); print('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    published.points.cache_clear()
    start = time.process_time()
    published.points()
    assert time.process_time() - start < 0.15


def test_names_tell_the_family_and_chance_that_the_tables_state():
    for table in published.TABLES:
        for row in published.measurements(table.name):
            assert family_of(row["method"]) == row["family"], row["method"]
            assert (chance_of(row["metric"]) is None) == (row["chance"] == ""), row["metric"]
            assert not row["chance"] or chance_of(row["metric"]) == pytest.approx(float(row["chance"]))


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("SliceGPT", "slice"),
        ("Wanda-sp", "width"),
        ("Wanda 2:4", "unstructured"),
        ("SparseGPT+GPTQ4", "unstructured"),
        ("GPTQ", "quantization"),
        ("LLM_Pruner w/o", "width"),
        ("ShortGPT", "depth"),
        ("ours", None),
    ],
)
def test_the_family_of_a_method(method: str, family: str | None):
    assert family_of(method) == family


def test_a_table_without_families_and_chances_gets_them_by_name():
    rows = [
        {"model": "m", "method": "SLEB", "ratio": r, "metric": "piqa", "base_value": 0.8, "value": 0.7, "protocol": "p"}
        for r in (0.1, 0.2)
    ]
    for p in from_table(pd.DataFrame(rows)).points:
        assert (p.family, p.chance) == ("depth", 0.5)
    stated = from_table(pd.DataFrame([{**r, "family": "width", "chance": 0.4} for r in rows])).points
    assert {(p.family, p.chance) for p in stated} == {("width", 0.4)}

from __future__ import annotations

import json

from typer.testing import CliRunner

from mariotte.cli.main import app
from mariotte.laws.catalogue import LAWS, find


def run(*words: str):
    return CliRunner().invoke(app, ["laws", *words])


def test_every_law_is_listed_with_its_formula():
    result = run()
    assert result.exit_code == 0
    for name in LAWS.names():
        assert name in result.output
        assert find(name).formula in result.output


def test_one_law_is_shown_with_all_its_defects():
    result = run("compression-law")
    assert all(defect in result.output for defect in find("compression-law").defects)
    assert "7. " in result.output


def test_json():
    values = json.loads(run("--json").output)
    assert [v["name"] for v in values] == LAWS.names()
    (first,) = [v for v in values if v["name"] == "compression-law"]
    assert first["parameters"] == ["α", "β", "γ"]


def test_published_coefficients_keep_their_source_and_mark():
    rows = json.loads(run("--published", "--json").output)
    assert len(rows) == 33
    assert {r["mark"] for r in rows} == {"read", "checked"}
    assert all(r["source"].startswith("arXiv:2504.04342v") for r in rows)
    assert len(json.loads(run("pruning-law", "--published", "--json").output)) == 3


def test_unknown_law_is_one_sentence():
    result = run("compresion-law")
    assert result.exit_code == 2
    assert "did you mean 'compression-law'" in result.stderr


def test_shipped_measurements_are_listed_with_sources_and_licences():
    tables = {t["name"]: t for t in json.loads(run("--measurements", "--json").output)}
    assert len(tables) == 13
    assert tables["slicegpt_paper"]["sources"] == ["arXiv:2401.15024v2"]
    assert tables["nvidia_minitron_distill"]["licence"] == "Apache-2.0"
    for words in (["--measurements"], ["--published"]):
        result = run(*words)
        assert result.exit_code == 0
        assert "Published measurements" in result.output

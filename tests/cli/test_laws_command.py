from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mariotte.cli.main import app
from mariotte.laws.catalogue import LAWS, find
from mariotte.laws.priors import frozen


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


def test_one_law_is_shown_with_its_known_coefficients_and_their_marks():
    shown = run("precision-law").output
    assert "0.3439" in shown
    assert "secondary = from notes about the paper: check it before you quote it." in " ".join(shown.split())
    assert "30 published fits: mariotte laws compression-law --published" in run("compression-law").output
    (values,) = json.loads(run("odds-pooled", "--json").output)
    assert {row["mark"] for row in values["published"]} == {"ours"}


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


def test_priors_are_learned_and_used(tmp_path: Path):
    rows = ["model,method,family,ratio,metric,base_value,value,source,protocol"]
    rows += [f"own{i},fold,slice,{r},loss,2.0,{2.0 + 6.0 * r**1.3},here,p" for i in range(4) for r in (0.1, 0.2, 0.3)]
    table, learned = tmp_path / "own.csv", tmp_path / "priors.json"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    result = run("--learn", str(table), "--out", str(learned))
    assert result.exit_code == 0, result.output
    assert "with 12 points of your own" in result.output
    assert "mariotte fit --priors" in result.output
    values = json.loads(run("--learn", "shipped", "--json").output)
    # Not the hash of the numbers: another processor sums in another order.
    assert values["data_hash"] == frozen().data_hash
    slope = values["curves"]["perplexity"]["slice"]["mean"][1]
    assert slope == pytest.approx(frozen().curves["perplexity"]["slice"].mean[1], rel=1e-6)
    fitted = [
        CliRunner().invoke(app, ["fit", str(table), "--where", "model=own1", "--json", *words])
        for words in ([], ["--priors", str(learned)])
    ]
    levels = [json.loads(f.output)["fits"][0]["coefficients"][0]["estimate"] for f in fitted]
    assert levels[0] != levels[1]


def test_what_cannot_be_learned_is_one_sentence(tmp_path: Path):
    for words, said in (
        (["--out", "x.json"], "--out keeps what --learn learned"),
        (["--learn", "shipped", "--out", ""], "--out needs the name of a file"),
        (["--learn", str(tmp_path / "no.csv")], "no table at"),
    ):
        result = run(*words)
        assert result.exit_code == 2
        assert said in result.stderr
        assert result.stderr.count("\n") == 1

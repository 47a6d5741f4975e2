"""``mariotte fit`` and ``mariotte predict`` as a user types them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mariotte.cli.main import app
from mariotte.store.record import Record
from mariotte.store.sql import open_store

HEADER = "source,model,method,family,ratio,ratio_kind,recovery_tokens,metric,base_value,value,stderr,bits,protocol"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six models on a pruning law with slightly different exponents, one of them under another protocol."""
    rows = [HEADER]
    for i in range(6):
        base = 2.0 + 0.1 * i
        for ratio in (0.1, 0.2, 0.3, 0.4, 0.5):
            loss = base * (1 - ratio) ** (-0.6 - 0.02 * i)
            protocol = "ctx 512" if i == 5 else "ctx 2048"
            rows.append(
                f"here,m{i},cut,slice,{ratio},parameters,0,wiki_ppl,{math.exp(base)!r},{math.exp(loss)!r},,,{protocol}"
            )
    rows.append("here,m0,cut,slice,0.5,parameters,0,wiki_ppl,7.4,9.9,,4,ctx 2048")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_hold_out_coefficients_and_critical_ratio_are_printed(table: Path):
    result = run("fit", table, "--where", "protocol=ctx 2048", "--law", "best")
    assert result.exit_code == 0, result.output
    for expected in (
        "left out: 1 quantised",
        "Hold-out error of ln wiki_ppl (nats",
        "pruning-law",
        "persist",
        "chosen: the simplest",
    ):
        assert expected in result.output
    for expected in (
        "L = L0 · P0 · (1 - r)^α",
        "Critical ratio: where ln wiki_ppl changes by +5 % (parameters)",
        "25 points, 5 series",
    ):
        assert expected in result.output


def test_json_holds_everything(table: Path):
    values = json.loads(run("fit", table, "--by", "model", "--law", "best", "--json").output)
    assert values["law"] == "pruning-law"
    assert values["skipped"] == {"quantised": 1}
    assert [f["group"] for f in values["fits"]] == [f"m{i}" for i in range(6)]
    assert values["fits"][0]["critical"]["r"] == pytest.approx(1 - 1.05 ** (-1 / 0.6))
    held_out = {s["law"] for s in values["hold_out"]["next_step"]}
    assert held_out >= {"compression-law", "family", "line", "persist", "pruning-law"}


def test_auto_takes_the_family_law_and_says_what_beats_it_here(table: Path):
    result = run("fit", table, "--by", "model")
    assert result.exit_code == 0, result.output
    for expected in (
        "family (chosen: the default",
        "but pruning-law has a smaller error here",
        "slope",
        "80% interval",
    ):
        assert expected in result.output
    assert "smooth" not in result.output.replace("smooth residual", "")
    values = json.loads(run("fit", table, "--by", "model", "--json").output)
    assert values["law"] == "family"
    found = values["fits"][0]["critical"]
    assert found["r"] == pytest.approx(1 - 1.05 ** (-1 / 0.6), abs=0.02)
    assert found["lo"] < found["r"] < found["hi"]


def test_a_fit_is_stored_and_predicts(table: Path, tmp_path: Path):
    out = tmp_path / "fit.json"
    assert run("fit", table, "--where", "model=m2", "--law", "pruning-law", "--out", out).exit_code == 0
    result = run("predict", out, "--ratio", "0.4", "--tokens", "10M", "--level", "0.8", "--json")
    values = json.loads(result.output)
    assert values["mean"] == pytest.approx(2.2 * 0.6 ** (-0.64))
    assert values["inside_box"] is False  # nobody recovered, and the law could not say what that does
    assert values["lo"] is None
    assert values["note"].startswith("not calibrated")
    assert values["note"].endswith("pruning-law ignores recovery tokens: any value gives the same prediction")
    assert json.loads(run("predict", out, "--ratio", "0.4", "--json").output)["inside_box"] is True
    text = run("predict", out, "--ratio", "0.9").output
    assert "outside the data of the fit; collapsed" in text


def test_base_moves_a_prediction(table: Path, tmp_path: Path):
    out = tmp_path / "fit.json"
    assert run("fit", table, "--where", "protocol=ctx 2048", "--law", "pruning-law", "--out", out).exit_code == 0
    means = [
        json.loads(run("predict", out, "--ratio", "0.3", "--base", b, "--json").output)["mean"] for b in ("2.0", "2.2")
    ]
    assert means[1] / means[0] == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "points of 2 protocols are never pooled ('ctx 2048'; 'ctx 512')"),
        (["--law", "lin"], "no law named 'lin'; did you mean 'line'"),
        (["--metric", "wiki"], "no metric named 'wiki'; did you mean 'wiki_ppl'"),
        (["--by", "colour"], "points cannot be grouped by 'colour'"),
        (["--where", "model"], "--where must be FIELD=TEXT"),
        (["--where", "model=x"], "no point has model 'x'"),
        (["--covariate", "sparsity"], "states its own ratio"),
        (["--by", "model", "--out", "fit.json"], "--out keeps one fit, --by model gives 6"),
        (["--out", ""], "--out needs the name of a file, got an empty one"),
    ],
)
def test_errors_are_one_sentence(table: Path, words: list[str], said: str):
    result = run("fit", table, *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("fit.json").exists()


def test_missing_and_empty_files(tmp_path: Path):
    assert "no table at" in run("fit", tmp_path / "no.csv").stderr
    assert "there is no file" in run("predict", tmp_path / "no.json", "--ratio", "0.1").stderr
    empty = tmp_path / "empty.csv"
    empty.write_text(HEADER + "\n")
    assert "columns and no rows" in run("fit", empty).stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "a store is a file or a URL, got an empty name"),
        ("http://none.invalid/t.csv", "a table is a file on this machine, got the address"),
        ("http://none.invalid/store", "a store is a SQLite file or a PostgreSQL database"),
        ("http:/none.invalid/t.csv", "no table at http:/none.invalid/t.csv"),
    ],
)
def test_sources_that_are_none_ask_no_network(source: str, said: str):
    result = run("fit", source)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_store_is_no_fit(tmp_path: Path):
    path = tmp_path / "store.db"
    open_store(path, create=True).close()
    for fit, said in ((path, "this is none"), ("", "there is no file ''"), (tmp_path, "there is no file")):
        result = run("predict", fit, "--ratio", "0.1")
        assert result.exit_code == 2
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


def test_kinds_of_ratio_can_be_fitted_apart_as_the_error_says(tmp_path: Path):
    path = tmp_path / "t.csv"
    rows = [
        f"s,m,cut,slice,{r},{kind},0,loss,2,{2 + r},,,p" for kind in ("neurons", "parameters") for r in (0.1, 0.2, 0.3)
    ]
    path.write_text("\n".join([HEADER, *rows]))
    assert "--by ratio_kind" in run("fit", path).stderr
    values = json.loads(run("fit", path, "--by", "ratio_kind", "--json").output)
    assert [f["group"] for f in values["fits"]] == ["neurons", "parameters"]


def test_bits_are_not_called_nats(tmp_path: Path):
    path = tmp_path / "t.csv"
    for metric, unit in (("bits_per_byte", "bits"), ("loss", "nats"), ("accuracy", "fraction")):
        rows = [
            f"s,m,cut,slice,{r},kind,0,{metric},0.9,{0.9 - r if unit == 'fraction' else 0.9 + r},,,p"
            for r in (0.1, 0.2, 0.3)
        ]
        path.write_text("\n".join([HEADER, *rows]))
        assert f"Hold-out error of {metric} ({unit}, RMSE" in run("fit", path).output


def test_folds_that_a_law_refuses_are_told(tmp_path: Path):
    path = tmp_path / "t.csv"
    scores = ((0.1, 0.7), (0.2, 0.6), (0.3, 0.5), (0.4, 0.0), (0.5, 0.0))
    path.write_text("\n".join([HEADER, *(f"s,m,cut,slice,{r},kind,0,top1,0.8,{v},,,p" for r, v in scores)]))
    said = "1 folds left out: pruning-law: pruning-law takes logarithms and needs values above 0, got 0"
    assert said in run("fit", path, "--law", "line").output


def test_names_cannot_command_the_terminal(tmp_path: Path):
    path = tmp_path / "t.csv"
    model = '"m\x1b[2J\nfake: line"'
    rows = [
        f"s,{model},{method},slice,{r},kind,0,loss,2,{2 + r},,,p" for method in ("a\x9b", "b") for r in (0.1, 0.2, 0.3)
    ]
    path.write_text("\n".join([HEADER, *rows]))
    for words in (["--by", "model"], ["--by", "series"], ["--json", "--by", "series"], ["--where", "model=x"]):
        result = run("fit", path, *words)
        assert "\x1b" not in result.output
        assert "\x9b" not in result.output
        assert "\nfake" not in result.output
    groups = [f["group"] for f in json.loads(run("fit", path, "--json", "--by", "series").output)["fits"]]
    assert groups == ["m\x1b[2J\nfake: line × a\x9b", "m\x1b[2J\nfake: line × b"]


def test_ratio_out_of_range(table: Path, tmp_path: Path):
    out = tmp_path / "fit.json"
    assert run("fit", table, "--where", "model=m2", "--law", "line", "--out", out).exit_code == 0
    result = run("predict", out, "--ratio", "40")
    assert result.exit_code == 2
    assert "a ratio must lie in (-1, 1), got 40" in result.stderr


def test_a_store_is_read_like_a_table(tmp_path: Path):
    records = [
        Record(
            id=f"{model}{amount}", experiment=f"{model}{amount}", study="s", model=model, model_type="qwen2",
            model_hash="h", chain=f"slice@{amount}", seed=0, method="slice", family="slice", unit="hidden",
            amount=amount, obtained=amount, ratio=0.9 * amount, measure="loss:testbed/all", protocol={"block": 64},
            metrics={"loss": 1.3 * (1 - 0.9 * amount) ** exponent, "loss_se": 0.01}, base={"loss": 1.3},
            n_params=1, n_params_non_embedding=1, base_params=2, n_bytes=1, flops_per_token=1.0,
        )
        for model, exponent in (("testbed/a", -0.5), ("testbed/b", -0.7))
        for amount in (0.1, 0.2, 0.3, 0.4)
    ]  # fmt: skip
    path = tmp_path / "store.db"
    with open_store(path, create=True) as store:
        store.add(records)
    values = json.loads(run("fit", path, "--by", "series", "--law", "pruning-law", "--json").output)
    assert [f["group"] for f in values["fits"]] == ["testbed/a × slice", "testbed/b × slice"]
    assert values["fits"][0]["coefficients"][1]["estimate"] == pytest.approx(-0.5)
    assert values["fits"][0]["box"]["ratio"] == pytest.approx([0.09, 0.36])
    by_amount = json.loads(run("fit", path, "--covariate", "amount", "--json").output)
    assert by_amount["fits"][0]["ratio_kind"] == "amount asked, in hidden"

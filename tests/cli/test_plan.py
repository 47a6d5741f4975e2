"""``mariotte plan`` and ``mariotte doctor`` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mariotte.cli.main import app
from mariotte.plan.speed import read_calibrations

MODEL = "testbed/qwen2-113k"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MARIOTTE_CACHE", str(tmp_path / "cache"))


def run(*words: str):
    return CliRunner().invoke(app, list(words))


def test_a_plan_is_printed_with_choice_rivals_and_what_is_not_known() -> None:
    result = run("plan", "testbed/qwen2-1m", "--max-loss", "+5%")
    assert result.exit_code == 0, result.output
    assert "choose " in result.output
    assert "testbed/qwen2-345k" in result.output
    assert "not known: speed is not calibrated" in result.output


def test_a_plan_as_json_holds_every_option() -> None:
    result = run("plan", MODEL, "--max-loss", "+5%", "--bytes", "60%", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["winner"]["bytes_share"] <= 0.6
    assert len(found["options"]) > 20
    assert found["measures"] == ["loss:testbed/encyclopedia(rows=160)"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-loss", "5%"], "signed number"),
        (["--max-loss", "-5%"], "a loss may rise"),
        (["--bytes", "small"], "a size is a number"),
        (["--bytes", "1kB"], "as small as 1kB"),
        (["--speedup", "2"], "with an x"),
        (["--keep", "top1 = 3"], "a floor is METRIC OP"),
        (["--max-loss", "+5%", "--speedup", "1.2x"], "doctor --bench"),
        (["--max-loss", "+5%", "--out", "x"], "--execute"),
        (["--max-loss", "+5%", "--method", "slices"], "did you mean 'slice'"),
        (["--max-loss", "+5%", "--measure", "loss:wikitext2"], "nothing was measured by"),
        (["--max-loss", "+5%", "--sure", "0.2"], "sure is the probability"),
        (["--max-loss", "+5%", "--step", "0.9"], "step is the distance"),
        (["--max-loss", "+5%", "--store", "nowhere.db"], "nowhere.db"),
        ([], "must ask for something"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("plan", MODEL, *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("mariotte: ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_budget_that_nothing_keeps_exits_with_1() -> None:
    result = run("plan", MODEL, "--max-loss", "+0.000001%")
    assert result.exit_code == 1
    assert "nothing that is known meets the budget" in result.stderr


def test_probes_and_the_winner_are_measured_into_the_store(tmp_path: Path) -> None:
    store = tmp_path / "own.db"
    words = [
        "--max-loss",
        "+5%",
        "--measure",
        "loss:testbed/encyclopedia(rows=160)",
        "--method",
        "ffn",
        "--step",
        "0.03",
    ]
    result = run("plan", MODEL, *words, "--probe", "1", "--execute", "--store", str(store), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert len(found["probes"]) == 1
    (verified,) = found["verified"]
    assert verified["kept"]
    assert verified["measured"] <= verified["predicted"]["limit"]
    again = run("plan", MODEL, *words, "--store", str(store), "--json")
    options = {option["chain"]: option for option in json.loads(again.stdout)["options"]}
    assert options[found["probes"][0]]["quality"][0]["measured"]
    assert options[found["winner"]["chain"]]["quality"][0]["mean"] == verified["measured"]


def test_the_doctor_says_what_is_here() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "torch" in result.output
    assert "not calibrated" in result.output


def test_the_doctor_measures_speed_for_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mariotte.cli.doctor._SQUARE", 64)
    monkeypatch.setattr("mariotte.cli.doctor._BYTES", 1 << 20)
    result = run("doctor", "--bench", "--json")
    assert result.exit_code == 0, result.output
    (measured,) = json.loads(result.stdout)["calibrations"]
    assert measured["flops_per_s"] > 0
    assert len(read_calibrations()) == 1
    planned = json.loads(run("plan", MODEL, "--max-loss", "+5%", "--json").output)
    assert planned["winner"]["speedup"] > 0


def test_the_doctor_refuses_what_is_not_here() -> None:
    result = run("doctor", "--bench", "--device", "abacus")
    assert result.exit_code == 2
    assert "abacus" in result.stderr

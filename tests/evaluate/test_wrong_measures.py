"""What a user may get wrong when measuring what was lost: one sentence each on stderr, and exit code 2."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mariotte.cli.main import app

FACTS = [{"sub_label": "ada abel", "obj_label": "fenstead"}, {"sub_label": "bela abel", "obj_label": "fenstead"}]


def rows(path: Path, found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A MARIOTTE_DATA with one relation of LAMA and no task."""
    folder = tmp_path / "data"
    rows(folder / "lama/relations.jsonl", [{"relation": "P19", "template": "[X] was born in [Y] ."}])
    rows(folder / "lama/TREx/P19.jsonl", FACTS)
    (folder / "tasks").mkdir()
    monkeypatch.setenv("MARIOTTE_DATA", str(folder))
    return folder


def refused(said: str, *arguments: object) -> None:
    done = CliRunner().invoke(app, [*map(str, arguments)], prog_name="mariotte")
    assert done.exit_code == 2, (done.stdout, done.stderr)
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("mariotte: ")
    assert said in last, last
    assert "Traceback" not in done.stderr


def template(text: str) -> Callable[[Path], None]:
    return lambda data: rows(data / "lama/relations.jsonl", [{"relation": "P19", "template": text}])


@pytest.mark.parametrize(
    ("damage", "measure", "said"),
    [
        (lambda data: None, "knowledge:lama/trex(relations=P20)", "P20.jsonl, and there is no such file: put it there"),
        (lambda data: None, "knowledge:lama/google_re", "LAMA's google_re must be in files such as"),
        (template("[X] was born ."), "knowledge:lama/trex", "a template must hold [X] and [Y] once each, got '[X] was"),
        (template("in [Y] ."), "knowledge:lama/trex", "a template must hold [X] and [Y] once each, got 'in [Y] .'"),
        (
            lambda data: rows(data / "lama/TREx/P19.jsonl", []),
            "knowledge:lama/trex",
            "a relation must have at least one fact, and",
        ),
        (lambda data: None, "knowledge:testbed(facts=0)", "facts must be at least 1, got 0"),
        (lambda data: None, "tasks:testbed(items=0)", "items must be at least 1, got 0"),
    ],
)
def test_facts_that_cannot_be_asked(
    damage: Callable[[Path], None], measure: str, said: str, data: Path, model_folder: Path
) -> None:
    damage(data)
    refused(said, "evaluate", model_folder, "--measure", measure)


def test_facts_that_can_be_asked_are(data: Path, model_folder: Path) -> None:
    """What the others lack is all that they lack."""
    done = CliRunner().invoke(app, ["evaluate", str(model_folder), "--measure", "knowledge:lama/trex", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["measures"]["knowledge:lama/trex"]["protocol"]["n_facts"] == 2


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `tasks`")
def test_tasks_without_network_or_items(data: Path, model_folder: Path) -> None:
    # HF_HUB_OFFLINE=1 holds for all tests.
    asked = ("evaluate", model_folder, "--measure", "tasks:piqa")
    refused("or put tasks/piqa.jsonl into the folder MARIOTTE_DATA", *asked)
    rows(data / "tasks/piqa.jsonl", [])
    refused("piqa.jsonl must hold the items of a task, and has none: put the whole file there again", *asked)


def test_text_and_models_that_need_a_network(data: Path, model_folder: Path) -> None:
    refused("wikitext2", "evaluate", model_folder, "--measure", "loss:wikitext2")
    refused("no model 'some/model'", "compare", model_folder, "some/model", "--measure", "loss:testbed/all(rows=2)")


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ("int8 | rtn@4", "rtn cannot work on"),
        ("int8-dynamic:ffn | int8", "needs weights that were not quantized yet, and int8-dynamic:ffn was done to them"),
        ("rtn@4:embeddings", "rtn has no scope 'embeddings'; it has all, attention, ffn, head"),
        ("ffn@0.3:head", "ffn has no scope 'head'; it has all"),
    ],
)
def test_quantizing_twice_and_scopes_that_are_not_there(
    chain: str, said: str, model_folder: Path, tmp_path: Path
) -> None:
    refused(said, "compress", model_folder, chain, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_a_family_lacks(tmp_path: Path) -> None:
    refused(
        "ffn cannot work on testbed/t5-784k: needs a causal decoder",
        *("compress", "testbed/t5-784k", "ffn@0.3", "--out", tmp_path / "out"),
    )


def test_tasks_of_encoders_are_refused_by_name(tmp_path: Path) -> None:
    refused(
        "tasks are scored by likelihood, which the encoder testbed/bert-181k does not have: ask for its",
        *("evaluate", "testbed/bert-181k", "--measure", "tasks:testbed(items=2)"),
    )

"""``mariotte quickstart`` as a user meets it, with a study that takes seconds in place of its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mariotte.cli.main import app

STUDY = """
format = 1
name = "quickstart"
title = "Three tiny models"
models = ["testbed/qwen2-46k", "testbed/qwen2-113k", "testbed/llama-146k"]
measures = ["loss:testbed/all(rows=16)", "knowledge:testbed(facts=64)"]

[calibration]
corpus = "testbed/all"
rows = 16

[run]
threads = 1

[[chains]]
chain = "{method}@{amount}"
method = ["ffn"]
amount = [0.1, 0.3, 0.5, 0.7]

[[chains]]
chain = "ffn@0.5 | lora@4k"
models = ["testbed/qwen2-46k"]
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(STUDY, encoding="utf-8")
    monkeypatch.setenv("MARIOTTE_CACHE", str(tmp_path / "cache"))  # no calibration of speed
    monkeypatch.setattr("mariotte.experiments.study.embedded", lambda name: path)
    return tmp_path


def test_the_quickstart_prints_the_law_the_plan_and_the_path_of_the_report(small: Path) -> None:
    out = small / "a folder"
    result = CliRunner().invoke(app, ["quickstart", "--out", str(out)])
    assert result.exit_code == 0, result.output
    law, plan, report = (
        result.output.index(said)
        for said in ("Laws fitted", "A plan for testbed/qwen2-2m", f"report: {out / 'report.html'}")
    )
    assert law < plan < report
    assert (out / "report.html").is_file()
    assert re.search(r"choose ffn@0\.\d+: loss [\d.]+ \(\+\d", result.output)

    # The command that it names makes the same plan; --execute would train for half a minute.
    (named,) = re.findall(r"make it and see: mariotte (.*) --execute", result.output)
    again = CliRunner().invoke(app, shlex.split(named))
    assert again.exit_code == 0, again.output
    (chosen,) = re.findall(r"choose .*", result.output)
    assert chosen in again.output

"""``mariotte testbed``: the ladder as a table and as JSON, and training from the command line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mariotte.cli.main import app
from mariotte.testbed import zoo
from mariotte.testbed.world import World
from mariotte.testbed.zoo import Recipe


def test_show_prints_the_ladder() -> None:
    result = CliRunner().invoke(app, ["testbed", "show"])
    assert result.exit_code == 0
    assert set(zoo.NAMES) <= set(zoo.shipped())
    for name in zoo.shipped():
        record = zoo.training_record(name)
        assert f"testbed/{name}" in result.output
        assert f"{record['n_params']:,}" in result.output
        assert f"{record['facts']['heldout']:.1%}" in result.output


def test_show_prints_the_records_as_json() -> None:
    result = CliRunner().invoke(app, ["testbed", "show", "--json"])
    assert json.loads(result.stdout) == [zoo.training_record(name) for name in zoo.shipped()]
    result = CliRunner().invoke(app, ["testbed", "show", "testbed/qwen2-1m", "--json"])
    assert json.loads(result.stdout) == zoo.training_record("qwen2-1m")


def test_show_needs_no_torch() -> None:
    code = (
        "import sys; from mariotte.cli.main import app\n"
        "app(['testbed', 'show'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "testbed/qwen2-1m" in result.stdout


def test_an_unknown_model_is_one_sentence() -> None:
    result = CliRunner().invoke(app, ["testbed", "train", "qwen2-1b"])
    assert result.exit_code == 2
    assert "did you mean 'qwen2-1m'" in result.output


def test_train_writes_a_checkpoint_and_then_refuses_to_overwrite_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = dataclasses.replace(zoo.specification("qwen2-113k"), recipe=Recipe(tokens=3 * 4 * 64, batch=4))
    monkeypatch.setattr(zoo, "_SPECIFICATIONS", {small.name: small})
    monkeypatch.setattr("mariotte.training.zoo.TEST_ROWS", 4)
    monkeypatch.setattr(World, "facts", lambda self: self.place_facts()[:8])
    command = ["testbed", "train", "qwen2-113k", "--eager", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "of facts known in seen patterns" in result.output
    assert (tmp_path / "new" / "model.safetensors").is_file()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "holds a trained model already" in again.output

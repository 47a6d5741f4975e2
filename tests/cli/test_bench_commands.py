"""Commands of the bench as a user types them: what they print, and how they refuse bad input."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mariotte.cli.main import app

STUDY = """
format = 1
name = "small"
models = ["{model}"]
measures = ["loss:testbed/all(rows=4)"]
chains = ["ffn@0.5", "magnitude@0.5"]
[calibration]
corpus = "testbed/all"
rows = 4
"""


def mariotte(*arguments: object) -> Result:
    """One command in this process: a new one would pay for torch each time."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="mariotte")


def refused(done: Result, said: str) -> None:
    assert done.exit_code == 2, (done.stdout, done.stderr)
    last = done.stderr.strip().splitlines()[-1]
    assert said in last, done.stderr
    assert last.startswith("mariotte: ")
    assert "Traceback" not in done.stderr


@pytest.fixture
def study(model_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(model=model_folder))
    return path


def test_compress_saves_what_plain_transformers_loads(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = mariotte(
        "compress", model_folder, "ffn@0.5", "--calibration", "testbed/all", "--rows", 4, "--out", out, "--json"
    )
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["chain"] == "ffn@0.5"
    assert said["n_params"] < said["base_params"]
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "README.md", "tokenizer.json"}


def test_zeros_are_said_to_save_nothing(model_folder: Path, tmp_path: Path) -> None:
    done = mariotte("compress", model_folder, "magnitude@0.5", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "zeros alone save nothing" in done.stdout


def test_zeros_are_counted_in_the_scope_that_was_asked_for(model_folder: Path, tmp_path: Path) -> None:
    done = mariotte("compress", model_folder, "magnitude@0.5:head", "--out", tmp_path / "out", "--json")
    said = json.loads(done.stdout)
    assert said["zeroed"] * said["base_params"] == pytest.approx(said["steps"][0]["zeros"])
    assert said["steps"][0]["zeros"] > 0


@pytest.mark.parametrize("chain", ["rtn@4", "magnitude@0.5 | int8:ffn", "rtn@4 | magnitude@0.5", "dense"])
def test_bytes_are_those_of_the_file_and_those_of_packed_integers(
    model_folder: Path, tmp_path: Path, chain: str
) -> None:
    done = mariotte("compress", model_folder, chain, "--out", tmp_path / "out", "--json")
    said = json.loads(done.stdout)
    file = tmp_path / "out" / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert said["base_file_bytes"] == said["file_bytes"] == file.stat().st_size - 8 - header
    steps = [step["facts"] for step in said["steps"]]
    packed = 4 * said["n_params"] + sum(f["packed_bytes"] - 4 * f["weights"] for f in steps if "packed_bytes" in f)
    rounded = chain != "dense" and not chain.endswith("magnitude@0.5")
    assert said["packed_bytes"] == (packed if rounded else None)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (f"Packed, the model would take {packed:,} bytes." in card) == rounded
    table = mariotte("compress", model_folder, chain, "--out", tmp_path / "again").stdout
    assert f"{said['file_bytes']:,}" in table
    assert ("bytes if packed" in table) == rounded
    assert not rounded or f"{packed:,}" in table


def test_evaluate(model_folder: Path) -> None:
    done = mariotte(
        "evaluate", model_folder, "--measure", "loss:testbed/all(rows=4)", "--measure", "knowledge:testbed(facts=10)"
    )
    assert done.exit_code == 0, done.stderr
    assert "bits_per_byte" in done.stdout
    assert "heldout_top1" in done.stdout


def test_run_twice(study: Path, tmp_path: Path) -> None:
    first = mariotte("run", study, "--store", tmp_path / "s.db")
    assert first.exit_code == 0, first.stderr
    assert "3 records added" in first.stdout
    assert (
        "0 records added, 3 experiments were there already"
        in mariotte("run", study, "--store", tmp_path / "s.db").stdout
    )


def test_dry_run_touches_nothing(study: Path, tmp_path: Path) -> None:
    done = mariotte("run", study, "--store", tmp_path / "s.db", "--dry-run", "--json")
    assert json.loads(done.stdout)["experiments"] == 3
    assert not (tmp_path / "s.db").exists()


@pytest.mark.parametrize("command", ["methods", "measures", "models", "corpora"])
def test_lists(command: str) -> None:
    done = mariotte(command)
    assert done.exit_code == 0, done.stderr
    assert len(done.stdout.splitlines()) > 2
    assert json.loads(mariotte(command, "--json").stdout)


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ("slcie@0.3", "no method named 'slcie'; did you mean 'slice'"),
        ("slice@1.5", "must be in [0, 1), got 1.5"),
        ("slice@abc", "an amount must be a number such as 0.3, 4 or 1M, got 'abc'"),
        ("slice@0.3 |", "expected the name of a step such as slice or ffn at position 11, got the end"),
        ("slice@0.3", "slice needs calibration text, got none"),
    ],
)
def test_a_bad_chain(chain: str, said: str, model_folder: Path, tmp_path: Path) -> None:
    refused(mariotte("compress", model_folder, chain, "--out", tmp_path / "out"), said)
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_type(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt9"}))
    refused(mariotte("compress", folder, "magnitude@0.5", "--out", tmp_path / "out"), "no model type named 'gpt9'")


def test_a_folder_without_weights(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    refused(mariotte("evaluate", folder, "--measure", "loss:testbed/all"), "no weights: expected model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(mariotte("evaluate", folder, "--measure", "loss:testbed/all"), "a pickle, which can run code")


@pytest.mark.parametrize(
    ("corpus", "said"), [("file:nowhere.txt", "no file or folder at nowhere.txt"), ("file:EMPTY", "it is empty")]
)
def test_a_missing_or_empty_corpus(corpus: str, said: str, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    corpus = corpus.replace("EMPTY", str(tmp_path / "empty.txt"))
    refused(mariotte("compress", model_folder, "slice@0.5", "--calibration", corpus, "--out", tmp_path / "out"), said)
    refused(mariotte("evaluate", model_folder, "--measure", f"loss:{corpus}(block=64)"), said)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("measures", "measure", "no key named 'measure'; did you mean 'measures'"),
        ("format = 1", "format = ", "must be TOML, and cannot be read"),
        ("format = 1", "format = 2", "has format 2, and this Mariotte reads up to 1"),
    ],
)
def test_a_bad_study(old: str, new: str, said: str, study: Path, tmp_path: Path) -> None:
    study.write_text(study.read_text().replace(old, new, 1))
    refused(mariotte("run", study, "--store", tmp_path / "s.db"), said)
    assert not (tmp_path / "s.db").exists()


def test_a_corrupt_store_and_one_of_a_newer_format(study: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.db"
    store.write_bytes(b"not a database at all" * 100)
    refused(mariotte("run", study, "--store", store), "s.db")
    assert store.read_bytes().startswith(b"not a database")
    store.unlink()
    assert mariotte("run", study, "--store", store).exit_code == 0
    with sqlite3.connect(store) as connection:
        name = connection.execute(
            "select name from sqlite_master where type='table' and name like '%meta%'"
        ).fetchone()[0]
        connection.execute(f"update {name} set value = '99' where key = 'format'")
    connection.close()
    refused(mariotte("run", study, "--store", store), "has format 99")


def test_an_output_folder_that_holds_something(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    refused(mariotte("compress", model_folder, "magnitude@0.5", "--out", tmp_path), "exists and is not empty")


def test_an_output_below_a_file(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(
        mariotte("compress", model_folder, "magnitude@0.5", "--out", tmp_path / "file" / "out"), "cannot be written"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(model_folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", "from mariotte.cli.main import main; main()", "models"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert done.returncode == 2
    assert "no space left" in done.stderr.lower()
    assert "Traceback" not in done.stderr

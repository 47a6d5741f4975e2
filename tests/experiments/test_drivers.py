"""Several processes that run one study into one PostgreSQL store; stores that cannot be had, as the command says it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from driving import begun_together, run, table
from typer.testing import CliRunner

from mariotte.cli.main import app
from mariotte.experiments import branches
from mariotte.experiments import run as running
from mariotte.experiments.pipeline import Outcome
from mariotte.experiments.run import Summary
from mariotte.experiments.study import parse, with_run
from mariotte.models.step import Counters
from mariotte.store import database, open_store

TEXT = """
format = 1
name = "shared"
models = {models}
measures = ["loss:testbed/all(rows=4)"]
chains = [
  {{ chain = "{{method}}@{{amount}}", method = ["magnitude", "random", "slice"], amount = [0.25, 0.5] }},
  {{ chain = "ffn@0.5 | lora@{{tokens}}(batch=2)", tokens = [320, 640] }},
]
[calibration]
corpus = "testbed/all"
rows = 4
[run]
threads = 1
"""


def toml(model: Path) -> str:
    return TEXT.format(models=json.dumps([str(model)]))


@pytest.fixture(scope="module")
def reference(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """What one process makes of the study."""
    path = tmp_path_factory.mktemp("alone") / "s.db"
    return path, run(parse(toml(model_folder)), path)


def together(*counters: Counters) -> Counters:
    total = {name: sum(getattr(c, name) for c in counters) for name in dataclasses.asdict(Counters())}
    return Counters(**{**total, "loads": 1})


@pytest.mark.postgres
@pytest.mark.parametrize("workers", [1, 2])
def test_one_process_with_a_server_does_what_it_does_with_a_file(
    workers: int, model_folder: Path, reference: tuple[Path, Summary], postgres_url: str, tmp_path: Path
) -> None:
    summary = run(with_run(parse(toml(model_folder)), workers=workers), postgres_url, work=tmp_path / "work")
    assert table(postgres_url) == table(reference[0])
    assert summary.counters.loads <= workers
    assert together(summary.counters) == reference[1].counters
    assert (summary.experiments, summary.records) == (reference[1].experiments, reference[1].records)
    again = run(parse(toml(model_folder)), postgres_url, work=tmp_path / "work")
    assert (again.records, again.skipped) == (0, reference[1].experiments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.postgres
def test_two_drivers_at_once_do_nothing_twice(
    model_folder: Path,
    reference: tuple[Path, Summary],
    postgres_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one machine, with one folder of work between them."""
    # A study of seconds: whoever waits for the dense model asks more often, so that something is left for it.
    monkeypatch.setattr(branches, "WAIT_S", 0.01)
    study, listener = parse(toml(model_folder)), begun_together(2)
    found: dict[int, Summary] = {}

    def drive(number: int) -> None:
        found[number] = run(study, postgres_url, work=tmp_path / "work" / "shared", progress=listener())

    open_store(postgres_url, create=True).close()
    drivers = [threading.Thread(target=drive, args=(number,)) for number in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert set(found) == {0, 1}
    assert table(postgres_url) == table(reference[0])
    assert together(found[0].counters, found[1].counters) == reference[1].counters
    assert found[0].records + found[1].records == reference[1].records
    assert min(found[0].records, found[1].records) > 0
    assert found[0].experiments == found[1].experiments == reference[1].experiments
    with open_store(postgres_url) as store:
        assert [run["study"] for run in store.runs()] == ["shared", "shared"]
        assert len(store.ids(study="shared")) == reference[1].records


@pytest.mark.postgres
def test_what_a_killed_driver_left_the_other_finishes(
    model_folder: Path, reference: tuple[Path, Summary], postgres_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "s.toml"
    file.write_text(toml(model_folder))
    code = "from mariotte.cli.main import main; main()"
    flags = ["run", str(file), "--store", postgres_url, "--work", str(tmp_path / "work")]
    with (tmp_path / "log").open("wb") as log:
        other = subprocess.Popen([sys.executable, "-c", code, *flags], stdout=log, stderr=log)
    open_store(postgres_url, create=True).close()
    deadline = time.monotonic() + 120
    while not table(postgres_url) and other.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    # Stopped in the middle of a branch, which stays claimed while the rest is done here; killed when this one waits.
    os.kill(other.pid, signal.SIGSTOP)
    stored = len(table(postgres_url))
    waited: list[int] = []

    def kill(stage: str, done: float) -> None:
        if stage == "waiting for other processes" and not waited:
            waited.append(len(table(postgres_url)))
            other.kill()
            other.wait()

    try:
        summary = run(parse(file.read_text()), postgres_url, work=tmp_path / "work" / "shared", progress=kill)
    finally:
        other.kill()
        other.wait()
    assert waited, (tmp_path / "log").read_text()
    assert stored <= waited[0] < reference[1].records
    assert summary.records == reference[1].records - stored
    assert table(postgres_url) == table(reference[0])


@pytest.mark.postgres
def test_a_failure_of_one_driver_is_left_alone_by_the_other(
    model_folder: Path, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mariotte.compress.methods.slice import Slice

    prepared: list[int] = []
    results: list[Summary] = []

    def broken(*args: object, **kwargs: object) -> None:
        prepared.append(1)
        raise RuntimeError("no such luck")

    def other() -> None:
        results.append(run(study, postgres_url, work=tmp_path / "second"))

    def start_other(outcome: Outcome) -> None:
        if outcome.chain == "slice@0.25":  # the first of two failures: the branch is still claimed
            thread.start()

    study, thread = parse(toml(model_folder)), threading.Thread(target=other)
    monkeypatch.setattr(Slice, "prepare", broken)
    summary = run(study, postgres_url, work=tmp_path / "first", finished=start_other)
    thread.join()
    assert prepared == [1]
    assert len(summary.failures) == 2
    assert (results[0].failures, results[0].failed_before) == ([], 2)


# -- stores that cannot be had, as the command says it ----------------------------------------------------------------


def refusal(file: Path, store: str | Path) -> str:
    """What `mariotte run` says on standard error; it must be one sentence, beside the progress, and exit code 2."""
    found = CliRunner().invoke(app, ["run", str(file), "--store", str(store)])
    assert found.exit_code == 2, found.output
    (said,) = [line for line in found.stderr.splitlines() if not line.startswith("shared: ")]
    return said


def test_a_locked_store_is_one_sentence(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, path = tmp_path / "s.toml", tmp_path / "s.db"
    file.write_text(toml(model_folder))
    open_store(path, create=True).close()
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "is locked: another process has been writing for over 0.05 s" in refusal(file, path)


def test_a_study_that_another_process_runs_is_one_sentence(model_folder: Path, tmp_path: Path) -> None:
    file, path = tmp_path / "s.toml", tmp_path / "s.db"
    file.write_text(toml(model_folder))
    with running._alone("shared", tmp_path / "s.db.work" / "shared"):
        assert "is being run into this store by another process: wait for it" in refusal(file, path)


def test_a_store_of_another_schema_is_one_sentence(model_folder: Path, tmp_path: Path) -> None:
    file, path = tmp_path / "s.toml", tmp_path / "s.db"
    file.write_text(toml(model_folder))
    open_store(path, create=True).close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE mariotte_meta SET value = '7' WHERE key = 'format'")
    assert "has format 7 (written by Mariotte" in refusal(file, path)


@pytest.mark.postgres
def test_a_database_of_another_schema_is_one_sentence(model_folder: Path, tmp_path: Path, postgres_url: str) -> None:
    import psycopg

    file = tmp_path / "s.toml"
    file.write_text(toml(model_folder))
    open_store(postgres_url, create=True).close()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("UPDATE mariotte_meta SET value = '7' WHERE key = 'format'")
        assert "has format 7 (written by Mariotte" in refusal(file, postgres_url)
        connection.execute("UPDATE mariotte_meta SET value = '1' WHERE key = 'format'")
        connection.execute("DROP TABLE mariotte_members")
    assert "is damaged: it lacks the table mariotte_members" in refusal(file, postgres_url)


@pytest.mark.postgres
def test_a_server_that_does_not_answer_is_one_sentence(
    model_folder: Path, tmp_path: Path, postgres_server: str
) -> None:
    file = tmp_path / "s.toml"
    file.write_text(toml(model_folder))
    assert "cannot be used" in refusal(file, f"postgresql://postgres:secret@/postgres?host={tmp_path}")
    assert "secret" not in refusal(file, f"postgresql://postgres:secret@/postgres?host={tmp_path}")

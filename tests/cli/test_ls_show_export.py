from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from mariotte.cli.ls import metrics_text, prefix_length
from mariotte.cli.main import app
from mariotte.store import open_store
from mariotte.testing.stores import make_failure, make_record


def mariotte(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The sentence with which a command ends, exit code 2, nothing on stdout."""
    result = mariotte(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("mariotte: ")
    return result.stderr.removeprefix("mariotte: ").strip()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "s.db"
    facts = make_record(2, measure="knowledge:testbed", metrics={"top1": 0.61, "top1_se": 0.02}, base={"top1": 0.98})
    with open_store(path, create=True) as opened:
        opened.add([*(make_record(n) for n in range(3)), facts, make_record(3, study="other", model="testbed/more")])
        opened.add_failure(make_failure(5))
    return path


def test_ls_shows_one_line_an_experiment_and_the_failures(store: Path) -> None:
    result = mariotte("ls", "--store", store)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"4 experiments in {store}"
    (line,) = [line for line in lines if "width@0.2" in line]
    assert make_record(2).experiment[:8] in line
    assert "top1 0.61 (0.98), loss 1.5 (1.3), bits_per_byte 0.9 (0.7)" in line
    assert "2.0%" in line
    assert any("widths must be multiples of 8" in line for line in lines[7:])
    assert lines[-1].startswith("`mariotte show ID` prints the traceback")


def test_ls_json_is_whole(store: Path) -> None:
    found = json.loads(mariotte("ls", "--json", "--store", store).stdout)
    assert [e["chain"] for e in found["experiments"]][:2] == ["dense", "width@0.1 | lora@4k"]
    record = make_record(2)
    measured = found["experiments"][2]["measures"][record.measure]
    assert measured == {"id": record.id, "metrics": dict(record.metrics), "base": dict(record.base)}
    assert [f["stage"] for f in found["failures"]] == ["apply width"]


def test_ls_selects(store: Path) -> None:
    assert "1 experiments" in mariotte("ls", "--store", store, "--study", "other").stdout
    assert "1 experiments" in mariotte("ls", "--store", store, "--model", "testbed/more").stdout
    assert "holds no experiment of these" in mariotte("ls", "--store", store, "--study", "none").stdout


def test_ls_of_an_empty_store_says_how_to_fill_it(tmp_path: Path) -> None:
    open_store(tmp_path / "e.db", create=True).close()
    assert "`mariotte run STUDY.toml` adds some" in mariotte("ls", "--store", tmp_path / "e.db").stdout


@pytest.mark.parametrize("command", [["ls"], ["show", "abcd"], ["export", "x.csv"]])
def test_a_missing_store_is_not_made(tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(*command, "--store", "none.db").startswith(
        "no store at none.db: `mariotte run STUDY.toml` makes one"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARIOTTE_STORE", str(store))
    assert f"4 experiments in {store}" in mariotte("ls").stdout


def test_show_prints_everything_of_an_experiment(store: Path) -> None:
    record = make_record(2)
    text = mariotte("show", record.experiment[:8], "--store", store).stdout
    for expected in (
        record.id,
        record.hash(),
        "(verified)",
        "Metrics of knowledge:testbed",
        "Protocol",
        '"threads": 1',
    ):
        assert expected in text
    assert text.count("(verified)") == 2


def test_show_of_a_record_shows_that_record(store: Path) -> None:
    record = make_record(2)
    (found,) = json.loads(mariotte("show", record.id, "--json", "--store", store).stdout)["records"]
    assert found == {**record.to_dict(), "hash": record.hash()}


def test_show_prints_a_failure_with_its_traceback(store: Path) -> None:
    failure = make_failure(5)
    text = mariotte("show", failure.experiment, "--store", store).stdout
    assert failure.traceback in text
    assert failure.error in text


def test_show_refuses_a_damaged_record(store: Path) -> None:
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("UPDATE mariotte_records SET body = replace(body, '1.5', '1.4')")
    assert "does not match its hash" in refused("show", make_record(2).id, "--store", store)


def test_show_asks_for_an_id_that_is_long_enough_and_known(store: Path) -> None:
    assert "at least 4 characters" in refused("show", "abc", "--store", store)
    assert "`mariotte ls` lists what it holds" in refused("show", "nothing", "--store", store)


def test_show_asks_for_more_of_an_ambiguous_id(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db", create=True) as opened:
        opened.add([make_record(n, experiment=f"abcd{n}", id=f"r{n}") for n in (1, 2)])
    assert "2 experiments" in refused("show", "abcd", "--store", tmp_path / "s.db")


def test_empty_names_are_refused(store: Path) -> None:
    assert "a store is a file or a URL, got an empty name" in refused("ls", "--store", "")
    assert "ending in .csv, .parquet or .json" in refused("export", "", "--store", store)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_export_writes_a_row_a_metric(store: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    result = mariotte("export", path, "--store", store)
    assert result.stdout == f"9 rows of 5 records written to {path}\n"
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet, "json": pd.read_json}[suffix]
    assert sorted(set(read(path)["metric"])) == ["bits_per_byte", "loss", "top1"]


def test_export_selects(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    assert mariotte("export", path, "--store", store, "--measure", "loss", "--metric", "loss").exit_code == 0
    table = pd.read_csv(path)
    assert set(table["metric"]) == {"loss"}
    assert len(table) == 4


def test_export_says_why_it_writes_nothing(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    assert "choose one of bits_per_byte, loss, top1" in refused("export", path, "--store", store, "--metric", "los")
    assert "holds no record of study 'none'" in refused("export", path, "--store", store, "--study", "none")
    assert "ending in .csv, .parquet or .json" in refused("export", tmp_path / "out.xls", "--store", store)
    assert "No such file or directory" in refused("export", tmp_path / "no" / "out.csv", "--store", store)
    assert not path.exists()


def test_prefixes_grow_until_they_differ() -> None:
    assert prefix_length(["a" * 64, "b" * 64]) == 8
    assert prefix_length(["a" * 10 + "b" + "c" * 53, "a" * 10 + "d" + "c" * 53]) == 11
    assert prefix_length(["abc"]) == 3
    assert prefix_length([]) == 8


def test_metrics_with_one_name_are_told_apart_and_many_are_counted() -> None:
    records = [make_record(1), make_record(1, measure="loss:other", base={})]
    assert metrics_text(records).startswith("loss:testbed/all(block=64) loss 1.4 (1.3)")
    assert "loss:other loss 1.4," in metrics_text(records)
    many = make_record(1, metrics={f"m{n}": 1.0 for n in range(9)}, base={})
    assert metrics_text([many]).endswith("m5 1, 3 more")
    both = [make_record(1, measure="knowledge:x", metrics={f"a{n}": 1.0 for n in range(9)}, base={}), make_record(1)]
    assert metrics_text(both).startswith("a0 1, loss 1.4 (1.3), a1 1, bits_per_byte 0.8 (0.7), a2 1")
    assert metrics_text([make_record(1, metrics={"loss": 1.0, "loss_se": 0.1, "lone_se": 2.0}, base={})]) == (
        "loss 1, lone_se 2"
    )

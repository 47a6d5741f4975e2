from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mariotte.errors import StoreError
from mariotte.store import database, sql
from mariotte.store.record import Record
from mariotte.store.sql import open_store
from mariotte.testing.stores import StoreConformance, make_failure, make_record


def execute(url: str, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(url)) as connection, connection:
        assert connection.execute(statement, values).rowcount == 1


class TestSQLite(StoreConformance):
    def new_url(self, tmp_path: Path) -> str:
        return str(tmp_path / "store.db")

    def damage(self, url: str, record: Record) -> None:
        execute(url, "UPDATE mariotte_records SET body = replace(body, '1.5', '1.4') WHERE id = ?", record.id)

    def set_format(self, url: str, number: int) -> None:
        execute(url, "UPDATE mariotte_meta SET value = ? WHERE key = 'format'", str(number))


@pytest.mark.postgres
class TestPostgreSQL(StoreConformance):
    """Each test in its own schema."""

    @pytest.fixture
    def url(self, postgres_url: str) -> str:
        return postgres_url

    def change(self, url: str, statement: str) -> None:
        engine = sa.create_engine(database.parse_url(url))
        with engine.begin() as connection:
            assert connection.exec_driver_sql(statement).rowcount == 1
        engine.dispose()

    def damage(self, url: str, record: Record) -> None:
        self.change(url, f"UPDATE mariotte_records SET body = replace(body, '1.5', '1.4') WHERE id = '{record.id}'")

    def set_format(self, url: str, number: int) -> None:
        self.change(url, f"UPDATE mariotte_meta SET value = '{number}' WHERE key = 'format'")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A store with one record."""
    path = tmp_path / "store.db"
    with open_store(path, create=True) as store:
        store.add([make_record(1)])
    return path


def sentence(url: str | Path | None, *, create: bool = False) -> str:
    """The message with which opening, or reading, this store fails: one line."""
    with pytest.raises(StoreError) as caught, open_store(url, create=create) as store:
        store.records()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reading_a_missing_store_says_how_to_make_one_and_makes_none(tmp_path: Path) -> None:
    missing = tmp_path / "none.db"
    assert sentence(missing) == f"no store at {missing}: `mariotte run STUDY.toml` makes one; name another with --store"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "its folder does not exist" in sentence(tmp_path / "no" / "store.db", create=True)


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    assert (
        sentence(tmp_path, create=True)
        == f"a store is a file, {tmp_path} is a folder: give {tmp_path}/mariotte.db for a file in it"
    )


@pytest.mark.parametrize("content", [b"model,ratio,value\n" * 200, b"PAR1"])
def test_a_file_that_is_no_database_is_left_as_it_was(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    assert "is not a SQLite database" in sentence(path, create=True)
    assert path.read_bytes() == content


def test_a_truncated_store_is_damaged(file: Path) -> None:
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)
    assert "damaged" in sentence(file)


def test_an_empty_file_becomes_a_store_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    assert "is an empty database" in sentence(path)
    with open_store(path, create=True) as store:
        assert store.records() == []


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    assert "no store of Mariotte's" in sentence(path)
    assert "another program's database" in sentence(path, create=True)


def test_a_format_that_is_no_number_is_damage(file: Path) -> None:
    execute(str(file), "UPDATE mariotte_meta SET value = 'one' WHERE key = 'format'")
    assert "its format should be a number, it is 'one'" in sentence(file)


def test_a_missing_table_is_reported(file: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("DROP TABLE mariotte_records")
    assert "is damaged: it lacks the table mariotte_records" in sentence(file)


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
@pytest.mark.parametrize("create", [False, True])
def test_the_file_of_another_program_keeps_every_byte(tmp_path: Path, mode: str, create: bool) -> None:
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={mode}")
        connection.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    sentence(path, create=create)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["other.db"]


def test_an_empty_file_that_is_read_stays_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    sentence(path)
    assert path.stat().st_size == 0


def test_a_new_store_is_in_wal_mode(file: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("number", ["٣", "-1", "9" * 5000, b"1", 1.5])
def test_a_format_in_other_digits_is_damage(file: Path, number: object) -> None:
    execute(str(file), "UPDATE mariotte_meta SET value = ? WHERE key = 'format'", number)
    assert "its format should be a number" in sentence(file)


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the one record of a store as somebody does who also computes its hash anew."""
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        (body,) = connection.execute("SELECT body FROM mariotte_records").fetchone()
        text = change(json.loads(body))
        text = (
            text
            if isinstance(text, str)
            else json.dumps(text, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        )
        hashed = hashlib.sha256(text.encode()).hexdigest()
        connection.execute("UPDATE mariotte_records SET body = ?, hash = ?", (text, hashed))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: "no JSON", "is not the JSON that was written"),
        (lambda r: "[" * 100_000, "is not the JSON that was written"),
        (lambda r: [r], "is not the JSON that was written"),
        (lambda r: r | {"metrics": {"loss": math.nan}}, "is not the JSON that was written"),
        (lambda r: json.dumps(r | {"details": {"x": "\ud800"}}), "is not the JSON that was written"),
        (lambda r: r | {"metrics": {"loss": "high"}}, "a record's metrics should be Mapping"),
        (lambda r: r | {"metrics": None}, "a record's metrics should be Mapping"),
        (lambda r: r | {"ratio": "half"}, "a record's ratio should be float, it is 'half'"),
        (lambda r: r | {"recovery_tokens": True}, "a record's recovery_tokens should be int, it is True"),
        (lambda r: r | {"steps": 5}, "a record's steps should be tuple"),
        (lambda r: {k: v for k, v in r.items() if k != "chain"}, "lacks a field"),
        (lambda r: r | {"strange": 1}, "has no field 'strange'"),
    ],
)
def test_a_body_of_another_hand_is_one_sentence(file: Path, change: Callable[[Any], Any], said: str) -> None:
    rewrite(file, change)
    assert said in sentence(file)


def test_a_body_that_is_no_text_is_one_sentence(file: Path) -> None:
    execute(str(file), "UPDATE mariotte_records SET body = CAST(body AS BLOB)")
    assert "does not match its hash" in sentence(file)


@pytest.mark.parametrize("body", ["no JSON", "[]", "NaN", b"{}", '{"a": 1}'])
def test_a_damaged_run_is_one_sentence(file: Path, body: object) -> None:
    with open_store(file) as store:
        store.add_run({"study": "s", "counters": {2: 1, 10: 1}})
        assert store.runs() == [{"study": "s", "counters": {"2": 1, "10": 1}}]
        execute(str(file), "UPDATE mariotte_runs SET body = ?", body)
        with pytest.raises(StoreError, match=r"run 1 .* is not the JSON that was written"):
            store.runs()


def test_a_damaged_failure_is_one_sentence(file: Path) -> None:
    with open_store(file) as store:
        store.add_failure(make_failure())
        execute(str(file), "UPDATE mariotte_failures SET traceback = x'ff'")
        with pytest.raises(StoreError, match=r"a failure .* has traceback b'.xff': the store is damaged"):
            store.failures()


def test_an_empty_name_is_no_store() -> None:
    assert sentence("") == "a store is a file or a URL, got an empty name: give one, such as mariotte.db"


def test_a_changed_column_is_found_although_the_body_is_whole(file: Path) -> None:
    execute(str(file), "UPDATE mariotte_records SET study = 'other'")
    assert "does not match its hash" in sentence(file)


def test_a_lock_held_for_too_long_is_reported(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with open_store(file) as store:
            assert len(store.records()) == 1
            with pytest.raises(StoreError, match="is locked: another process has been writing for over"):
                store.add([make_record(2)])
        other.execute("ROLLBACK")
    with open_store(file) as store:
        assert store.add([make_record(2)]) == 1


def test_a_full_disk_is_reported_and_nothing_is_half_there(file: Path) -> None:
    """SQLite's limit on pages answers as a full disk does."""
    with open_store(file) as store:
        assert isinstance(store, sql.SqlStore)

        def limit(connection: sqlite3.Connection, _: object) -> None:
            connection.execute("PRAGMA max_page_count = 1")

        sa.event.listen(store._engine, "connect", limit)
        with pytest.raises(StoreError, match="the disk is full; free space and run again"):
            store.add([make_record(n, details={"text": "x" * 50_000}) for n in range(2, 5)])
    with open_store(file) as store:
        assert store.records() == [make_record(1)]


def test_a_read_only_folder_can_be_read_and_not_written(file: Path) -> None:
    file.chmod(0o444)
    file.parent.chmod(0o555)
    try:
        if os.access(file.parent, os.W_OK):
            pytest.skip("permissions do not bind this user")
        with open_store(file) as store:
            assert len(store.records()) == 1
            with pytest.raises(StoreError, match="read-only"):
                store.add_failure(make_failure())
    finally:
        file.parent.chmod(0o755)


def test_a_store_that_may_not_be_written_is_opened_without_touching_its_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with open_store(file) as store:
        assert len(store.records()) == 1
        assert [path.name for path in file.parent.iterdir()] == ["store.db"]
        with pytest.raises(StoreError, match="the file or its folder is read-only"):
            store.add_failure(make_failure())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite://", "names no file"),
        ("mysql://host/x", "SQLite file or a PostgreSQL database, got 'mysql://host/x'"),
        ("postgresql+nothing://host/x", "use postgresql\\+psycopg://"),
        ("://", "a store is a file or a URL such as"),
    ],
)
def test_what_is_no_store_is_answered_with_what_is(url: str, expected: str) -> None:
    with pytest.raises(StoreError, match=expected):
        open_store(url, create=True)


def test_a_missing_postgres_driver_is_named_with_its_extra_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    message = sentence("postgresql://me:secret@host/x")
    assert "pip install 'mariotte[postgres]'" in message
    assert "secret" not in message


def test_the_default_store_is_the_environments_then_the_working_folders(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MARIOTTE_STORE", raising=False)
    assert sentence(None).startswith("no store at mariotte.db")
    monkeypatch.setenv("MARIOTTE_STORE", str(file))
    with open_store() as store:
        assert store.name == str(file)


@pytest.mark.parametrize("name", ["with space.db", "per%cent?#.db", "ünï.db"])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    for url in (tmp_path / name, str(tmp_path / name)):
        with open_store(url, create=True) as store:
            store.add([make_record(1)])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_relative_url_is_a_file_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("sqlite:///here.db", create=True).close()
    assert (tmp_path / "here.db").is_file()


def test_the_desk_opens_a_store_without_the_bench(file: Path) -> None:
    code = f"""
import sys
import mariotte.store
assert "sqlalchemy" not in sys.modules
from mariotte.store import open_store
with open_store({str(file)!r}) as store:
    assert len(store.records()) == 1
assert not {{"torch", "transformers", "pandas"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.postgres
def test_claims_are_one_holder_s_until_given_back_or_its_session_ends(postgres_url: str) -> None:
    with open_store(postgres_url, create=True) as one, open_store(postgres_url) as other:
        ours, theirs, another = one.claims("study"), other.claims("study"), other.claims("another")
        assert ours is not None
        assert theirs is not None
        assert another is not None
        with another:
            assert another.take("a")  # of another study
        assert ours.take("a")
        assert not theirs.take("a")
        assert theirs.take("b")
        ours.give_back("a")
        assert theirs.take("a")
        theirs.close()
        theirs.close()
        assert ours.take("a")
        assert ours.take("b")
        ours.close()


@pytest.mark.postgres
def test_claims_of_two_stores_in_one_database_do_not_meet(postgres_url: str, postgres_server: str) -> None:
    import psycopg

    schema = postgres_url.rpartition("%3D")[2] + "_other"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
    elsewhere = postgres_url.rpartition("%3D")[0] + "%3D" + schema
    with open_store(postgres_url, create=True) as one, open_store(elsewhere, create=True) as other:
        ours, theirs = one.claims("study"), other.claims("study")
        assert ours is not None
        assert theirs is not None
        with ours, theirs:
            assert ours.take("a")
            assert theirs.take("a")


@pytest.mark.postgres
def test_a_session_that_the_server_ended_is_one_sentence_and_frees_its_claims(postgres_url: str) -> None:
    import psycopg

    with open_store(postgres_url, create=True) as one, open_store(postgres_url) as other:
        ours, theirs = one.claims("study"), other.claims("study")
        assert ours is not None
        assert theirs is not None
        assert ours.take("a")
        # Waited for: a session ends when it notices, and the locks go with it.
        ended = "SELECT bool_and(pg_terminate_backend(pid, 60000)) FROM pg_locks WHERE locktype = 'advisory'"
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            assert connection.execute(ended).fetchone() == (True,)
        with theirs:
            assert theirs.take("a")
        with pytest.raises(StoreError, match="cannot be used") as caught:
            ours.give_back("a")
        assert "\n" not in str(caught.value)
        ours.close()


def test_a_file_has_no_claims(file: Path) -> None:
    with open_store(file) as store:
        assert store.claims("study") is None


@pytest.mark.postgres
def test_a_table_that_somebody_locks_for_too_long_is_reported(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    with open_store(postgres_url, create=True) as store, psycopg.connect(postgres_url) as other:
        other.execute("LOCK TABLE mariotte_records")
        with pytest.raises(StoreError, match="is locked: another process has been writing for over") as caught:
            store.add([make_record(1)])
        assert "\n" not in str(caught.value)
        other.rollback()
        assert store.add([make_record(1)]) == 1


@pytest.mark.postgres
def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path, postgres_server: str) -> None:
    assert "cannot be used" in sentence(f"postgresql://postgres@/postgres?host={tmp_path}")

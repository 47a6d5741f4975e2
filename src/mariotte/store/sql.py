"""Stores in a SQL database: one SQLite file by default, PostgreSQL by URL, the same code for both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite
from typing_extensions import override

import mariotte
from mariotte.errors import StoreError
from mariotte.store.base import Claims, Store, record_order
from mariotte.store.database import DEFAULT, engine_of, parse_url, sentences, url_name
from mariotte.store.record import FORMAT, Failure, Record, canonical_json

# Prefixed, because a PostgreSQL database may hold other people's tables as well.
_metadata = sa.MetaData()
_meta = sa.Table(
    "mariotte_meta", _metadata, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False)
)
_records = sa.Table(
    "mariotte_records",
    _metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("experiment", sa.Text, nullable=False, index=True),
    sa.Column("study", sa.Text, nullable=False, index=True),
    sa.Column("model", sa.Text, nullable=False, index=True),
    sa.Column("chain", sa.Text, nullable=False, index=True),
    sa.Column("measure", sa.Text, nullable=False, index=True),
    sa.Column("method", sa.Text, index=True),
    sa.Column("seed", sa.BigInteger, nullable=False, index=True),
    sa.Column("result_hash", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),  # of the body
    sa.Column("body", sa.Text, nullable=False),  # canonical JSON of the whole record
)
_COPIED = ("id", "experiment", "study", "model", "chain", "measure", "method", "seed")
"""Fields of a record that are columns as well, so that they can be asked for."""
_failures = sa.Table(
    "mariotte_failures",
    _metadata,
    sa.Column("study", sa.Text, primary_key=True),
    sa.Column("experiment", sa.Text, primary_key=True),
    sa.Column("stage", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("chain", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("traceback", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)
_members = sa.Table(
    "mariotte_members",
    _metadata,
    sa.Column("study", sa.Text, primary_key=True),
    sa.Column("id", sa.Text, primary_key=True),
)
_runs = sa.Table(
    "mariotte_runs",
    _metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("study", sa.Text, nullable=False, index=True),
    sa.Column("body", sa.Text, nullable=False),
)

_CREATING = 0x4D6172696F747465
"""PostgreSQL's number of the lock under which tables are made: "Mariotte" in ASCII. SQLite's write lock does for it."""


def open_store(url: str | Path | None = None, *, create: bool = False) -> Store:
    """Open a store.

    Parameters
    ----------
    url : a file (``runs/a.db``, ``sqlite:///runs/a.db``) or a database (``postgresql://user@host/name``); None for the
        environment's ``MARIOTTE_STORE``, and without it ``mariotte.db`` in the working folder
    create : make the store when there is none; its folder must exist

    Raises
    ------
    StoreError
        When there is no store and `create` is False, it cannot be opened, is no store of ours, or is of a newer format.
    """
    if url is None:
        url = os.environ.get("MARIOTTE_STORE") or DEFAULT
    if url == "":  # `Path("")` would be the working folder
        raise StoreError(f"a store is a file or a URL, got an empty name: give one, such as {DEFAULT}")
    return SqlStore(url, create=create)


class SqlStore(Store):
    """A store in a SQL database; see `open_store` for the arguments.

    Notes
    -----
    SQLite runs in WAL mode with ``synchronous=FULL``: readers do not wait for writers, and what was committed survives
    a power cut. The mode is kept in the file and set once, when the store is made: a file that turns out to be another
    program's has only been read. Writing transactions begin with the write lock (``BEGIN IMMEDIATE``), because one that
    first reads and then asks for the lock fails at once, whatever the timeout, when another process wrote in between.
    Connections are not pooled: a fraction of a millisecond each, and no file handle outlives its transaction or crosses
    a fork.
    """

    def __init__(self, url: str | Path, *, create: bool = False) -> None:
        self._url = parse_url(url)
        self._engine = engine_of(self._url, create=create)
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        self._insert: Any = insert  # two classes with the same on_conflict_do_nothing and no common base that has it
        try:
            self._check(create=create)
        except BaseException:
            self.close()
            raise

    @property
    @override
    def name(self) -> str:
        return url_name(self._url)

    def _check(self, *, create: bool) -> None:
        """See that this is a store of ours, of a format we read; make it first when asked to."""
        with self._reading() as connection:
            tables = set(sa.inspect(connection).get_table_names())
        if _meta.name not in tables:
            if not create:
                what = "a database, but no store of Mariotte's" if tables else "an empty database"
                raise StoreError(f"{self.name} is {what}: name the store that `mariotte run` made with --store")
            if tables and self._engine.dialect.name == "sqlite":
                raise StoreError(f"{self.name} is another program's database: name a new file for the store")
            self._use_wal()
            with self._writing() as connection:
                # Two processes may come here together, so under a lock: tables are made unless there, and so are rows.
                if self._engine.dialect.name == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATING)))
                _metadata.create_all(connection, checkfirst=True)
                rows = [{"key": "format", "value": str(FORMAT)}, {"key": "version", "value": mariotte.__version__}]
                connection.execute(self._insert(_meta).on_conflict_do_nothing(), rows)
        with self._reading() as connection:
            meta: dict[str, object] = {row.key: row.value for row in connection.execute(sa.select(_meta))}
            tables = set(sa.inspect(connection).get_table_names())
        found = meta.get("format", "")
        if not (isinstance(found, str) and re.fullmatch("[0-9]{1,9}", found)):  # isdecimal() allows other scripts'
            raise StoreError(
                f"{self.name} is damaged: its format should be a number, it is {found!r}; restore it from a copy"
            )
        if int(found) > FORMAT:
            raise StoreError(
                f"store {self.name} has format {found} (written by Mariotte {meta.get('version', '?')}), "
                f"this Mariotte reads up to {FORMAT}: update mariotte"
            )
        if missing := sorted(set(_metadata.tables) - tables):
            raise StoreError(
                f"{self.name} is damaged: it lacks the table {missing[0]}; restore it from a copy, "
                "or run the study again into a new store"
            )

    def _use_wal(self) -> None:
        """Put an empty SQLite database into WAL mode, which a transaction cannot do."""
        if self._engine.dialect.name == "sqlite":
            with sentences(self._url), closing(self._engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA journal_mode=WAL")

    @contextmanager
    def _reading(self) -> Generator[sa.Connection]:
        with sentences(self._url), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Generator[sa.Connection]:
        """A transaction with the write lock from its first statement; committed at the end, undone on an error."""
        with sentences(self._url), self._engine.execution_options(begin="BEGIN IMMEDIATE").begin() as connection:
            yield connection

    @override
    def add(self, records: Sequence[Record]) -> int:
        new = 0
        with self._writing() as connection:
            # In the order of their ids: two PostgreSQL transactions that add the same records cannot deadlock.
            for record in sorted(records, key=lambda record: record.id):
                body = canonical_json(record.to_dict())
                row = {name: getattr(record, name) for name in _COPIED}
                row |= {"result_hash": record.result_hash(), "hash": _sha256(body), "body": body}
                self._join(connection, record.study, record.id)
                statement = self._insert(_records).values(row).on_conflict_do_nothing(index_elements=["id"])
                # Without the option SQLAlchemy forgets the count of an INSERT, for all drivers but SQLite's.
                if connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount == 1:
                    new += 1
                    continue
                found = connection.scalar(sa.select(_records.c.result_hash).where(_records.c.id == record.id))
                if found != row["result_hash"]:
                    what = f"record {record.id[:12]} ({record.chain} of {record.model}, {record.measure})"
                    hashes = f"with results {str(found)[:12]}, now they are {row['result_hash'][:12]}"
                    raise StoreError(
                        f"{what} is in {self.name} {hashes}: the same experiment gave two results; "
                        "compare them in two stores, or run again into a new one"
                    )
        return new

    @override
    def share(self, study: str, ids: Iterable[str]) -> None:
        with self._writing() as connection:
            for key in sorted(ids):
                self._join(connection, study, key)

    def _join(self, connection: sa.Connection, study: str, key: str) -> None:
        connection.execute(self._insert(_members).values(study=study, id=key).on_conflict_do_nothing())

    @override
    def records(
        self,
        *,
        study: str | None = None,
        model: str | None = None,
        chain: str | None = None,
        measure: str | None = None,
        experiment: str | None = None,
        method: str | None = None,
        seed: int | None = None,
    ) -> list[Record]:
        c = _records.c
        given = {
            c.model: model,
            c.chain: chain,
            c.experiment: experiment,
            c.method: method,
            c.seed: seed,
        }
        conditions = [column == value for column, value in given.items() if value is not None]
        if study is not None:
            conditions.append(c.id.in_(_ids_of(study)))
        if measure is not None:
            conditions.append(
                sa.or_(c.measure == measure, *(_starts_with(c.measure, measure + mark) for mark in (":", "(")))
            )
        return self._select(sa.and_(sa.true(), *conditions))

    @override
    def find(self, prefix: str) -> list[Record]:
        return self._select(sa.or_(_starts_with(_records.c.id, prefix), _starts_with(_records.c.experiment, prefix)))

    def _select(self, condition: sa.ColumnElement[bool]) -> list[Record]:
        with self._reading() as connection:
            rows = connection.execute(sa.select(_records).where(condition)).mappings().all()
        return sorted((self._read(dict(row)) for row in rows), key=record_order)

    def _read(self, row: Mapping[Any, Any]) -> Record:
        """The record of a row, after checking that nothing in the row changed since it was written."""
        damaged = StoreError(
            f"record {row['id']!s:.64} in {self.name} does not match its hash: the store is damaged; "
            "restore it from a copy, or run the study again into a new store"
        )
        # SQLite keeps any value in any column: what was stored as text may come back as bytes or a number.
        if not isinstance(row["body"], str) or _sha256(row["body"]) != row["hash"]:
            raise damaged
        values = self._object(row["body"], f"record {row['id']!s:.64}")
        try:
            record = Record.from_dict(values)
        except StoreError as error:
            raise StoreError(f"record {row['id']} in {self.name} cannot be read: {error}") from error
        if any(getattr(record, name) != row[name] for name in _COPIED):
            raise damaged
        return record

    def _object(self, body: object, what: str) -> dict[str, Any]:
        """The JSON object of a stored text that `canonical_json` wrote."""
        try:
            values = json.loads(cast("str", body))
            whole = isinstance(values, dict) and canonical_json(cast("object", values)) == body
        except (TypeError, ValueError, RecursionError):  # no text, no JSON, NaN, half a character, nested too deep
            whole, values = False, None
        if not whole:
            raise StoreError(
                f"{what} in {self.name} is not the JSON that was written: the store is damaged; "
                "restore it from a copy, or run the study again into a new store"
            )
        return cast("dict[str, Any]", values)

    @override
    def ids(self, *, study: str | None = None) -> set[str]:
        condition = sa.true() if study is None else _records.c.id.in_(_ids_of(study))
        with self._reading() as connection:
            return set(connection.scalars(sa.select(_records.c.id).where(condition)))

    @override
    def add_failure(self, failure: Failure) -> None:
        c = _failures.c
        with self._writing() as connection:
            same = sa.and_(c.study == failure.study, c.experiment == failure.experiment, c.stage == failure.stage)
            connection.execute(sa.delete(_failures).where(same))
            connection.execute(sa.insert(_failures).values(**dataclasses.asdict(failure)))

    @override
    def failures(self, *, study: str | None = None, experiment: str | None = None) -> list[Failure]:
        with self._reading() as connection:
            rows = connection.execute(sa.select(_failures).where(_of_failures(study, experiment))).mappings().all()
        for row in rows:
            if strange := [
                name for name, value in row.items() if not isinstance(value, _failures.c[name].type.python_type)
            ]:
                raise StoreError(
                    f"a failure in {self.name} has {strange[0]} {row[strange[0]]!r:.60}: the store is damaged; "
                    "restore it from a copy, or run the study again into a new store"
                )
        found = [Failure(**cast("dict[str, Any]", dict(row))) for row in rows]
        return sorted(found, key=lambda f: (f.study, f.model, f.chain, f.seed, f.stage, f.experiment))

    @override
    def clear_failures(self, *, study: str | None = None, experiment: str | None = None) -> int:
        with self._writing() as connection:
            return connection.execute(sa.delete(_failures).where(_of_failures(study, experiment))).rowcount

    @override
    def add_run(self, run: Mapping[str, Any]) -> None:
        assert "study" in run, f"a run must name its study, got only {sorted(run)}"
        body = canonical_json(json.loads(canonical_json(dict(run))))  # twice: keys that are numbers sort as texts do
        with self._writing() as connection:
            connection.execute(sa.insert(_runs).values(study=run["study"], body=body))

    @override
    def runs(self, *, study: str | None = None) -> list[dict[str, Any]]:
        condition = sa.true() if study is None else _runs.c.study == study
        with self._reading() as connection:
            bodies = connection.scalars(sa.select(_runs.c.body).where(condition).order_by(_runs.c.number)).all()
        return [self._object(body, f"run {number}") for number, body in enumerate(bodies, 1)]

    @override
    def claims(self, study: str) -> Claims | None:
        return _AdvisoryLocks(self._engine, self._url, study) if self._engine.dialect.name == "postgresql" else None

    @override
    def close(self) -> None:
        self._engine.dispose()


class _AdvisoryLocks(Claims):
    """PostgreSQL's session-level advisory locks, on a connection of their own: the server frees them when it ends.

    Notes
    -----
    A session that is lost in the middle of the work (the server was restarted) frees them too, and another process
    may then do the same work: its records are the same ones, and adding again is harmless. A pool that shares sessions
    among clients, such as PgBouncer between transactions, cannot hold such locks.
    """

    # A session waits in silence for as long as a branch takes, which no server or router should take for its end; and
    # that of a machine that lost power should end within a minute. Settings that this server lacks are left out.
    _SETTINGS = (
        ("idle_session_timeout", "0"),
        ("tcp_keepalives_idle", "30"),
        ("tcp_keepalives_interval", "10"),
        ("tcp_keepalives_count", "3"),
    )

    def __init__(self, engine: sa.Engine, url: sa.URL, study: str) -> None:
        self._url, self._study = url, study
        with sentences(url):
            # Without transactions: one that is open for hours keeps the server from cleaning up.
            self._connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            self._connection.detach()  # or closing it would only put it back into the pool, locks and all
        try:
            with sentences(url):
                known = sa.text("SELECT set_config(name, :value, false) FROM pg_settings WHERE name = :name")
                for name, value in self._SETTINGS:
                    self._connection.execute(known, {"name": name, "value": value})
                # Locks are the database's, and it may hold several stores: this one is known by its table.
                self._store = self._connection.scalar(sa.text(f"SELECT '{_meta.name}'::regclass::oid::bigint"))
        except BaseException:
            self.close()
            raise

    def _key(self, part: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._store} {self._study} {part}".encode()).digest()[:8], signed=True)

    @override
    def take(self, part: str) -> bool:
        with sentences(self._url):
            return bool(self._connection.scalar(sa.select(sa.func.pg_try_advisory_lock(self._key(part)))))

    @override
    def give_back(self, part: str) -> None:
        with sentences(self._url):
            held = self._connection.scalar(sa.select(sa.func.pg_advisory_unlock(self._key(part))))
        assert held, f"{part} is given back by who does not hold it"

    @override
    def close(self) -> None:
        if self._connection.closed:
            return
        # The server frees what an ended session held, but only when it notices; a session that is lost holds nothing.
        if not self._connection.invalidated:
            with suppress(exc.DBAPIError):
                self._connection.execute(sa.text("SELECT pg_advisory_unlock_all()"))
        self._connection.close()


def _sha256(text: str) -> str:
    """Of a record's canonical JSON this is `Record.hash`."""
    return hashlib.sha256(text.encode()).hexdigest()


def _starts_with(column: sa.Column[Any], prefix: str) -> sa.ColumnElement[bool]:
    # Not LIKE: in SQLite it ignores case, and % and _ would have to be escaped.
    return sa.func.substr(column, 1, len(prefix)) == prefix


def _ids_of(study: str) -> sa.Select[Any]:
    return sa.select(_members.c.id).where(_members.c.study == study)


def _of_failures(study: str | None, experiment: str | None) -> sa.ColumnElement[bool]:
    given = {_failures.c.study: study, _failures.c.experiment: experiment}
    return sa.and_(sa.true(), *(column == value for column, value in given.items() if value is not None))

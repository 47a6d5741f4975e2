"""Databases of either kind: what a URL or a file name means, how one is connected to, and what it says in sentences."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import event, exc

from mariotte.errors import StoreError

DEFAULT = "mariotte.db"
"""File in the working folder that is the store when neither an argument nor MARIOTTE_STORE names one."""

BUSY_TIMEOUT_S = 30.0
"""How long a writer waits for another one; a transaction of ours takes milliseconds, a slow network disk seconds."""

CONNECT_TIMEOUT_S = 10
"""How long a PostgreSQL server may take to answer, unless the URL's ``connect_timeout`` says otherwise."""

_LOCKED = "is locked: another process has been writing for over {timeout:g} s; wait for it or end it, then run again"
_ADVICE = {
    "55P03": _LOCKED,  # PostgreSQL's lock_not_available
    "SQLITE_BUSY": _LOCKED,
    "SQLITE_LOCKED": _LOCKED,
    "SQLITE_FULL": "cannot be written: the disk is full; free space and run again, nothing stored is lost",
    "SQLITE_READONLY": "cannot be written: the file or its folder is read-only; "
    "change the permissions or name another with --store",
    "SQLITE_CANTOPEN": "cannot be opened: check that its folder exists and that you may read and write there",
    "SQLITE_PERM": "cannot be opened: check that you may read and write it",
    "SQLITE_NOTADB": "is not a SQLite database: name a store that Mariotte made, or a new file",
    "SQLITE_CORRUPT": "is damaged ({error}): restore the file from a copy, or run the study again into a new store",
    "SQLITE_IOERR": "cannot be read or written ({error}): check the disk and its free space, then run again",
}
"""By SQLite's error name or PostgreSQL's code: what is wrong and what to do."""


def parse_url(url: str | Path) -> sa.URL:
    """The URL of a file or a database; a plain path is a SQLite file."""
    if isinstance(url, Path) or "://" not in url:
        return sa.URL.create("sqlite", database=str(Path(url).expanduser()))
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError as error:
        raise StoreError(
            f"a store is a file or a URL such as sqlite:///runs.db or postgresql://user@host/name, got {url!r}"
        ) from error
    if parsed.drivername == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")  # SQLAlchemy's default is psycopg2, which we do not ask for
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError(f"{url!r} names no file: a store is kept, so give one, such as sqlite:///runs.db")
    return parsed


def url_name(url: sa.URL) -> str:
    """What messages call a store: its file, or its URL without the password."""
    if url.drivername == "sqlite":
        return str(url.database)
    return url.render_as_string(hide_password=True)


def engine_of(url: sa.URL, *, create: bool) -> sa.Engine:
    """What connects to a database.

    Parameters
    ----------
    create : make a SQLite file where there is none

    Raises
    ------
    StoreError
        When it is of another kind, its driver is not installed, or its file cannot be there.
    """
    backend = url.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise StoreError(f"a store is a SQLite file or a PostgreSQL database, got {url_name(url)!r}")
    if backend == "postgresql":
        settings = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_TIMEOUT_S}
        try:
            server = sa.create_engine(url, pool_pre_ping=True, connect_args=settings)
            event.listen(server, "connect", _limit_waiting)
            return server
        except ModuleNotFoundError as error:
            raise StoreError(
                f"{url_name(url)} needs the package {error.name}, which is not installed: "
                "pip install 'mariotte[postgres]'"
            ) from error
        except exc.NoSuchModuleError as error:
            raise StoreError(f"SQLAlchemy has no driver {url.drivername!r}: use postgresql+psycopg://") from error
    file = Path(cast("str", url.database))
    _check_file(file, create=create)
    unwritable = not create and not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK))
    if unwritable and not Path(f"{file}-wal").exists():
        # A store in a folder that we cannot write to: SQLite could not make the files that WAL needs even to read.
        # `immutable` does without them, and nothing is missed, because there is no write-ahead log to be read.
        address = f"{file.absolute().as_uri()}?mode=ro&immutable=1"
    else:
        address = f"{file.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"

    def connect() -> sqlite3.Connection:
        # Transactions are begun by us (see below), so the driver must not begin its own: isolation_level None.
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous=FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.NullPool)

    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    event.listen(engine, "begin", begin)
    return engine


def _limit_waiting(connection: Any, _: object) -> None:
    """Let a PostgreSQL session wait no longer for a lock than SQLite's writers do; without it, for ever."""
    connection.autocommit = True  # or the setting would end with a transaction that is undone
    connection.execute(f"SET lock_timeout = {round(1000 * BUSY_TIMEOUT_S)}")
    connection.autocommit = False


def _check_file(file: Path, *, create: bool) -> None:
    """Say in a sentence what SQLite would say in three words, before it makes an empty file."""
    if file.is_dir():
        raise StoreError(f"a store is a file, {file} is a folder: give {file / DEFAULT} for a file in it")
    if file.exists():
        return
    if not create:
        raise StoreError(f"no store at {file}: `mariotte run STUDY.toml` makes one; name another with --store")
    if not file.parent.is_dir():
        raise StoreError(
            f"cannot make the store {file}: its folder does not exist; make it, or name another with --store"
        )


@contextmanager
def sentences(url: sa.URL) -> Generator[None]:
    """Turn what the database says into a `StoreError` of one sentence."""
    try:
        yield
    except exc.DBAPIError as error:
        raise _store_error(url, error.orig) from error
    except sqlite3.Error as error:  # on connecting: our own connect function is not wrapped by SQLAlchemy
        raise _store_error(url, error) from error


def _store_error(url: sa.URL, error: BaseException | None) -> StoreError:
    name = str(getattr(error, "sqlite_errorname", "") or getattr(error, "sqlstate", "") or "")
    short = " ".join(str(error).split())
    for known, advice in _ADVICE.items():
        if name.startswith(known):
            return StoreError(f"store {url_name(url)} {advice.format(timeout=BUSY_TIMEOUT_S, error=short)}")
    return StoreError(f"store {url_name(url)} cannot be used: {short}; check the store, or name another with --store")

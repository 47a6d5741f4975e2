"""What many tests need: a tiny random model that speaks the testbed's language, in a folder."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network; those that must are marked
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and published numbers, which is no part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2-shaped model with the testbed's tokenizer, as a checkpoint."""
    from mariotte.models.load import quiet_transformers
    from mariotte.testbed import zoo
    from mariotte.testbed.world import World
    from mariotte.testing.tiny import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    model = tiny("qwen2", vocab=len(World().vocabulary), tied=True)
    with quiet_transformers():
        model.hf.save_pretrained(folder)
    zoo.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a database: what MARIOTTE_TEST_POSTGRES names, or of a server of the tests' own in a folder of its own.

    The server listens on a socket in that folder and nowhere else, so that it meets no other one.
    """
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'mariotte[postgres]'")
    if named := os.environ.get("MARIOTTE_TEST_POSTGRES"):
        yield named
        return
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    where = os.pathsep.join([os.environ.get("PATH", ""), *map(str, reversed(debian))])
    initdb, postgres = (shutil.which(name, path=where) for name in ("initdb", "postgres"))
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed: no initdb and postgres on the PATH or in /usr/lib/postgresql")
    owner = None
    if os.geteuid() == 0:  # which the server refuses to run as
        import pwd

        owner = next((name for name in ("postgres", "nobody") if name in {u.pw_name for u in pwd.getpwall()}), None)
        if owner is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody here")
    # Not pytest's folder: that is closed to the server's user, and too long a path for a socket.
    with tempfile.TemporaryDirectory(prefix="mariotte-pg-") as folder:
        quiet: dict[str, Any] = {"cwd": folder, "user": owner, "stdin": subprocess.DEVNULL}
        if owner is not None:
            shutil.chown(folder, owner)
        data = Path(folder) / "data"
        made = [initdb, "-D", str(data), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, **quiet)
        # fsync off: what is killed in these tests are writers, never the machine.
        asked = ["-k", folder, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=50"]
        with (Path(folder) / "log").open("wb") as log:
            server = subprocess.Popen([postgres, "-D", str(data), *asked], stdout=log, stderr=log, **quiet)
        try:
            import psycopg

            url = f"postgresql://postgres@/postgres?host={folder}"
            deadline = time.monotonic() + 60
            while True:
                try:
                    psycopg.connect(url).close()
                    break
                except psycopg.OperationalError:
                    assert server.poll() is None, (Path(folder) / "log").read_text()
                    assert time.monotonic() < deadline, "PostgreSQL did not start within a minute"
                    time.sleep(0.05)
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # ends sessions that a failed test left
            server.wait(60)


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """URL of a schema that holds nothing yet, where a store can be made."""
    import psycopg

    schema = f"t_{time.time_ns():x}_{os.getpid()}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
    mark = "&" if "?" in postgres_server else "?"
    return f"{postgres_server}{mark}options=-csearch_path%3D{schema}"


@pytest.fixture
def call_in_two_processes() -> Callable[..., None]:
    """Call a function of a test's file in two processes that find each other, as `accelerate launch` starts them.

    Each may take so many seconds. Arguments travel as their `repr`: paths, text, numbers.
    """

    def call(seconds: float, function: Callable[..., None], *arguments: Any, **settings: Any) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        # What `accelerate launch --cpu --num_processes 2` sets.
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        file = Path(inspect.getfile(function))
        code = f"import sys; from pathlib import *; sys.path.insert(0, {str(file.parent)!r}); import {file.stem}; "
        code += f"{file.stem}.{function.__name__}(*{arguments!r}, **{settings!r})"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code], env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(2)
        ]
        try:
            assert [process.wait(seconds) for process in processes] == [0, 0]
        finally:
            for process in processes:  # one whose partner failed waits for it
                process.kill()
                process.wait()

    return call

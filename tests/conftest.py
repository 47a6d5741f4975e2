"""What many tests need: a tiny random model that speaks the testbed's language, in a folder."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
from collections.abc import Callable
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

"""The folder of a trunk: the states that are kept there, and the run that they belong to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mariotte.models.step import MANIFEST
from mariotte.recover.stopping import Levels

LATEST, BEST = "latest", "best"
"""States that are not of one step: where work goes on, and the one with the lowest held-out loss."""

_RUN = "trunk.json"


def snapshot(folder: Path, step: int) -> Path:
    """Where the state at a step is kept."""
    return folder / f"step-{step:07d}"


def step_of(folder: Path) -> int | None:
    """The step of the state in a folder, None where it holds none: a manifest is written last."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    return int(json.loads(manifest.read_text(encoding="utf-8"))["step"])


def forget(folder: Path) -> None:
    """Remove a state, its manifest first: half of a state must not look whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def settle(folder: Path, run: dict[str, Any]) -> None:
    """Make a folder this run's: states of another run are removed, its own are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / _RUN
    if told.is_file() and json.loads(told.read_text(encoding="utf-8")) == run:
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    Levels.forget(folder)
    for state in [*folder.glob("step-*"), *folder.glob("rows-*"), folder / LATEST]:
        forget(state)
    draft = folder / f".{_RUN}"
    draft.write_text(json.dumps(run), encoding="utf-8")
    draft.replace(told)

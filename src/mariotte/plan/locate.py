"""The config of a model, found without torch: in its folder, the testbed, the hub's cache, or on the hub."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mariotte
from mariotte.errors import ModelError, unknown

TESTBED = "testbed/"


def config_of(name: str) -> Mapping[str, Any]:
    """The content of a model's ``config.json``.

    Parameters
    ----------
    name : a folder, ``testbed/NAME`` or a hub id

    Raises
    ------
    ModelError, UnknownNameError
        When there is no such model, or its config is nowhere to be had.
    """
    if name.startswith(TESTBED):
        weights = Path(mariotte.__file__).parent / "testbed" / "weights"
        known = {f"{TESTBED}{folder.name}" for folder in weights.iterdir() if (folder / "config.json").is_file()}
        if name not in known:
            raise unknown("testbed model", name, known)
        return _read(weights / name.removeprefix(TESTBED) / "config.json", name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _read(folder / "config.json", name)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(
            f"no model folder at {name}: give an existing folder, testbed/NAME or a hub id such as org/name"
        )
    cached = _cached(name)
    return _asked(name) if cached is None else _read(cached, name)


def _read(file: Path, name: str) -> Mapping[str, Any]:
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise ModelError(
            f"the config of {name} cannot be read, {file}: {reason}; give a model folder with one"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"the config of {name} must be a JSON object, {file} is none: give another folder")
    return cast("dict[str, Any]", found)


def _cached(name: str) -> Path | None:
    """The config in the hub's cache, whose layout is documented; None where it was never loaded."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = hub / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    file = folder / "snapshots" / commit / "config.json"
    return file if file.is_file() else None


def _asked(name: str) -> Mapping[str, Any]:
    """The hub's own file, asked for once: a plan does not wait for a network."""
    missing = ModelError(
        f"no config of {name!r}: it is no folder here, not in the hub's cache, and the hub did not give it; check the "
        "name, or download its config.json where there is a network and give that folder"
    )
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise missing
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        with urllib.request.urlopen(f"{endpoint}/{name}/resolve/main/config.json", timeout=4) as answer:
            found: object = json.load(answer)
    except (OSError, ValueError) as error:
        raise missing from error
    if not isinstance(found, dict):
        raise missing
    return cast("dict[str, Any]", found)

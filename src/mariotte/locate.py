"""Where a model is, found without torch: a folder, ``testbed/NAME``, the hub's cache, or a file of the hub."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from mariotte.errors import ModelError, unknown

__all__ = ["TESTBED", "config_of", "folder_of", "peek_config", "read_config"]

TESTBED = Path(__file__).resolve().parent / "testbed" / "weights"
"""The models that come with the package, a folder each."""

TIMEOUT_S = 5
"""How long the hub is waited for: downloads retry for half a minute, and this is only a look."""

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_.-]+)?")

_UNREACHABLE: set[str] = set()
"""Hosts that did not answer: eight models of a study need not wait for the same silence eight times."""


def folder_of(name: str) -> Path | None:
    """The folder of a model that is on this machine by name; None for what can only be a hub id.

    Parameters
    ----------
    name : a folder, ``testbed/NAME`` or a hub id

    Raises
    ------
    ModelError
        When there is no such folder and the name is no hub id.
    UnknownNameError
        When `name` is ``testbed/...`` and the testbed has no such model.
    """
    known = {f"testbed/{folder.name}" for folder in TESTBED.iterdir() if (folder / "config.json").is_file()}
    if name.startswith("testbed/"):
        if name not in known:
            raise unknown("testbed model", name, known)
        return TESTBED / name.removeprefix("testbed/")
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    meant = f"testbed/{re.split('[:/]', name)[-1]}"
    if meant in known:  # the hub need not be asked for it
        raise ModelError(f"no model folder at {name}: the model that comes with the package is called {meant}")
    if _HUB_ID.fullmatch(name) is None:
        raise ModelError(
            f"no model folder at {name}: give an existing folder, testbed/NAME or a hub id such as org/name"
        )
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's ``config.json``.

    Raises
    ------
    ModelError
        When there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} holds no config.json: it is not a transformers model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{path} must be a JSON object, and cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} must be a JSON object, got {type(config).__name__}")
    return cast("dict[str, Any]", config)


def config_of(name: str) -> dict[str, Any]:
    """A model's config without its weights: from its folder, the hub's cache, or the hub's file alone.

    Parameters
    ----------
    name : a folder, ``testbed/NAME`` or a hub id

    Raises
    ------
    ModelError, UnknownNameError
        When there is no such model, or its config is nowhere to be had.
    """
    folder = folder_of(name)
    if folder is not None:
        return read_config(folder)
    cached = _cached(name)
    return _asked(name) if cached is None else read_config(cached)


def peek_config(name: str) -> dict[str, Any] | None:
    """As `config_of`, but None for a hub id whose config is not to be had now.

    Raises
    ------
    ModelError, UnknownNameError
        When a folder or a testbed model is named that is not there, or a config that is there cannot be read.
    """
    folder = folder_of(name)
    if folder is not None:
        return read_config(folder)
    cached = _cached(name)
    if cached is not None:
        return read_config(cached)
    try:
        return _asked(name)
    except ModelError:
        return None


def _cached(name: str) -> Path | None:
    """The folder of a model in the hub's cache; None where its config was never loaded."""
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _asked(name: str) -> dict[str, Any]:
    """The hub's own file, asked for once, with the user's token where there is one."""

    def none(why: str, do: str = "check the name, or download it where there is a network and give that folder"):
        return ModelError(f"no config of {name!r}: it is no folder here, not in the hub's cache, and {why}; {do}")

    if find_spec("huggingface_hub") is None:
        raise none(
            "the hub cannot be asked without huggingface_hub", "install mariotte[bench], or give a folder with one"
        )
    from huggingface_hub import constants, get_token

    address = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
    host = address.split("/")[2]
    if constants.HF_HUB_OFFLINE:
        raise none("the hub may not be asked (HF_HUB_OFFLINE)")
    if host in _UNREACHABLE:
        raise none(f"{host} did not answer")
    # Not the library's own headers: making them asks the hub for more than this file.
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {"user-agent": "mariotte"} | ({} if token is None else {"authorization": f"Bearer {token}"})
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found: object = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise none(
                f"the hub does not give it to you ({error.code})",
                "if it exists it is gated: ask for access on its page, then 'hf auth login' or set HF_TOKEN",
            ) from error
        raise none(f"the hub did not give it ({error.code})") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise none("what the hub gave is no JSON") from error
    except OSError as error:
        _UNREACHABLE.add(host)
        raise none(f"{host} did not answer") from error
    if not isinstance(found, dict):
        raise none("what the hub gave is no JSON object")
    return cast("dict[str, Any]", found)

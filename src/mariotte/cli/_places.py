"""Where commands write: told to be impossible before the work, not after it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mariotte.errors import MariotteError


def check_place(option: str, path: Path, *suffixes: str) -> None:
    """Refuse a file that could not be written, leaving nothing behind.

    Parameters
    ----------
    option : of the command line, for the message
    path : the file; folders that are missing on the way to it can be made
    suffixes : that its name must end in one of; none for any name

    Raises
    ------
    MariotteError
        When it is a folder, no folder is above it, nothing can be written there, or its name ends otherwise.
    """
    target = path.expanduser().resolve()
    if suffixes and target.suffix not in suffixes:
        raise MariotteError(f"{option} must be a file that ends in {' or '.join(suffixes)}, got {path}: name it so")
    if target.is_dir():
        raise MariotteError(f"{option} must be a file, and {target} is a folder: name a file in it")
    above = next(folder for folder in target.parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=above):  # permissions do not tell of a disk that can only be read
            pass
    except OSError as error:
        raise MariotteError(
            f"{option} {target} cannot be written ({error.strerror or error}): name a file in a folder that you can "
            "write to"
        ) from error

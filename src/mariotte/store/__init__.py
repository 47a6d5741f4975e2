"""Records and where they are kept: all that the desk knows of the bench."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mariotte.lazy import lazy

if TYPE_CHECKING:
    from mariotte.store.base import Store as Store
    from mariotte.store.record import Failure as Failure
    from mariotte.store.record import Record as Record
    from mariotte.store.sql import open_store as open_store

_HOME = {
    "Failure": "mariotte.store.record",
    "Record": "mariotte.store.record",
    "Store": "mariotte.store.base",
    "open_store": "mariotte.store.sql",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__

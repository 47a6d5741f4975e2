"""Mariotte: the compression laws of language models.

The public names are imported when they are first used, so that ``import mariotte`` costs nothing
and the desk (laws, store, report) never pays for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mariotte.accounting import Counts as Counts
    from mariotte.accounting import count as count
    from mariotte.chain import Chain as Chain
    from mariotte.chain import Link as Link
    from mariotte.errors import MariotteError as MariotteError

_HOME = {
    "Chain": "mariotte.chain",
    "Counts": "mariotte.accounting",
    "Link": "mariotte.chain",
    "MariotteError": "mariotte.errors",
    "count": "mariotte.accounting",
}

__all__ = sorted([*_HOME, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mariotte' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""Compression laws: forms, fits, hold-out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mariotte.laws.base import Law as Law
    from mariotte.laws.base import Point as Point
    from mariotte.laws.catalogue import LAWS as LAWS
    from mariotte.laws.catalogue import find as find
    from mariotte.laws.fitting import fit as fit
    from mariotte.laws.result import Fit as Fit
    from mariotte.laws.result import Prediction as Prediction
    from mariotte.laws.result import Ratio as Ratio
    from mariotte.laws.validation import HoldOut as HoldOut
    from mariotte.laws.validation import rolling as rolling

_HOME = {
    "LAWS": "catalogue",
    "Fit": "result",
    "HoldOut": "validation",
    "Law": "base",
    "Point": "base",
    "Prediction": "result",
    "Ratio": "result",
    "find": "catalogue",
    "fit": "fitting",
    "rolling": "validation",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    # Lazy: `mariotte --help` and `mariotte laws` list names without paying for numpy.
    if name in _HOME:
        return getattr(importlib.import_module(f"mariotte.laws.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mariotte.laws' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

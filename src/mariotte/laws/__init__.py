"""Compression laws: forms, fits, hold-out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mariotte.lazy import lazy

if TYPE_CHECKING:
    from mariotte.laws.base import Law as Law
    from mariotte.laws.base import Point as Point
    from mariotte.laws.catalogue import LAWS as LAWS
    from mariotte.laws.catalogue import find as find
    from mariotte.laws.facts import Prediction as Prediction
    from mariotte.laws.facts import Ratio as Ratio
    from mariotte.laws.fitting import fit as fit
    from mariotte.laws.result import Fit as Fit
    from mariotte.laws.validation import HoldOut as HoldOut
    from mariotte.laws.validation import rolling as rolling

_HOME = {
    "LAWS": "mariotte.laws.catalogue",
    "Fit": "mariotte.laws.result",
    "HoldOut": "mariotte.laws.validation",
    "Law": "mariotte.laws.base",
    "Point": "mariotte.laws.base",
    "Prediction": "mariotte.laws.facts",
    "Ratio": "mariotte.laws.facts",
    "find": "mariotte.laws.catalogue",
    "fit": "mariotte.laws.fitting",
    "rolling": "mariotte.laws.validation",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

# Lazy: `mariotte --help` and `mariotte laws` list names without paying for numpy.
__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__

"""The page that a study ends in: headline, figures, tables and laws in one HTML file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mariotte.lazy import lazy

if TYPE_CHECKING:
    from mariotte.report.page import build as build
    from mariotte.report.page import write as write
    from mariotte.report.summary import usable_sentence as usable_sentence
    from mariotte.report.summary import usable_sentences as usable_sentences

_HOME = {
    "build": "mariotte.report.page",
    "usable_sentence": "mariotte.report.summary",
    "usable_sentences": "mariotte.report.summary",
    "write": "mariotte.report.page",
}

__all__ = ["build", "usable_sentence", "usable_sentences", "write"]

__getattr__ = lazy(__name__, _HOME)

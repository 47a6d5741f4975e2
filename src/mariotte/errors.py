"""What a user can act on: each message says what was expected, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MariotteError(Exception):
    """Base of every error that the user can mend; the command line prints it as one sentence, exit code 2."""


class UnknownNameError(MariotteError):
    """A name (of a method, law, measure, corpus, model family ...) that nothing defines."""


class ChainError(MariotteError):
    """A chain that cannot be read, or a link whose amount, scope or fields its step refuses."""


class ModelError(MariotteError):
    """A model that cannot be loaded, cut as asked, or saved so that it loads again."""


class DataError(MariotteError):
    """A corpus that is missing, empty or too short for what was asked of it."""


class StudyError(MariotteError):
    """A study file that cannot be read or asks for something impossible."""


class StoreError(MariotteError):
    """A store that cannot be opened, is damaged, or was written by a newer Mariotte."""


class FitError(MariotteError):
    """Points on which a law cannot be fitted, or a fit that cannot answer what it was asked."""


class PluginError(MariotteError):
    """A package of somebody else whose method, recovery, measure or law is not what an entry point should name."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """The error for a name that nothing defines: the nearest names, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    suggestion = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UnknownNameError(f"no {kind} named {name!r}{suggestion} (known: {', '.join(known)}){hint}")

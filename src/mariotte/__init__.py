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
    from mariotte.chain import parse as parse_chain  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from mariotte.errors import MariotteError as MariotteError
    from mariotte.experiments.pipeline import compress_model as compress_model
    from mariotte.experiments.pipeline import measure as measure
    from mariotte.experiments.run import run_study as run_study
    from mariotte.laws import fit as fit
    from mariotte.models.checkpoint import save as save
    from mariotte.models.load import load as load
    from mariotte.models.model import Model as Model
    from mariotte.report import write as write_report  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from mariotte.store import Record as Record
    from mariotte.store import open_store as open_store

_HOME = {
    "Chain": "mariotte.chain:Chain",
    "Counts": "mariotte.accounting:Counts",
    "Link": "mariotte.chain:Link",
    "MariotteError": "mariotte.errors:MariotteError",
    "Model": "mariotte.models.model:Model",
    "Record": "mariotte.store:Record",
    "compress_model": "mariotte.experiments.pipeline:compress_model",
    "count": "mariotte.accounting:count",
    "fit": "mariotte.laws:fit",
    "load": "mariotte.models.load:load",
    "measure": "mariotte.experiments.pipeline:measure",
    "open_store": "mariotte.store:open_store",
    "parse_chain": "mariotte.chain:parse",
    "run_study": "mariotte.experiments.run:run_study",
    "save": "mariotte.models.checkpoint:save",
    "write_report": "mariotte.report:write",
}

__all__ = sorted([*_HOME, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name in _HOME:
        module, _, attribute = _HOME[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'mariotte' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""Mariotte: the compression laws of language models.

The public names are imported when they are first used, so that ``import mariotte`` costs nothing
and the desk (laws, store, report) never pays for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mariotte.lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mariotte.accounting import Counts as Counts
    from mariotte.accounting import count as count
    from mariotte.chain import Chain as Chain
    from mariotte.chain import Link as Link
    from mariotte.chain import parse as parse_chain  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from mariotte.errors import MariotteError as MariotteError
    from mariotte.experiments.comparison import compare as compare
    from mariotte.experiments.pipeline import compress_model as compress_model
    from mariotte.experiments.pipeline import measure as measure
    from mariotte.experiments.run import run_study as run_study
    from mariotte.laws import fit as fit
    from mariotte.models.checkpoint import save as save
    from mariotte.models.load import load as load
    from mariotte.models.model import Model as Model
    from mariotte.plan.budget import read_budget as read_budget
    from mariotte.plan.search import plan as plan
    from mariotte.report import write as write_report  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from mariotte.store import Record as Record
    from mariotte.store import open_store as open_store

_HOME = {
    "Chain": "mariotte.chain",
    "Counts": "mariotte.accounting",
    "Link": "mariotte.chain",
    "MariotteError": "mariotte.errors",
    "Model": "mariotte.models.model",
    "Record": "mariotte.store",
    "compare": "mariotte.experiments.comparison",
    "compress_model": "mariotte.experiments.pipeline",
    "count": "mariotte.accounting",
    "fit": "mariotte.laws",
    "load": "mariotte.models.load",
    "measure": "mariotte.experiments.pipeline",
    "open_store": "mariotte.store",
    "parse_chain": "mariotte.chain:parse",
    "plan": "mariotte.plan.search",
    "read_budget": "mariotte.plan.budget",
    "run_study": "mariotte.experiments.run",
    "save": "mariotte.models.checkpoint",
    "write_report": "mariotte.report:write",
}

__all__ = sorted([*_HOME, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__

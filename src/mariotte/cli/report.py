"""``mariotte report``: one page of what a store holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mariotte.cli.console import say

__all__ = ["report"]


def report(
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    store: Annotated[
        str | None, typer.Option(help="Where records are: a path or a URL.  [default: mariotte.db]")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Only the records of this study.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.  [default: the models]")] = None,
    claims: Annotated[
        list[str] | None,
        typer.Option(
            help="A paper whose claims are checked, such as compression-laws.  [default: what studies follow]"
        ),
    ] = None,
) -> None:
    """Write one page with figures and tables that needs no network, for colleagues."""
    from mariotte.report import write
    from mariotte.store import open_store

    with open_store(store) as opened:
        page = write(
            opened.records(study=study),
            out,
            title=title,
            study=study,
            runs=opened.runs(study=study),
            failures=opened.failures(study=study),
            claims=claims or (),
        )
    say(str(page))

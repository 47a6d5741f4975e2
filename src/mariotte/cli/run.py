"""``mariotte run``: a study into a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mariotte.cli._running import run_shown
from mariotte.cli.console import print_json, print_table, say

__all__ = ["run"]


def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.")],
    store: Annotated[
        str | None, typer.Option(help="Where records go: a path or a URL.  [default: mariotte.db]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Compute here instead of where the study says.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads of torch, instead of the study's.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="Processes, instead of the study's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run what is missing of a study; stop it whenever you like and run it again.

    Every experiment is recorded as soon as it is measured. Exit code 1 when some experiments failed: the others are
    recorded, and running again tries those that failed once more.
    """
    from mariotte.experiments.run import check
    from mariotte.experiments.study import read
    from mariotte.store import open_store

    found = read(study)
    changes = {
        key: value
        for key, value in (("device", device), ("threads", threads), ("workers", workers))
        if value is not None
    }
    if changes:
        found = found.model_copy(update={"run": found.run.model_copy(update=changes)})
    if dry_run:
        plan = check(found)
        if as_json:
            print_json(asdict(plan))
        else:
            print_table(f"{found.name}: what would be done", ["", ""], [[k, v] for k, v in asdict(plan).items()])
        return
    with open_store(store, create=True) as opened:
        summary = run_shown(found, opened, study.read_text(encoding="utf-8"))
        if as_json:
            print_json(asdict(summary))
        else:
            where = "" if store is None else f" --store {store}"
            say(f"records are in {opened.name}; `mariotte report{where}` makes a page of them")
    if summary.failures:
        raise typer.Exit(1)

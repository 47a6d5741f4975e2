"""``mariotte show``: everything that a store knows of one experiment, record or failure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mariotte.store.record import Failure, Record

__all__ = ["show"]


def show(
    id: Annotated[
        str, typer.Argument(metavar="ID", help="Of an experiment or a record, or at least 4 characters of it.")
    ],
    store: Annotated[
        str | None, typer.Option(help="File or URL of the store; default: $MARIOTTE_STORE, or mariotte.db.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the whole records and failures.")] = False,
) -> None:
    """Print everything that is known of one experiment, or of one record: results, protocol, steps, cost, failures.

    Each record is checked against the hash that was stored with it; a damaged one is refused.
    """
    from mariotte.cli.console import print_json, say
    from mariotte.errors import StoreError
    from mariotte.store import open_store
    from mariotte.store.base import SHORTEST_PREFIX

    if len(id) < SHORTEST_PREFIX:
        raise StoreError(
            f"an id needs at least {SHORTEST_PREFIX} characters of its beginning, got {id!r}: see `mariotte ls`"
        )
    with open_store(store) as opened:
        name = opened.name
        records = opened.find(id)
        failures = [failure for failure in opened.failures() if failure.experiment.startswith(id)]
    experiments = sorted({r.experiment for r in records} | {f.experiment for f in failures})
    if not experiments:
        raise StoreError(f"{name} holds nothing whose id starts with {id!r}: `mariotte ls` lists what it holds")
    if len(experiments) > 1:
        raise StoreError(
            f"{len(experiments)} experiments of {name} have something whose id starts with {id!r} "
            f"({', '.join(e[: len(id) + 6] for e in experiments[:3])}): give more characters"
        )
    if as_json:
        print_json(
            {
                "records": [{**record.to_dict(), "hash": record.hash()} for record in records],
                "failures": [dataclasses.asdict(failure) for failure in failures],
            }
        )
        return
    for index, record in enumerate(records):
        if index:
            say("")
        _print_record(record)
    for failure in failures:
        _print_failure(failure)


def _print_record(record: Record) -> None:
    from mariotte.cli.console import format_cell, print_json, print_table, say

    nested = ("metrics", "base", "protocol", "details", "steps", "cost", "environment")
    rows = [[f.name, getattr(record, f.name)] for f in dataclasses.fields(record) if f.name not in nested]
    rows += [["removed", record.removed], ["hash", f"{record.hash()} (verified)"]]
    print_table("Record", ["field", "value"], [[name, format_cell(value)] for name, value in rows])
    say("")
    print_table(
        f"Metrics of {record.measure}",
        ["metric", "value", "dense", "difference"],
        [
            [name, value, base := record.base.get(name), None if base is None else value - base]
            for name, value in record.metrics.items()
        ],
    )
    for name in nested[2:]:
        if value := getattr(record, name):
            say(f"\n{name.capitalize()}")
            print_json(value)


def _print_failure(failure: Failure) -> None:
    from mariotte.cli.console import format_cell, print_table, say

    rows = [
        [f.name, format_cell(getattr(failure, f.name))] for f in dataclasses.fields(failure) if f.name != "traceback"
    ]
    print_table("Failure", ["field", "value"], rows)
    say("")
    # A traceback keeps its lines, each cleared of what could command the terminal.
    say("\n".join(format_cell(line) for line in failure.traceback.splitlines()))

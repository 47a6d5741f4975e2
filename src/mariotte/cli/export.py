"""``mariotte export``: the records of a store as a table."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["export"]


def export(
    file: Annotated[str, typer.Argument(help="Where to write: a name ending in .csv, .parquet or .json.")],
    store: Annotated[
        str | None, typer.Option(help="File or URL of the store; default: $MARIOTTE_STORE, or mariotte.db.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Only records of this study.")] = None,
    model: Annotated[str | None, typer.Option(help="Only records of this model.")] = None,
    measure: Annotated[str | None, typer.Option(help="Only records of this measure, such as loss.")] = None,
    metric: Annotated[str | None, typer.Option(help="Only this metric, such as loss or top1.")] = None,
) -> None:
    """Write the records of a store as a table, one row a metric.

    The rows come in an order that depends on the records alone, so that equal stores give equal files. A file that
    exists is replaced, once the new one is whole. `mariotte fit` reads the table back, and so do pandas and R.
    """
    from mariotte.cli.console import say
    from mariotte.errors import StoreError
    from mariotte.store import open_store
    from mariotte.store.tables import records_table, write_table

    with open_store(store) as opened:
        name = opened.name
        records = opened.records(study=study, model=model, measure=measure)
    table: Any = records_table(records)  # pandas' own types promise less than a table has
    if metric is not None:
        known = sorted(set(table["metric"]))
        table = table[table["metric"] == metric]
        if known and table.empty:
            raise StoreError(f"no record has the metric {metric!r}: choose one of {', '.join(known)}")
    if table.empty:
        asked = {"study": study, "model": model, "measure": measure}
        given = ", ".join(f"{key} {value!r}" for key, value in asked.items() if value is not None)
        raise StoreError(
            f"nothing to export: {name} holds no record{f' of {given}' if given else ''}; see `mariotte ls`"
        )
    write_table(table, file)
    say(f"{len(table)} rows of {len(records)} records written to {file}")

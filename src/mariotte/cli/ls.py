"""``mariotte ls``: the experiments that a store holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mariotte.store.record import Record

__all__ = ["ls"]

SHORT = 8
"""Characters of an id that are shown, more where they would not tell two experiments apart."""


FIRST = ("loss", "top1")
"""Metrics that stand for their measure."""


def ls(
    store: Annotated[
        str | None, typer.Option(help="File or URL of the store; default: $MARIOTTE_STORE, or mariotte.db.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Only this study.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: experiments and failures, with full ids.")
    ] = False,
) -> None:
    """List the experiments of a store: what was done to which model, and what was measured.

    "removed" is the share of the dense model's parameters that are gone or zero. `mariotte show ID` prints all that is
    known of one; failures are mentioned below the table.
    """
    from mariotte.cli.console import print_json, print_table, say
    from mariotte.store import open_store

    with open_store(store) as opened:
        name = opened.name
        records = opened.records(study=study, model=model)
        failures = [failure for failure in opened.failures(study=study) if model in (None, failure.model)]
    experiments: dict[str, list[Record]] = {}
    for record in records:
        experiments.setdefault(record.experiment, []).append(record)
    if as_json:
        failed = [
            {"experiment": f.experiment, "study": f.study, "model": f.model, "chain": f.chain, "seed": f.seed}
            | {"stage": f.stage, "error": f.error, "created": f.created}
            for f in failures
        ]
        print_json(
            {"store": name, "experiments": [summary(group) for group in experiments.values()], "failures": failed}
        )
        return
    if not experiments and not failures:
        which = "" if study is model is None else " of these"
        say(f"{name} holds no experiment{which}; `mariotte run STUDY.toml` adds some")
        return
    length = prefix_length([*experiments, *(failure.experiment for failure in failures)])
    if experiments:
        rows: list[list[object]] = []
        for experiment, group in experiments.items():
            r = group[0]
            tokens = r.recovery_tokens or None
            rows.append(
                [experiment[:length], r.model, r.chain, r.seed, f"{r.removed:.1%}", tokens, metrics_text(group)]
            )
        columns = ["id", "model", "chain", "seed", "removed", "tokens", "metrics (dense model)"]
        print_table(f"{len(rows)} experiments in {name}", columns, rows)
    if failures:
        rows = [[f.experiment[:length], f.model, f.chain, f.stage, f.error] for f in failures]
        print_table(f"{len(rows)} failed in {name}", ["id", "model", "chain", "stage", "error"], rows)
        say("`mariotte show ID` prints the traceback of a failure; running the study again tries it again")


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """What the records of one experiment have in common, and every metric by its measure."""
    first = records[0]
    fields = ("experiment", "study", "model", "chain", "seed", "method", "amount", "ratio", "removed", "n_params")
    return {
        **{name: getattr(first, name) for name in (*fields, "recovery", "recovery_tokens")},
        "measures": {r.measure: {"id": r.id, "metrics": dict(r.metrics), "base": dict(r.base)} for r in records},
    }


def metrics_text(records: Sequence[Record], most: int = 6) -> str:
    """Metrics of one experiment in a line, with the dense model's value: ``loss 1.84 (1.32), top1 0.61 (0.98)``.

    Parameters
    ----------
    records : of one experiment; standard errors (``loss_se``) are left to `mariotte show`
    most : how many are shown; a knowledge measure alone may have dozens. Every measure shows its first one before any
        shows a second
    """
    from mariotte.cli.console import format_cell

    shown = [
        (rank, record, name)
        for record in records
        for rank, name in enumerate(sorted(set(record.metrics) - _errors(record), key=_importance))
    ]
    names = [name for _, _, name in shown]
    parts: list[str] = []
    for _, record, name in sorted(shown, key=lambda entry: entry[0]):
        label = name if names.count(name) == 1 else f"{record.measure} {name}"
        base = record.base.get(name)
        text = f"{label} {format_cell(record.metrics[name])}"
        parts.append(text + ("" if base is None else f" ({format_cell(base)})"))
    more = len(parts) - most
    return ", ".join(parts[:most]) + (f", {more} more" if more > 0 else "")


def _errors(record: Record) -> set[str]:
    return {f"{name}_se" for name in record.metrics}


def _importance(name: str) -> tuple[bool, str]:
    """The order of a measure's metrics: a store keeps them by name, which would put bits_per_byte before loss."""
    return name not in FIRST, name


def prefix_length(ids: Sequence[str]) -> int:
    """How many characters tell the ids apart, at least `SHORT`."""
    different = set(ids)
    longest = max(map(len, different), default=SHORT)
    return next((n for n in range(SHORT, longest) if len({i[:n] for i in different}) == len(different)), longest)

"""``mariotte compare``: what one model lost against another, on the same items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mariotte.cli.console import print_json, print_table, progress, say, warn

if TYPE_CHECKING:
    from mariotte.experiments.comparison import Comparison

__all__ = ["compare"]

FAILED = 1

MOST_LISTED = 20
"""Lost facts that are printed; all are in the page and in the JSON."""


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The dense model: a folder, testbed/NAME or a hub id.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="What became of it.")],
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as loss:wikitext2, knowledge:testbed, tasks:piqa, speed:random; may be given several times.  "
            "[default: loss, knowledge and tasks of the testbed for its models, else loss:wikitext2]"
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with code 1 if a change from BASE to OTHER is such: 'METRIC OP ±NUMBER' with %, pp (percentage "
            "points) or nothing (the metric's unit) after the number, such as 'loss > +3%', 'knowledge.top1 < -2pp', "
            "'size.bytes > -10%'; may be given several times.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a page of it, such as compare.html.")] = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every fact that was asked, kept, lost, gained or unknown to both, with its ranks and "
            "probabilities: a table FILE.csv or JSON lines FILE.jsonl.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Compute in this dtype.  [default: float32 on a CPU]")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, with all facts and questions that changed.")
    ] = False,
) -> None:
    """Compare two models on the same items: differences with intervals, facts lost, and conditions to fail on.

    Exit codes: 0; 1 when a condition of --fail-if holds; 2 when the comparison cannot be made.
    """
    from mariotte.cli._places import check_place

    if out is not None:
        check_place("--out", out)
    if facts is not None:
        check_place("--facts", facts, ".csv", ".jsonl")
    from mariotte.evaluate.facts import check_tells, write_rows
    from mariotte.experiments import identity
    from mariotte.experiments.comparison import compare as found_by
    from mariotte.experiments.comparison import usual_measures

    if facts is not None:
        check_tells(map(identity.resolve_measure, measure or usual_measures(base)))

    with progress(f"compare {base} with {other}") as update:
        found = found_by(
            base,
            other,
            measure,
            fail_if=fail_if or (),
            device=device,
            dtype=dtype,
            progress=lambda what: update(1, text=what),
        )
    if out is not None:
        from mariotte.report.compare import write

        page = write(found.plain(), out)
        if not as_json:
            say(str(page))
    if facts is not None:
        facts.parent.mkdir(parents=True, exist_ok=True)
        write_rows(facts, found.fact_rows())
        if not as_json:
            say(str(facts))
    if as_json:
        print_json(found.plain())
    else:
        _print(found)
    for one in found.conditions:
        changed = f"{one.metric} changed by {one.change:+.4g}{one.unit and ' ' + one.unit}"
        if one.failed:
            warn(f"failed, because {one.text}: {changed}")
        elif not as_json:
            say(f"passed, not {one.text}: {changed}")
    if found.failed:
        raise typer.Exit(FAILED)


def _print(found: Comparison) -> None:
    """Tables and lists for a terminal."""
    rows = [
        [
            row.measure,
            row.metric,
            row.base,
            row.other,
            row.difference,
            None if row.relative is None else f"{100 * row.relative:+.2f} %",
            None if row.lo is None or row.hi is None else f"{row.lo:+.4g} .. {row.hi:+.4g}",
            None if row.lost is None else f"-{row.lost} +{row.gained}",
            row.p,
            row.verdict,
        ]
        for row in found.rows
    ]
    columns = ["measure", "metric", "base", "other", "difference", "relative", "95 % interval", "flips", "p", "verdict"]
    print_table(f"{found.other.name} against {found.base.name}", columns, rows)
    for text, facts in found.facts.items():
        say(f"{text}: {len(facts.kept)} facts kept, {len(facts.lost)} lost, {len(facts.gained)} gained")
        for what, names in (("lost", facts.lost), ("gained", facts.gained)):
            for name in names[:MOST_LISTED]:
                say(f"  {what} {name}")
            if len(names) > MOST_LISTED:
                say(f"  and {len(names) - MOST_LISTED} more {what}: --facts, --json or --out lists them all")
    for note in found.notes:
        say(note)

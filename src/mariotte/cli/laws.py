"""``mariotte laws``: the laws, their sources and what is wrong with them."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["laws"]


def laws(
    name: Annotated[
        str | None, typer.Argument(help="One law, in full; without it all are listed.", show_default=False)
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Print the coefficients that papers give, and list the tables.")
    ] = False,
    measurements: Annotated[
        bool, typer.Option("--measurements", help="List the tables of other people's measurements that are shipped.")
    ] = False,
    learn: Annotated[
        list[str] | None,
        typer.Option(
            "--learn",
            metavar="TABLE|STORE",
            help="Learn what the family law knows beforehand from the shipped series and this table or store; "
            "repeatable. 'shipped' stands for the shipped series alone.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Write what was learned here, for 'mariotte fit --priors'.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the laws with their formulas and sources, or show one with its known defects."""
    from mariotte.cli.console import print_json, print_table, say
    from mariotte.errors import FitError
    from mariotte.laws.catalogue import LAWS, find
    from mariotte.laws.published import coefficients
    from mariotte.laws.published.constants import constants

    if learn:
        _learn(learn, out, as_json)
        return
    if out is not None:
        raise FitError(f"--out keeps what --learn learned, got {out!r} without --learn: say from what to learn")
    if measurements:
        _measurements(as_json)
        return
    chosen = [find(n) for n in (LAWS.names() if name is None else [name])]
    if published:
        rows = [row for row in coefficients() if row["law"] in {law.name for law in chosen}]
        if as_json:
            print_json(rows)
            return
        columns = ["law", "scope", "metric", "form", "alpha", "beta", "gamma", "adj_r2", "source", "mark", "note"]
        print_table("Published coefficients", columns, [[row[c] for c in columns] for row in rows])
        say("mark: read = in the paper's own text; checked = quotation checked against the paper by a third party.")
        _measurements(as_json)
        return
    if as_json:
        print_json(
            [
                {
                    "name": law.name,
                    "formula": law.formula,
                    "reference": law.reference,
                    "inputs": list(law.inputs),
                    "metric_kinds": list(law.metric_kinds),
                    "parameters": [p.name for p in law.params],
                    "anchored": law.anchored,
                    "baseline": law.baseline,
                    "defects": list(law.defects),
                    "published": constants(law.name),
                }
                for law in chosen
            ]
        )
        return
    rows = [
        [law.name, law.formula, "yes" if law.anchored else "no", " and ".join(law.metric_kinds), law.reference or "-"]
        for law in chosen
    ]
    print_table("Laws", ["name", "formula", "L(0) = L0", "describes", "source"], rows)
    if name is not None:
        (law,) = chosen
        say((law.__doc__ or "").strip().partition("\n")[0])
        say("What is wrong with it:")
        for i, defect in enumerate(law.defects, 1):
            say(f"{i}. {defect}")
        _known(law.name)


def _known(law: str) -> None:
    """Print what papers and we know of a law's coefficients, each with its mark."""
    from mariotte.cli.console import print_table, say
    from mariotte.laws.published import coefficients
    from mariotte.laws.published.constants import MARKS, constants

    columns = ["parameter", "value", "scope", "source", "mark", "note"]
    if known := constants(law):
        print_table("Known coefficients", columns, [[row[c] or "-" for c in columns] for row in known])
        marks = sorted({row["mark"] for row in known})
        say("mark: " + "; ".join(f"{mark} = {MARKS[mark]}" for mark in marks) + ".")
    if n := sum(row["law"] == law for row in coefficients()):
        say(f"{n} published fits: mariotte laws {law} --published")


def _measurements(as_json: bool) -> None:
    from mariotte.cli.console import print_json, print_table
    from mariotte.laws import published

    tables = [
        {
            "name": table.name,
            "rows": len(published.measurements(table.name)),
            "what": table.what,
            "licence": table.licence,
            "sources": published.sources(table.name),
            "quirks": table.quirks,
        }
        for table in published.TABLES
    ]
    if as_json:
        print_json(tables)
        return
    rows = [
        [t["name"], t["rows"], t["what"], ", ".join(published.sources(str(t["name"]))), t["licence"], t["quirks"]]
        for t in tables
    ]
    print_table("Published measurements", ["table", "rows", "what", "sources", "licence", "as printed"], rows)


def _learn(sources: list[str], out: str | None, as_json: bool) -> None:
    from pathlib import Path

    from mariotte.cli.console import one_line, print_json, print_table, say
    from mariotte.errors import FitError
    from mariotte.laws.transfer import learn_with, own_pool

    if out == "":  # as a path it would be the working folder
        raise FitError("--out needs the name of a file, got an empty one: give one, such as priors.json")
    own = own_pool(source for source in sources if source != "shipped")
    found = learn_with(own)
    if out is not None:
        Path(out).write_text(found.to_json(), encoding="utf-8")
    if as_json:
        print_json({"hash": found.hash, **found.to_dict()})
        return
    rows = [
        [scale, family, *curve.mean, curve.covariance[0][0] ** 0.5, curve.covariance[1][1] ** 0.5, curve.clusters]
        for scale, curves in found.curves.items()
        for family, curve in curves.items()
    ]
    columns = ["scale", "family", "level", "slope", "bend", "s.d. level", "s.d. slope", "clusters"]
    print_table(f"What the family law knows beforehand, with {len(own)} points of your own", columns, rows)
    rows = [
        [scale, name, q.points, q.clusters, q.at(0.8), q.at(0.9)]
        for scale, calibration in found.calibration.items()
        for name, q in calibration.bins.items()
    ]
    columns = ["scale", "answers", "points", "clusters", "80 %", "90 %"]
    print_table("Calibration: standard deviations on each side, a cluster left out at a time", columns, rows)
    say(f"hash {found.hash}")
    if out is not None:
        say(one_line(f"priors written to {out}: use them with mariotte fit --priors {out}"))

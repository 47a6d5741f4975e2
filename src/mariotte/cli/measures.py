"""``mariotte measures``: what can be measured."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, cast

import typer

from mariotte.cli.console import print_json, print_table

__all__ = ["measures"]


def measures(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List measures: their metrics and fields."""
    from mariotte.evaluate import MEASURES
    from mariotte.evaluate.base import Measure

    found: list[dict[str, Any]] = [
        {
            "name": name,
            "metrics": dict(kind.metrics),
            "fields": {f.name: f.default for f in dataclasses.fields(kind) if f.name != "on"},
            "summary": (kind.__doc__ or "").strip().partition("\n")[0],
        }
        for name in MEASURES.names()
        for kind in [cast("type[Measure]", MEASURES.find(name))]
    ]
    if as_json:
        print_json(found)
        return
    rows = [
        [f["name"], ", ".join(f["metrics"]), ", ".join(f"{k}={v}" for k, v in f["fields"].items()), f["summary"]]
        for f in found
    ]
    print_table("", ["measure", "metrics", "fields and defaults", ""], rows)

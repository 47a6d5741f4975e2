"""``mariotte methods``: what can be done to a model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from mariotte.cli.console import print_json, print_table

__all__ = ["methods"]


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List compression methods and recoveries: unit, pruning family, scopes, fields."""
    from mariotte.experiments.identity import find_step, step_names

    kinds = [find_step(name) for name in step_names()]
    found: list[dict[str, Any]] = [
        {
            "name": kind.name(),
            "unit": kind.unit,
            "family": kind.family,
            "scopes": list(kind.scopes),
            "fields": {f.name: f.default for f in dataclasses.fields(kind) if f.name != "scope"},
            "summary": (kind.__doc__ or "").strip().partition("\n")[0],
            "reference": kind.reference,
        }
        for kind in kinds
    ]
    if as_json:
        print_json(found)
        return
    rows = [
        [
            f["name"],
            f["unit"],
            f["family"],
            ", ".join(f["scopes"]),
            ", ".join(f"{k}={v}" for k, v in f["fields"].items()),
            f["summary"],
        ]
        for f in found
    ]
    print_table("", ["method", "amount counts", "family", "scopes", "fields and defaults", ""], rows)

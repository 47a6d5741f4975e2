"""``mariotte models``: families that are described, and the testbed's models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mariotte.cli.console import print_json, print_table

__all__ = ["models"]


def models(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the model families that can be compressed, and the models that come with the package."""
    from mariotte.accounting import count
    from mariotte.architectures import FAMILIES

    weights = Path(__file__).resolve().parent.parent / "testbed" / "weights"
    shipped = [
        {"name": f"testbed/{path.parent.name}", "model_type": config["model_type"], "n_params": count(config).n_params}
        for path in sorted(weights.glob("*/config.json"))
        for config in [json.loads(path.read_text(encoding="utf-8"))]
    ]
    shipped.sort(key=lambda entry: entry["n_params"])
    if as_json:
        print_json({"families": sorted(FAMILIES), "models": shipped})
        return
    print_table(
        "", ["model", "family", "parameters"], [[m["name"], m["model_type"], f"{m['n_params']:,}"] for m in shipped]
    )
    print_table("", ["family that any model may belong to"], [[name] for name in sorted(FAMILIES)])

"""``mariotte evaluate``: measures of one model."""

from __future__ import annotations

from typing import Annotated

import typer

from mariotte.cli.console import print_json, print_table, progress

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, testbed/NAME or a hub id.")],
    measure: Annotated[
        list[str], typer.Option(help="Such as loss:wikitext2 or knowledge:testbed; may be given several times.")
    ],
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Compute in this dtype.  [default: float32 on a CPU]")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, protocol and details included.")
    ] = False,
) -> None:
    """Measure a model: loss in nats per token and bits per byte, facts known."""
    from mariotte.evaluate.base import Measurement
    from mariotte.experiments import identity
    from mariotte.models.load import load

    measures = [identity.resolve_measure(text) for text in measure]
    loaded = load(model, device, dtype)
    found: dict[str, Measurement] = {}
    with progress(f"evaluate {model}", len(measures)) as update:
        for one in measures:
            update(0, text=identity.measure_text(one))
            found[identity.measure_text(one)] = one.measure(loaded)
            update(1)
    if as_json:
        print_json({"model": model, "fingerprint": loaded.fingerprint, "measures": found})
        return
    rows = [[text, name, value] for text, one in found.items() for name, value in one.metrics.items()]
    print_table(f"{model} ({loaded.counts.n_params:,} parameters)", ["measure", "metric", "value"], rows)

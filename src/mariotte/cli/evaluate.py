"""``mariotte evaluate``: measures of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mariotte.cli._takes import expected
from mariotte.cli.console import print_json, print_table, progress, say

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, testbed/NAME or a hub id.")],
    measure: Annotated[
        list[str], typer.Option(help="Such as loss:wikitext2 or knowledge:testbed; may be given several times.")
    ],
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every fact that was asked, known or unknown, with its rank and probability: a table FILE.csv "
            "or JSON lines FILE.jsonl.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Compute in this dtype.  [default: float32 on a CPU]")] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read the model block by block from its files instead of loading it whole.  [default: when it would "
            "not fit into free memory]",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it takes: memory, time.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, protocol and details included.")
    ] = False,
) -> None:
    """Measure a model: loss in nats per token and bits per byte, facts known.

    A model larger than memory is streamed: all text goes through one block before the next is read, and the numbers are
    those of the model in memory.
    """
    import contextlib
    import tempfile

    from mariotte.cli._places import check_place

    if facts is not None:
        check_place("--facts", facts, ".csv", ".jsonl")
    from mariotte.errors import ChainError
    from mariotte.evaluate.base import Measurement
    from mariotte.evaluate.facts import Row, Tells, check_tells, rows_of, write_rows
    from mariotte.experiments import identity
    from mariotte.experiments.estimate import preflight_evaluation
    from mariotte.models.load import find_device, load

    measures = [identity.resolve_measure(text) for text in measure]
    if facts is not None:
        check_tells(measures)
    find_device(device)
    takes = preflight_evaluation(model, measures, device=device, dtype=dtype, stream=stream)
    if takes.streamed and takes.cannot_stream:
        raise ChainError(takes.cannot_stream)
    if dry_run:
        if as_json:
            print_json({"model": model, "n_params": takes.n_params, "measures": measure, "preflight": takes})
        else:
            say(f"{model}: {takes.n_params:,} parameters; measures: {', '.join(measure)}")
            say(expected(takes))
        return
    tight = takes.free_bytes is not None and takes.peak_bytes > takes.free_bytes
    if (tight or (takes.streamed and stream is None)) and not as_json:
        say(expected(takes))
    found: dict[str, Measurement] = {}
    told: list[Row] = []
    with contextlib.ExitStack() as stack, progress(f"evaluate {model}", len(measures)) as update:
        # Nothing is written there: no weight is changed.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory())) if takes.streamed else None
        loaded = load(model, device, dtype, stream=scratch)
        for one in measures:
            text = identity.measure_text(one)
            update(0, text=text)
            if facts is not None and isinstance(one, Tells):
                found[text], every = one.tell(loaded)
                told += ({"measure": text, **row} for row in rows_of(every))
            else:
                found[text] = one.measure(loaded)
            update(1)
    if facts is not None:
        facts.parent.mkdir(parents=True, exist_ok=True)
        write_rows(facts, told)
    if as_json:
        print_json({"model": model, "fingerprint": loaded.fingerprint, "measures": found})
        return
    rows = [[text, name, value] for text, one in found.items() for name, value in one.metrics.items()]
    print_table(f"{model} ({loaded.counts.n_params:,} parameters)", ["measure", "metric", "value"], rows)
    if facts is not None:
        say(str(facts))

"""``mariotte run``: a study into a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mariotte.cli._running import run_shown
from mariotte.cli.console import duration, print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mariotte.experiments.estimate import Estimate
    from mariotte.experiments.run import Plan
    from mariotte.experiments.study import Study

__all__ = ["run"]


def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.")],
    store: Annotated[
        str | None, typer.Option(help="Where records go: a path or a URL.  [default: mariotte.db]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Compute here instead of where the study says.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads of torch, instead of the study's.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="Processes, instead of the study's.")] = None,
    runner: Annotated[
        str | None,
        typer.Option(help="What runs it, instead of what the study says: inline, processes or ray, a local cluster."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a Ray cluster that is there, or auto; implies --runner ray.")
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(help="Processors of each branch on Ray, instead of the study's.")
    ] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of each branch on Ray, instead of the study's.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of unfinished work, on every node.  [default: beside the store]")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Checkpoints that stay, instead of the study's: none, best or all.")
    ] = None,
    artifacts: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoints that stay.  [default: beside the store]")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed in an earlier run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and what it would take.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run what is missing of a study; stop it whenever you like and run it again.

    Every experiment is recorded as soon as it is measured. Exit code 1 when some experiments failed: the others are
    recorded, and what failed is left alone by the next run unless --retry-failed asks for it.
    """
    from mariotte.errors import unknown
    from mariotte.experiments.study import read, with_run
    from mariotte.report.claims import PAPERS
    from mariotte.store import open_store

    changes: dict[str, Any] = {
        "device": device,
        "threads": threads,
        "workers": workers,
        "runner": "ray" if ray_address is not None and runner is None else runner,
        "ray_address": ray_address,
        "cpus": cpus,
        "gpus": gpus,
        "keep": keep,
    }
    found = with_run(read(study), **{key: value for key, value in changes.items() if value is not None})
    if found.follows is not None and found.follows not in PAPERS:
        raise unknown("paper with claims", found.follows, PAPERS.names())  # now, not in the report after hours of work
    if dry_run:
        _say_plan(found, store, as_json)
        return
    with open_store(store, create=True) as opened:
        summary = run_shown(
            found,
            opened,
            study.read_text(encoding="utf-8"),
            work=None if work is None else work.resolve() / found.name,
            artifacts=artifacts,
            retry_failed=retry_failed,
        )
        if as_json:
            print_json(asdict(summary))
        else:
            where = "" if store is None else f" --store {store}"
            say(f"records are in {opened.name}; `mariotte report{where}` makes a page of them")
    if summary.failures or summary.failed_before:
        raise typer.Exit(1)


def _say_plan(study: Study, store: str | None, as_json: bool) -> None:
    """What a study would do, and take: from its file, from configs that are here, and from what a store holds of it."""
    from mariotte.errors import MariotteError
    from mariotte.experiments.estimate import estimate
    from mariotte.experiments.run import check, plan
    from mariotte.locate import peek_config
    from mariotte.store import open_store

    planned = plan(study)
    configs = {name: config for name in study.models if (config := peek_config(name)) is not None}
    records = []
    if store is not None and "://" not in store and Path(store).exists():
        with open_store(store) as opened:
            records = opened.records(study=study.name)
    expected = estimate(study, configs, records)
    missing = ""
    if not expected.unknown:
        try:
            check(study)
        except MariotteError as error:
            missing = str(error)
    if as_json:
        asked = [dict(zip(("measure", "kind", "items", "passes"), row, strict=True)) for row in _asked(study, configs)]
        print_json({**asdict(planned), "asked": asked, "expected": asdict(expected), "missing": missing or None})
        return
    _print_plan(study, planned, expected, configs)
    if expected.unknown:
        say(
            f"not here, so not in time, memory and disk: {', '.join(expected.unknown)}; `mariotte run` fetches them, "
            "or says that it cannot"
        )
    if missing:
        say(f"the study cannot run yet: {missing}")


def _asked(study: Study, configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int | None, int | None]]:
    """Of each measure of facts and tasks, by kind of model: questions, and rows of forward passes, as files tell.

    A model whose config is not here is of an unknown kind, and counted as what asks most: a causal one.
    """
    from mariotte import architectures
    from mariotte.experiments import identity

    found: dict[tuple[str, str], tuple[int | None, int | None]] = {}
    for model in study.models:
        config = configs.get(model)
        kind = None if config is None else architectures.of(config).kind
        for entry in study.measured(model):
            measure = identity.resolve_measure(entry.measure)
            place = identity.measure_text(measure), kind or "unknown"
            if identity.measure_name(measure) in ("knowledge", "tasks") and place not in found:
                work = measure.work(kind or "causal")
                found[place] = (None, None) if work is None else (work.items, work.passes)
    return [(*place, *numbers) for place, numbers in found.items()]


def _print_plan(study: Study, planned: Plan, expected: Estimate, configs: Mapping[str, Mapping[str, Any]]) -> None:
    total = sum(planned.evaluations.get(kind, 0) for kind in ("loss", "tasks", "knowledge"))
    kinds = ", ".join(f"{n:,} × {kind}" for kind, n in planned.evaluations.items())
    print_table(
        f"{study.name}: what would be done",
        ["", ""],
        [
            ["models", f"{planned.models:,}"],
            ["cuts", f"{planned.cuts:,}"],
            ["checkpoints, recovered ones among them", f"{planned.checkpoints:,}"],
            ["evaluations of their quality", f"{total:,} ({kinds})"],
            ["records, the dense models' among them", f"{planned.records:,}"],
        ],
    )
    if asked := _asked(study, configs):
        print_table(
            "Questions that one evaluation asks, from files without a model (- where these do not tell)",
            ["measure", "of a model that is", "questions", "forward passes, about"],
            [
                (measure, kind, *("-" if number is None else f"{number:,}" for number in numbers))
                for measure, kind, *numbers in asked
            ],
        )
    print_table(
        "Work, shared as the study's tree shares it, and if every chain ran alone",
        ["", "shared", "alone"],
        [
            ["models loaded", f"{planned.loads:,}", f"{planned.unshared_loads:,}"],
            ["steps prepared", f"{planned.preparations:,}", f"{planned.unshared_applications:,}"],
            ["steps applied", f"{planned.applications:,}", f"{planned.unshared_applications:,}"],
            ["tokens of recovery", f"{planned.shared_tokens:,}", f"{planned.recovery_tokens:,}"],
        ],
    )
    if expected.flops is None:
        return
    workers = f"{study.run.workers} worker{'s' if study.run.workers > 1 else ''}"
    source = "from what its records took" if expected.measured else "from shapes and this machine's speed"
    untimed = f"not known: no {study.run.device} here"
    times = [untimed if t is None else duration(t) for t in (expected.seconds, expected.unshared_seconds)]
    print_table(
        f"What it would take here, within a factor of about two ({source})",
        ["", ""],
        [
            ["floating-point operations", f"{expected.flops:.2g}"],
            [f"time, {workers}", times[0]],
            ["time, one process, every chain alone", times[1]],
            ["memory of a worker, beside Python and torch", size(expected.memory_bytes)],
            ["disk while it runs", size(expected.disk_bytes)],
            [f"checkpoints that stay (keep = {study.run.keep})", size(expected.kept_bytes)],
        ],
    )


def size(n_bytes: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"

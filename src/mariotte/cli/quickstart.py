"""``mariotte quickstart``: the whole of Mariotte on models that come with it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mariotte.cli._planned import print_options, say_choice
from mariotte.cli._running import run_shown
from mariotte.cli.console import duration, print_table, say

if TYPE_CHECKING:
    from mariotte.store.record import Record

__all__ = ["quickstart"]

ALLOWANCE = 0.05

UNTOUCHED = "testbed/qwen2-2m"
"""Planned for from the records of the others: a model of which the quickstart measures nothing."""

RECOVERY = "16k"
"""Tokens that the plan may spend: the most that the quickstart recovers with."""

OPTIONS = 4
"""Rows of the plan that are printed."""


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the records and the report.")] = Path("mariotte-quickstart"),
) -> None:
    """Compress, recover, measure, fit a law, plan and report, on tiny models: no network, about two minutes.

    It runs studies/quickstart.toml. Stop it whenever you like: run again, it goes on from there.
    """
    from mariotte.experiments.study import embedded, read
    from mariotte.report import usable_sentence, write
    from mariotte.store import open_store

    began = time.perf_counter()
    path = embedded("quickstart")
    study = read(path)
    out.mkdir(parents=True, exist_ok=True)
    say(f"{study.title}: {len(study.models)} models, {len(study.expanded())} chains on each, into {out}")
    with open_store(out / "quickstart.db", create=True) as store:
        summary = run_shown(study, store, path.read_text(encoding="utf-8"))
        records = store.records(study=study.name)
        say("")
        _print_cuts(records)
        _print_recovery(records)
        _print_law(records)
        say("")
        say(usable_sentence(records, allowance=ALLOWANCE))
        say("")
        _print_plan(out / "quickstart.db", records)
        page = write(
            records,
            out / "report.html",
            title=study.title,
            study=study.name,
            runs=store.runs(study=study.name),
            failures=store.failures(study=study.name),
        )
    say("")
    say(f"report: {page}")
    say(f"records: {out / 'quickstart.db'} (mariotte ls --store {out / 'quickstart.db'})")
    say(f"all of it took {duration(time.perf_counter() - began)}")
    if summary.failures:
        raise typer.Exit(1)


def _losses(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "loss" in record.metrics]


def _facts(records: Sequence[Record]) -> dict[str, float]:
    """Facts known, top-1, by experiment."""
    return {record.experiment: record.metrics["top1"] for record in records if "top1" in record.metrics}


def _cell(record: Record, facts: dict[str, float]) -> str:
    """Loss and facts known of one experiment, as in ``1.423 | 81 %``."""
    known = facts.get(record.experiment)
    return f"{record.metrics['loss']:.3f}" + ("" if known is None else f" | {known:.0%}")


def _print_cuts(records: Sequence[Record]) -> None:
    """Loss and facts at some of the amounts, one row a model and method."""
    losses, facts = _losses(records), _facts(records)
    amounts = sorted({r.amount for r in losses if r.amount is not None and r.recovery is None})[::2]
    dense = {r.model: r for r in losses if r.method is None}
    rows: list[list[object]] = []
    for model in sorted(dense, key=lambda name: dense[name].base_params):
        for method in sorted({r.method for r in losses if r.method is not None}):
            found = {r.amount: r for r in losses if (r.model, r.method, r.recovery) == (model, method, None)}
            rows.append(
                [
                    model.removeprefix("testbed/"),
                    method,
                    _cell(dense[model], facts),
                    *(f"{_cell(found[a], facts)} ({found[a].removed:.0%})" if a in found else None for a in amounts),
                ]
            )
    print_table(
        "Test loss (nats a token) | facts known (share of parameters removed, or zeroed by magnitude), on testbed/all",
        ["model", "method", "dense", *(f"@{a:g}" for a in amounts)],
        rows,
    )


def _print_recovery(records: Sequence[Record]) -> None:
    """Loss and facts after a cut and after recovery, one row a model and cut."""
    losses, facts = _losses(records), _facts(records)
    recovered = [r for r in losses if r.recovery is not None]
    tokens = sorted({r.recovery_tokens for r in recovered})
    cut = {(r.model, r.chain): r for r in losses if r.recovery is None}
    rows: list[list[object]] = []
    for model, chain in dict.fromkeys((r.model, r.chain.rpartition(" | ")[0]) for r in recovered):
        found = {r.recovery_tokens: r for r in recovered if (r.model, r.chain.rpartition(" | ")[0]) == (model, chain)}
        before = cut.get((model, chain))
        rows.append(
            [
                model.removeprefix("testbed/"),
                chain,
                None if before is None else _cell(before, facts),
                *(_cell(found[n], facts) if n in found else None for n in tokens),
            ]
        )
    print_table(
        "Recovery with LoRA: loss | facts known",
        ["model", "cut", "before", *(f"{n:,} tokens" for n in tokens)],
        rows,
    )


def _print_law(records: Sequence[Record]) -> None:
    """How well each law predicts cuts that it has not seen, and the best one fitted to the largest model."""
    from mariotte.report.lawtable import law_reports

    largest = max(records, key=lambda record: record.base_params).model
    for report in law_reports(records, allowance=ALLOWANCE):
        print_table(
            f"Laws fitted to the mild cuts of a series, judged on the harder ones: error in {report.unit}",
            ["law", "before collapse", "next cut", "all"],
            [[row.law, row.before_collapse, row.next_step, row.all] for row in report.holdout],
            note=f"{report.series} series, {report.holdout[0].folds} forecasts" if report.holdout else None,
        )
        fits = [fit for fit in report.fits if fit.series.startswith(largest)]
        if not fits:
            continue  # every series of this model has too few cuts before collapse; the report says it of each
        print_table(
            f"The best one, {fits[0].formula}, fitted to {largest.removeprefix('testbed/')}",
            ["method", "coefficients", f"share at +{ALLOWANCE:.0%} loss (80 % interval)"],
            [
                [
                    fit.series.rpartition(" × ")[2],
                    ", ".join(f"{c.name} = {c.value:.3g}" for c in fit.coefficients),
                    fit.critical,
                ]
                for fit in fits
            ],
        )


def _print_plan(store: Path, records: Sequence[Record]) -> None:
    """What these records say of a model that is not among them."""
    from mariotte.plan import plan, read_budget

    measure = next(record.measure for record in _losses(records))
    found = plan(
        UNTOUCHED, read_budget(max_loss=f"{ALLOWANCE:+.0%}", recovery_tokens=RECOVERY), store=store, measure=measure
    )
    say(
        f"A plan for {UNTOUCHED} ({found.n_params:,} parameters), which the quickstart does not touch: at most "
        f"{ALLOWANCE:+.0%} loss, up to {RECOVERY} tokens of recovery"
    )
    print_options(found, OPTIONS)
    say_choice(found)
    if found.winner is not None and not found.winner.quality[0].measured:
        say(
            f"make it and see: mariotte plan {UNTOUCHED} --max-loss {ALLOWANCE:+.0%} --recover {RECOVERY} "
            f"--store {shlex.quote(str(store))} --measure {shlex.quote(measure)} --execute"
        )

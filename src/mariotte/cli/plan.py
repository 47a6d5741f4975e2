"""``mariotte plan``: which chain meets a budget, and what to measure to be surer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mariotte.cli._planned import print_options, relative, say_choice
from mariotte.cli.console import print_json, print_table, progress, say

if TYPE_CHECKING:
    from mariotte.plan.answer import Plan
    from mariotte.plan.ranking import Planner
    from mariotte.store.record import Record

__all__ = ["plan"]

FAILED = 1

SHOWN = 8
"""Options that are printed; all are in the JSON."""


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, testbed/NAME or a hub id; only its config is read.")
    ],
    max_loss: Annotated[
        str | None, typer.Option(metavar="CHANGE", help="How much the loss may rise: +3% or +0.05 (nats).")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FLOOR",
            help="What another metric must keep: 'top1 >= -2pp' (facts), 'accuracy >= -3%'; may be given again.",
        ),
    ] = None,
    bytes: Annotated[
        str | None,
        typer.Option("--bytes", metavar="SIZE", help="Stored weights at most: 500MB, 60% of the dense model."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Weights, cache and activations at most: 12GB, at --context and --batch."),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence, for memory and speed.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once, for memory and speed.")] = 1,
    speedup: Annotated[
        str | None, typer.Option(metavar="TIMES", help="Decoding at least so many times as fast: 1.3x.")
    ] = None,
    latency: Annotated[float | None, typer.Option(help="Milliseconds of one decoding step at most.")] = None,
    recover: Annotated[
        str, typer.Option(metavar="TOKENS", help="Recovery tokens that may be trained on: 64k, 1M.")
    ] = "0",
    hours: Annotated[float | None, typer.Option(help="Hours of the device at most, cut and recovery together.")] = None,
    money: Annotated[float | None, typer.Option(help="Money at most, at --price.")] = None,
    price: Annotated[float | None, typer.Option(help="Of an hour of the device.")] = None,
    sure: Annotated[float, typer.Option(help="Probability with which floors are to be kept.")] = 0.8,
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.9,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Cut to consider, or several together: 'heads | ffn'; may be given several times.  "
            "[default: all of which anything is known]"
        ),
    ] = None,
    step: Annotated[float, typer.Option(help="Distance of the amounts that are considered.")] = 0.05,
    measure: Annotated[
        str | None,
        typer.Option(help="By which the loss is judged: loss:wikitext2.  [default: the one that is known best]"),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Measurements of your own: a path or a URL; probes are added to it.")
    ] = None,
    probe: Annotated[int, typer.Option(min=0, help="Make so many experiments first, those that tell most.")] = 0,
    execute: Annotated[bool, typer.Option("--execute", help="Compress with the winner and measure it.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --execute: folder for the checkpoint; must not exist yet, or be empty.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Corpus that probes may look at: a name or file:PATH.  [default: the testbed's for its models]"
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Blocks of calibration text.")] = 256,
    device: Annotated[str, typer.Option(help="Where it will run, and where probes compute.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of every random choice of probes.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
) -> None:
    """Plan a compression from shapes, laws and measurements alone: which chain, how much, how sure, at what price.

    Nothing is loaded or measured unless --probe or --execute ask for it. Exit codes: 0; 1 when nothing meets the budget
    as surely as is asked, or what was executed did not keep it; 2 for an impossible budget or what is missing.
    """
    from mariotte.errors import MariotteError
    from mariotte.plan.budget import read_budget
    from mariotte.plan.search import planner

    budget = read_budget(
        max_loss=max_loss,
        keep=keep or (),
        bytes=bytes,
        memory=memory,
        context=context,
        batch=batch,
        speedup=speedup,
        latency_s=None if latency is None else latency / 1000,
        recovery_tokens=recover,
        gpu_hours=hours,
        money=money,
        price_per_hour=price,
        sure=sure,
    )
    if out is not None and not execute:
        raise MariotteError("--out is for the checkpoint that --execute makes: give both, or neither")
    known = planner(
        model,
        budget,
        store=_existing(store, probe > 0 or execute),
        measure=measure,
        methods=method or None,
        step=step,
        level=level,
        device=device,
    )
    if not (probe or execute):
        found = known.plan()
    else:
        bench = Workbench(model, store=store, calibration=calibration, rows=rows, device=device, seed=seed)
        found = _worked(known, bench, probe, execute, out)
    if as_json:
        print_json(found.plain())
    else:
        _print(found)
    if found.winner is None or any(one.kept is False for one in found.verified):
        raise typer.Exit(FAILED)


def _existing(store: str | None, made: bool) -> str | None:
    """The store to read; None for one that probes will make."""
    if store is None or not made or "://" in store:
        return store
    return store if Path(store).exists() else None


def _worked(known: Planner, bench: Workbench, probes: int, execute: bool, out: Path | None) -> Plan:
    from mariotte.plan.probes import probe
    from mariotte.plan.verify import execute as executed

    if out is not None:
        from mariotte.models.checkpoint import check_target

        check_target(out)
    with progress(f"plan {known.model.name}", probes + execute) as update:
        if probes:
            known = probe(known, probes, bench, told=lambda chain, gain: update(1, text=f"probe {chain}"))
        found = known.plan()
        if not execute or found.winner is None:
            return found
        found = executed(known, bench, told=lambda chain: update(1, text=f"execute {chain}"))
        if out is not None and found.winner is not None:
            bench.save(found.winner.chain, out)
    return found


@dataclass(frozen=True)
class Workbench:
    """The bench as `mariotte.plan` is handed it: measures chains of one model into a store.

    Parameters
    ----------
    model : what `mariotte.load` takes
    store : where records go; None takes the default store
    calibration : corpus that steps may look at; None takes the testbed's for its models, and none for others
    rows : blocks of it
    device, seed : where to compute, and of every random choice
    """

    model: str
    store: str | None = None
    calibration: str | None = None
    rows: int = 256
    device: str = "cpu"
    seed: int = 0

    @property
    def corpus(self) -> str | None:
        """The corpus that steps may look at."""
        return self.calibration or ("testbed/all" if self.model.startswith("testbed/") else None)

    def __call__(self, chains: Sequence[str], measures: Sequence[str]) -> list[Record]:
        """Records of chains, measured now unless the store has them.

        Raises
        ------
        MariotteError
            When a chain cannot be made or measured.
        """
        from mariotte.chain import parse
        from mariotte.errors import MariotteError
        from mariotte.experiments.run import run
        from mariotte.experiments.study import Calibration, Chains, Run, Study
        from mariotte.store import open_store

        study = Study(
            format=1,
            name=f"plan-{re.sub(r'[^A-Za-z0-9._-]+', '-', self.model).strip('-.')}",
            title=f"Probes of plans for {self.model}",
            models=[self.model],
            chains=[Chains(chain=chain) for chain in chains],
            measures=list(measures),
            seeds=[self.seed],
            calibration=None if self.corpus is None else Calibration(corpus=self.corpus, rows=self.rows),
            run=Run(device=self.device),
        )
        with open_store(self.store, create=True) as opened:
            summary = run(study, opened, retry_failed=True)
            if summary.failures:
                raise MariotteError(f"{summary.failures[0].chain} could not be measured: {summary.failures[0].error}")
            wanted = {str(parse(chain)) for chain in chains}
            return [
                record
                for record in opened.records(study=study.name, model=self.model, seed=self.seed)
                if record.chain in wanted
            ]

    def save(self, chain: str, out: Path) -> None:
        """Make a chain once more and save it as a checkpoint that loads anywhere."""
        from mariotte.experiments.pipeline import compress_model
        from mariotte.models import checkpoint
        from mariotte.models.load import load

        dense = load(self.model, self.device, None)
        done = compress_model(dense, chain, calibration=self.corpus, rows=self.rows, seed=self.seed)
        checkpoint.save(done, out, dense_params=dense.counts.n_params)


def _print(found: Plan) -> None:
    """Tables and sentences for a terminal."""
    say(f"{found.model}: {found.n_params:,} parameters, {found.n_bytes:,} bytes; judged by {', '.join(found.measures)}")
    if found.probes:
        say(f"measured for this plan: {', '.join(found.probes)}")
    print_options(found, SHOWN)
    say_choice(found)
    for one in found.verified:
        p = one.predicted
        say(
            f"{p.metric}: predicted {p.mean:.4g} ({p.lo:.4g} to {p.hi:.4g}), measured {one.measured:.4g} "
            f"({relative(one.measured, p.base)}): {'inside' if one.inside else 'outside'} the interval"
            + ("" if one.kept is None else f", the floor is {'kept' if one.kept else 'not kept'}")
        )
    if found.rivals:
        print_table(
            "compress this one, or take a smaller one?",
            [
                "smaller model",
                "parameters",
                found.rivals[0].metric,
                "keeps the floor",
                "best cut to its size",
                "interval",
                "verdict",
            ],
            [
                [
                    r.model,
                    f"{r.n_params:,}",
                    r.value,
                    "yes" if r.within else "no",
                    "none so small" if r.chain is None else f"{r.chain}: {r.mean:.4g}",
                    "-" if r.lo is None or r.hi is None else f"{r.lo:.4g} .. {r.hi:.4g}",
                    r.verdict,
                ]
                for r in found.rivals
            ],
        )
    for sentence in found.unknowns:
        say(f"not known: {sentence}")
    for one in found.experiments:
        gain = f"expected gain {one.gain:.3f}, " if one.gain > 0 else ""
        say(f"would tell: {one.chain}, {one.why} ({gain}interval of the choice {one.narrows:.0%} narrower)")

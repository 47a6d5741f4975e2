"""Whether plans keep what they promise with methods of which only a store has records, and with several cuts together.

    python benchmarks/plan_stored.py STORE     measures (resumable, some minutes); writes results/plan_stored.md

Six decoders of the testbed, each held out in turn: the five others' records of heads, flap, llm-pruner, modegpt and
svd-llm (with those that come with the package) are all that is known. Every measured cut of the held-out model beside
what was said of it; then plans for +5 % and +10 % with these methods alone, with three probes, read from the same
records.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mariotte.chain import parse
from mariotte.experiments.run import run
from mariotte.experiments.study import Calibration, Chains, Run, Study
from mariotte.locate import config_of
from mariotte.plan import pool
from mariotte.plan.budget import read_budget
from mariotte.plan.probes import probe
from mariotte.plan.quality import Asked
from mariotte.plan.search import planner
from mariotte.plan.verify import execute
from mariotte.shapes import Sized, left_by
from mariotte.store import open_store

RESULTS = Path(__file__).parent / "results"
MEASURE = "loss:testbed/encyclopedia(rows=160)"
NAMES = ("llama-146k", "llama-483k", "llama-1m", "qwen2-113k", "qwen2-345k", "qwen2-1m")
MODELS = [f"testbed/{name}" for name in NAMES]
METHODS = ("flap", "heads", "llm-pruner", "modegpt", "svd-llm")
STEP = 0.1


def chains_of(model: str) -> list[str]:
    """Each width once, at most .7: what is larger destroys these models."""
    sized = Sized.of(model, config_of(model))
    found: dict[tuple[str, int], str] = {}
    for method in METHODS:
        for tenth in range(1, 8):
            chain = f"{method}@{tenth * STEP:g}"
            left = left_by(sized, parse(chain))
            if left is not None and left.obtained > 0:
                found.setdefault((method, left.n_params), chain)
    return list(found.values())


def measure(store: str) -> dict[str, dict[str, Any]]:
    """Records of every chain by model and chain."""
    study = Study(
        format=1,
        name="plan-stored",
        models=MODELS,
        chains=[Chains(chain=chain, models=[model]) for model in MODELS for chain in chains_of(model)],
        measures=[MEASURE],
        seeds=[0],
        calibration=Calibration(corpus="testbed/all", rows=128),
        run=Run(threads=1),
    )
    with open_store(store, create=True) as opened:
        summary = run(study, opened)
        assert not summary.failures, summary.failures
        return {m: {r.chain: r for r in opened.records(study=study.name, model=m)} for m in MODELS}


def main(store: str) -> None:
    truth = measure(store)
    entries = {m: pool.of_records(truth[m].values()) for m in MODELS}
    rows: list[tuple[str, bool, float, float, int]] = []
    loops: list[str] = []
    held = kept = near = 0
    for short, model in zip(NAMES, MODELS, strict=True):
        known = [*pool.without(pool.shipped(), model), *(e for m in MODELS if m != model for e in entries[m])]
        first = planner(model, read_budget(max_loss="+5%"), pool=known, measure=MEASURE, methods=METHODS, step=STEP)
        candidates = {c.chain: c for c in first.candidates}
        (quality,) = first.qualities
        asked: list[Asked] = [candidates[chain].asked for chain in truth[model] if chain in candidates]
        for one, forecast in zip(asked, quality.forecasts(asked), strict=True):
            record = truth[model][one.chain]
            value, base = record.metrics["loss"], record.base["loss"]
            if (value - base) / base > 0.35:
                continue  # as intervals are calibrated on what may still be wanted
            off = abs(candidates[one.chain].left.n_params - record.n_params)
            assert off <= candidates[one.chain].left.slack, (model, one.chain)
            inside = forecast.lo - 1e-4 * base <= value <= forecast.hi + 1e-4 * base
            width, error = (forecast.hi - forecast.lo) / 2 / base, (forecast.mean - value) / base
            rows.append((one.parts.cut, inside, width, error, off))

        def bench(chains: Any, measures: Any, found: dict[str, Any] = truth[model]) -> Any:
            return [found[chain] for chain in chains]

        for target in ("+5%", "+10%"):
            budget = read_budget(max_loss=target)
            start = planner(model, budget, pool=known, measure=MEASURE, methods=METHODS, step=STEP)
            start = replace(start, candidates=tuple(c for c in start.candidates if c.chain in truth[model]))
            plan = probe(start, 3, bench)
            if plan.plan(experiments=0).winner is None:
                loops.append(f"| {short} | {target} | {', '.join(plan.probes)} | nothing | - | - | - | - |")
                continue
            done = execute(plan, bench)
            (checked,), winner = done.verified, done.winner
            assert winner is not None
            limit = checked.predicted.limit
            assert limit is not None
            fitting = {c: 1 - r.n_params / r.base_params for c, r in truth[model].items() if r.metrics["loss"] <= limit}
            best = max(fitting, key=lambda c: fitting[c], default="dense")
            missed = fitting.get(best, 0.0) - winner.saving
            held, kept, near = held + checked.inside, kept + bool(checked.kept), near + (abs(missed) <= 0.03)
            base = checked.predicted.base
            loops.append(
                f"| {short} | {target} | {', '.join(plan.probes)} | {winner.chain} "
                f"| {winner.saving:.3f} | {best} | {fitting.get(best, 0.0):.3f} | {checked.measured / base - 1:+.3f} |"
            )
    lines = [
        "# Do plans keep what they promise with methods that only a store knows?",
        "",
        f"Made by `benchmarks/plan_stored.py`: six testbed decoders, each held out in turn; loss `{MEASURE}`,",
        f"seed 0, calibration of 128 rows; {', '.join(METHODS)} at tenths up to .7.",
        "Predictions before anything of the model was measured, for cuts that cost up to 35 % of the dense loss;",
        "half-widths and errors are shares of the dense loss.",
        "",
        "| method | cuts | 90 % interval held | median half-width | median error | parameters off by at most |",
        "|---|---|---|---|---|---|",
    ]
    for method in (*METHODS, "all"):
        some = [row for row in rows if method in ("all", row[0])]
        lines.append(
            f"| {method} | {len(some)} | {sum(row[1] for row in some)} "
            f"| {statistics.median(row[2] for row in some):.3f} "
            f"| {statistics.median(abs(row[3]) for row in some):.3f} | {max(row[4] for row in some):,} |"
        )
    lines += [
        "",
        f"Plans with these methods alone and three probes: {len(loops)} loops, the 90 % interval held in {held},",
        f"the floor was kept in {kept}, and the saving was within 3 points of the best of all that were measured in",
        f"{near}.",
        "",
        "| model | target | probes | chosen | saving | best | its saving | measured |",
        "|---|---|---|---|---|---|---|---|",
        *loops,
    ]
    (RESULTS / "plan_stored.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])

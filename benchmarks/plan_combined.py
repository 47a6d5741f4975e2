"""Whether the damages of several cuts add: combinations beside the sum of what each cut does alone.

    python benchmarks/plan_combined.py STORE     measures (resumable); writes results/plan_combined.md

Four decoders of the testbed, pairs, triples and all four of ffn, slice, heads and shortgpt. A plan takes the sum, times
a factor with a spread, for combinations of which a model has no measurement: `mariotte.plan.quality.ADDS` is from here.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

from mariotte.chain import parse
from mariotte.experiments.run import run
from mariotte.experiments.study import Calibration, Chains, Run, Study
from mariotte.store import open_store

RESULTS = Path(__file__).parent / "results"
MEASURE = "loss:testbed/encyclopedia(rows=160)"
MODELS = [f"testbed/{name}" for name in ("llama-146k", "qwen2-345k", "llama-1m", "qwen2-1m")]
ALONE = [f"{method}@{amount}" for method in ("ffn", "slice", "shortgpt") for amount in (0.2, 0.4)]
ALONE += ["heads@0.25", "heads@0.5"]
TOGETHER = (
    "ffn@0.2 | slice@0.2",
    "ffn@0.4 | slice@0.2",
    "heads@0.25 | ffn@0.2",
    "heads@0.5 | ffn@0.4",
    "heads@0.25 | slice@0.2",
    "shortgpt@0.2 | ffn@0.2",
    "shortgpt@0.2 | heads@0.25",
    "shortgpt@0.2 | slice@0.2",
    "heads@0.25 | ffn@0.4 | slice@0.2",
    "shortgpt@0.2 | heads@0.25 | ffn@0.2",
    "shortgpt@0.2 | heads@0.25 | ffn@0.2 | slice@0.2",
)
LEAST = 0.004
"""Sum of damages, nats, below which a ratio says nothing."""


def main(store: str) -> None:
    study = Study(
        format=1,
        name="plan-combined",
        models=MODELS,
        chains=[Chains(chain=chain) for chain in (*ALONE, *TOGETHER)],
        measures=[MEASURE],
        seeds=[0],
        calibration=Calibration(corpus="testbed/all", rows=128),
        run=Run(threads=1),
    )
    with open_store(store, create=True) as opened:
        summary = run(study, opened)
        assert not summary.failures, summary.failures
        records = {(r.model, r.chain): r for r in opened.records(study=study.name)}
    lines = [
        "# Do the damages of several cuts add?",
        "",
        f"Made by `benchmarks/plan_combined.py`: damage (nats over the dense loss, `{MEASURE}`, seed 0, calibration of",
        "128 rows) of combinations beside the sum of the damages of their cuts alone.",
        "",
        "| model | dense loss | combination | damage | sum alone | ratio |",
        "|---|---|---|---|---|---|",
    ]
    found: dict[int, list[float]] = {}
    for model in MODELS:
        for chain in TOGETHER:
            record = records[model, chain]
            base = record.base["loss"]
            damage = record.metrics["loss"] - base
            links = parse(chain).links
            alone = sum(records[model, str(link)].metrics["loss"] - base for link in links)
            ratio = damage / alone if alone > LEAST else math.nan
            if not math.isnan(ratio):
                found.setdefault(len(links), []).append(math.log(ratio))
            escaped = chain.replace("|", "\\|")
            shown = "-" if math.isnan(ratio) else f"{ratio:.2f}"
            lines.append(
                f"| {model.removeprefix('testbed/')} | {base:.3f} | {escaped} | {damage:.4f} | {alone:.4f} | {shown} |"
            )
    everything = [z for some in found.values() for z in some]
    lines += ["", "| cuts | combinations | mean logarithm of the ratio | standard deviation |", "|---|---|---|---|"]
    for count, some in [*sorted(found.items()), ("all", everything)]:
        lines.append(f"| {count} | {len(some)} | {statistics.mean(some):+.2f} | {statistics.pstdev(some):.2f} |")
    least, most = math.exp(min(everything)), math.exp(max(everything))
    lines += [
        "",
        f"Ratios lie between {least:.2f} and {most:.2f}, median {math.exp(statistics.median(everything)):.2f}. Where",
        "cuts do much, what they do nearly adds; the largest ratios are those of damages of a few hundredths of a nat",
        "with `slice` behind another cut.",
    ]
    (RESULTS / "plan_combined.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[-9:]))


if __name__ == "__main__":
    main(*sys.argv[1:])

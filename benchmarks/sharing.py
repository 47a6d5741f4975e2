"""What sharing saves: a sample of a study as one tree, and the same chains each run alone, in one process.

    python benchmarks/sharing.py studies/testbed/pruning-laws.toml --models testbed/qwen2-345k --chains 72

The sample takes every k-th experiment of these models in the order of the file: all of them when there are no more. A
sample that leaves many out shares less than the study does. Alone, an experiment loads its model, measures it dense,
prepares, applies and measures; both sides write to a store. Both are timed by the processor's time of this process too,
which other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from mariotte.experiments import run as running
from mariotte.experiments.environment import environment
from mariotte.experiments.study import Chains, Study, read
from mariotte.models.step import Counters
from mariotte.store import open_store


def sample(study: Study, models: list[str], count: int) -> list[tuple[str, str]]:
    """About `count` experiments of some models of a study, evenly spaced."""
    every = [(model, str(chain)) for model in models for chain in study.expanded(model)]
    step = max(1, len(every) // count)
    return every[::step][:count]


def part(study: Study, chosen: list[tuple[str, str]]) -> Study:
    """The study with these experiments alone."""
    models = list(dict.fromkeys(model for model, _ in chosen))
    chains = [Chains.model_validate({"chain": chain, "models": [model]}) for model, chain in chosen]
    one = study.run.model_copy(update={"workers": 1})
    return study.model_copy(update={"models": models, "chains": chains, "run": one})


def timed(studies: list[Study], folder: Path) -> tuple[float, float, Counters, int]:
    """Run studies, each into a store of its own; wall and processor seconds, what was done, and failures."""
    counters, failures = Counters(), 0
    wall, own = time.perf_counter(), time.process_time()
    for number, study in enumerate(studies):
        with open_store(folder / f"{number}.db", create=True) as store:
            summary = running.run(study, store)
        failures += len(summary.failures)
        for name, value in asdict(summary.counters).items():
            setattr(counters, name, getattr(counters, name) + value)
    return time.perf_counter() - wall, time.process_time() - own, counters, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--models", nargs="*", help="of the study; all of them by default")
    parser.add_argument("--chains", type=int, default=48)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    study = read(asked.study)
    chosen = sample(study, asked.models or study.models, asked.chains)
    # Once before the clock starts: code is compiled, text is read, and files come into the system's memory.
    with tempfile.TemporaryDirectory() as folder:
        timed([part(study, chosen[:1])], Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        shared = timed([part(study, chosen)], Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        alone = timed([part(study, [one]) for one in chosen], Path(folder))
    found = {
        "study": study.name,
        "chains": len(chosen),
        "models": len({model for model, _ in chosen}),
        "shared": {"wall_s": shared[0], "cpu_s": shared[1], **asdict(shared[2]), "failures": shared[3]},
        "alone": {"wall_s": alone[0], "cpu_s": alone[1], **asdict(alone[2]), "failures": alone[3]},
        "factor_wall": alone[0] / shared[0],
        "factor_cpu": alone[1] / shared[1],
        "environment": environment(),
        "sample": [f"{model}: {chain}" for model, chain in chosen],
    }
    print(json.dumps({key: value for key, value in found.items() if key != "sample"}, indent=2))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

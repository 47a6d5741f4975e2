"""What Ray costs and what it brings: one study inline, on one and two one-core workers, and in two bare processes.

    python benchmarks/ray_overhead.py --out benchmarks/results/ray.md

A cluster of two nodes with one processor each is started on this machine. The same branches of one study are worked
off in rounds by five sides: this process, one Ray worker, two Ray workers, one bare process, two bare processes (a pool
that maps `perform` over the branches, without Ray and without a store). Workers have imported everything before: what
is timed is the work. Ratios are taken within a round, because other work on the machine changes from round to round,
and the processor's time of all processes involved (Ray's own among them) is counted beside the clock.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")

import ray as package
import torch
from ray.cluster_utils import Cluster

from mariotte.experiments import run as running
from mariotte.experiments.branches import split
from mariotte.experiments.environment import environment
from mariotte.experiments.pipeline import Held, Outcome, Task, perform
from mariotte.experiments.runners import ray as runner
from mariotte.experiments.study import Study, parse, with_run
from mariotte.models.step import Counters
from mariotte.store import open_store
from mariotte.store.record import Record

STUDY = """
format = 1
name = "ray"
models = ["testbed/qwen2-345k"]
measures = ["loss:testbed/all(rows={rows})"]
seeds = [0, 1]
chains = [{{ chain = "{{method}}@{{amount}}", method = ["magnitude", "random", "slice", "ffn"], amount = {amounts} }}]
[calibration]
corpus = "testbed/all"
rows = 16
[run]
threads = 1
"""
SIDES = ("inline", "one Ray worker", "two Ray workers", "one bare process", "two bare processes")


def below(pid: int) -> list[int]:
    """Ids of a process and of all below it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        parents.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def processor_s() -> float:
    """Seconds of processors that this process and those below it have used."""
    total = 0
    for pid in below(os.getpid()):
        try:
            values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(values[11]) + int(values[12])
    return total / os.sysconf("SC_CLK_TCK")


_held = Held()


def bare(task: Task) -> list[Outcome]:
    """A branch in a process of the pool."""
    return list(perform(task, Counters(), held=_held))


def in_pool(study: Study, pool: Any, work: Path) -> dict[str, str]:
    """The study in bare processes: the dense model first, then every branch by whoever is free."""
    (model,) = study.models
    whole = Task(
        study=study.name,
        model=model,
        chains=tuple(map(str, study.expanded(model))),
        measures={str(measure.measure): measure.of for measure in study.measured(model)},
        seeds=tuple(study.seeds),
        calibration=study.calibration,
        work=work,
        threads=1,
    )
    dense, *branches = split(whole)
    (first,) = pool.apply(bare, (dense,))
    known: dict[str, Record] = {record.id: record for record in first.records}
    ready = [replace(task, dense=known, settled=frozenset([first.experiment])) for task in branches]
    outcomes = [first, *(one for many in pool.imap_unordered(bare, ready, chunksize=1) for one in many)]
    return {record.id: record.result_hash() for outcome in outcomes for record in outcome.records}


def in_store(study: Study, work: Path) -> dict[str, str]:
    """The study as a user runs it, into a new store."""
    with open_store(work / "s.db", create=True) as store:
        summary = running.run(study, store)
        assert not summary.failures, summary.failures
        return {record.id: record.result_hash() for record in store.records()}


def sides(study: Study, pools: dict[int, Any]) -> dict[str, Callable[[Path], dict[str, str]]]:
    """By name: what does the study, given a folder of its own."""
    room = runner._room

    def on(workers: int) -> Callable[[Path], dict[str, str]]:
        def side(work: Path) -> dict[str, str]:
            # The cluster stays as it is, so that both have the same background; one branch at a time is one worker.
            runner._room = lambda nodes, cpus, gpus: min(workers, room(nodes, cpus, gpus))
            return in_store(with_run(study, runner="ray"), work)

        return side

    return {
        "inline": lambda work: in_store(study, work),
        "one Ray worker": on(1),
        "two Ray workers": on(2),
        "one bare process": lambda work: in_pool(study, pools[1], work),
        "two bare processes": lambda work: in_pool(study, pools[2], work),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    amounts = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    study = parse(STUDY.format(rows=given.rows, amounts=amounts))
    small = parse(STUDY.format(rows=2, amounts=[0.5]))
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**node, "include_dashboard": False, "_system_config": {"memory_monitor_refresh_ms": 0}},
    )
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    used: dict[str, list[float]] = {name: [] for name in SIDES}
    experiments = 0
    try:
        cluster.add_node(**node)
        package.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        with spawn.Pool(1) as one, spawn.Pool(2) as two, tempfile.TemporaryDirectory() as folder:
            pools = {1: one, 2: two}
            for name, side in sides(small, pools).items():
                for again in range(2):
                    work = Path(folder) / f"warm {name} {again}"
                    work.mkdir()
                    side(work)
            known: dict[str, str] = {}
            for number in range(given.rounds):
                for name, side in sides(study, pools).items():
                    work = Path(folder) / f"{number} {name}"
                    work.mkdir()
                    before, began = processor_s(), time.perf_counter()
                    found = side(work)
                    times[name].append(time.perf_counter() - began)
                    used[name].append(processor_s() - before)
                    assert found == (known or found), f"{name} measured something else"
                    known = found
                    print(f"{number} {name}: {times[name][-1]:.2f} s, {used[name][-1]:.2f} s used", file=sys.stderr)
            experiments = len(known)
    finally:
        package.shutdown()
        cluster.shutdown()
    text = page(study, times, used, experiments, given)
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


def page(
    study: Study, times: dict[str, list[float]], used: dict[str, list[float]], experiments: int, given: Any
) -> str:
    """What was found, as Markdown."""

    def ratio(a: str, b: str) -> str:
        found = sorted(x / y for x, y in zip(times[a], times[b], strict=True))
        return f"{median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"

    def overhead(of: dict[str, list[float]]) -> str:
        found = sorted(1000 * (x - y) / experiments for x, y in zip(of["one Ray worker"], of["inline"], strict=True))
        return f"{median(found):.0f} ms ({found[0]:.0f} to {found[-1]:.0f})"

    where = environment()
    rows = "\n".join(
        f"| {name} | {median(times[name]):.2f} | {min(times[name]):.2f} | {median(used[name]):.2f} |" for name in SIDES
    )
    return f"""# Ray: overhead and speed-up, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}

`python benchmarks/ray_overhead.py --rounds {given.rounds} --rows {given.rows}`: {experiments} experiments of
{study.models[0]} (4 methods, 6 amounts, 2 seeds; 8 branches and the dense model), one thread each, two nodes of one
processor on one machine of {where["cores"]} shared cores ({where["hardware"]}), {where["system"]}, torch
{where["torch"]}, Ray {package.__version__}, Python {where["python"]}. All sides found the same results. Ratios are of
sides of the same round: median (least to most) of {given.rounds}. Other work was on the machine (load
{os.getloadavg()[1]:.1f} over the last 5 minutes).

| side | clock, median, s | clock, least, s | processor, median, s |
|---|---|---|---|
{rows}

| question | answer |
|---|---|
| overhead an experiment, by the clock: one Ray worker less inline | {overhead(times)} |
| the same by the processor, Ray's own processes counted | {overhead(used)} |
| speed-up of two one-core Ray workers over one | {ratio("one Ray worker", "two Ray workers")} |
| speed-up of two bare processes over one, on the same work | {ratio("one bare process", "two bare processes")} |
| two Ray workers against two bare processes, time | {ratio("two Ray workers", "two bare processes")} |
"""


if __name__ == "__main__":
    main()

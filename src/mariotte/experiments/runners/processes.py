"""Experiments in several processes of this machine, one model to each at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from mariotte import chain as chains
from mariotte.errors import MariotteError
from mariotte.experiments.pipeline import Outcome, Serving, Task, now, perform
from mariotte.models.step import Counters
from mariotte.store.record import Failure, Record, digest

__all__ = ["processes"]

_SAY_EVERY_S = 0.2
"""How often a worker tells its progress: a step of training can take a millisecond."""


def _die_with_parent() -> None:
    """End this process as soon as its parent is gone, however it went: nobody would store what it finds."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _work(line: Connection) -> None:
    """Do the tasks that come down the line, until one is None."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    said = 0.0

    def progress(stage: str, done: float) -> None:
        nonlocal said
        if (moment := time.monotonic()) - said >= _SAY_EVERY_S:
            said = moment
            line.send(("progress", (stage, done)))

    try:
        while (task := cast("Task | None", line.recv())) is not None:
            counters = Counters()
            for outcome in perform(task, counters, progress, lambda served: line.send(("serving", served))):
                line.send(("outcome", (outcome, replace(counters))))
            line.send(("done", replace(counters)))
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return  # the parent got it too, and says so, or is gone
    except MariotteError as error:
        line.send(("error", error))
    except Exception:
        line.send(("bug", traceback.format_exc()))


@dataclass
class _Worker:
    """A process, the line to it, and what it is doing.

    Parameters
    ----------
    task : what it works on, None when it waits
    serving : the experiments that its present work is for
    settled : ids of the experiments of this task that it told the outcome of
    records : that came of them, by id
    counters : of this task, as of its last outcome
    """

    process: BaseProcess
    line: Connection
    task: Task | None = None
    serving: tuple[Serving, ...] = ()
    settled: set[str] = field(default_factory=lambda: set[str]())
    records: dict[str, Record] = field(default_factory=lambda: dict[str, Record]())
    counters: Counters = field(default_factory=Counters)

    def begin(self, task: Task) -> None:
        self.task, self.serving, self.settled, self.records = task, (), set(), {}
        self.counters = Counters()
        self.tell(task)

    def tell(self, task: Task | None) -> None:
        """Hand over a task, or none any more; of a process that is dead already, the line says so when it is read."""
        with contextlib.suppress(OSError):
            self.line.send(task)

    def heard(self) -> tuple[str, Any] | None:
        """What the process says next; None when it is dead, be it in the middle of a word."""
        try:
            return cast("tuple[str, Any]", self.line.recv())
        except (EOFError, OSError):
            return None


def _add(counters: Counters, more: Counters) -> None:
    for part in fields(Counters):
        setattr(counters, part.name, getattr(counters, part.name) + getattr(more, part.name))


def processes(
    tasks: Iterable[Task], counters: Counters, progress: Callable[[str, float], None], workers: int
) -> Iterator[Outcome]:
    """Perform tasks in `workers` processes and yield every outcome as soon as it is there.

    Workers never touch the store: the caller adds what comes back. They end with this process, however it ends. When
    a worker is killed, as the system does when memory runs out, the experiments that it was working for fail, and
    another worker goes on with the rest of its task.

    Raises
    ------
    MariotteError
        What a worker raised.
    """
    # Started afresh rather than forked: a fork would copy torch's thread pools in whatever state they are.
    context = multiprocessing.get_context("spawn")
    todo = deque(tasks)
    team: list[_Worker] = []

    def hire() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the line ends when the worker does
        worker = _Worker(process, ours)
        team.append(worker)
        return worker

    def employ(worker: _Worker) -> None:
        if todo:
            worker.begin(todo.popleft())
        else:
            worker.task = None
            worker.tell(None)
            team.remove(worker)

    try:
        for _ in range(min(workers, len(todo))):
            employ(hire())
        while team:
            for line in wait([worker.line for worker in team]):
                worker = next(worker for worker in team if worker.line is line)
                if (said := worker.heard()) is None:
                    team.remove(worker)
                    _add(counters, worker.counters)
                    rest, lost = _buried(worker)
                    yield from lost
                    if rest is not None:
                        todo.appendleft(rest)
                        employ(hire())
                    continue
                kind, what = said
                if kind == "outcome":
                    outcome, worker.counters = what
                    worker.settled.add(outcome.experiment)
                    worker.records |= {record.id: record for record in outcome.records}
                    yield outcome
                elif kind == "progress":
                    progress(*what)
                elif kind == "serving":
                    worker.serving = what
                elif kind == "error":
                    raise what
                elif kind == "bug":
                    raise RuntimeError(f"in a worker:\n{what}")
                else:
                    _add(counters, what)
                    employ(worker)
    finally:
        for worker in team:
            worker.process.terminate()
            worker.process.join()


def _buried(worker: _Worker) -> tuple[Task | None, list[Outcome]]:
    """What is left to do of a dead worker's task, and the failures of what it was doing."""
    worker.process.join()
    task = worker.task
    assert task is not None, "a worker without a task has left the team"
    error = (
        f"the process that worked on this ended with code {worker.process.exitcode}: killed, perhaps for memory; "
        "try again with fewer workers"
    )
    # What it told the outcome of is in the store, though nothing else may have been begun since.
    where = tuple(served for served in worker.serving if served.experiment not in worker.settled)
    went_on = bool(worker.serving or worker.settled)
    if not went_on:
        where = (Serving(digest([task.study, task.model]), str(chains.Chain()), task.seeds[0]),)

    def failure(served: Serving) -> Failure:
        return Failure(
            experiment=served.experiment,
            study=task.study,
            model=task.model,
            chain=served.chain,
            seed=served.seed,
            stage="killed" if went_on else "setup",
            error=error,
            traceback="",
            created=now(),
        )

    lost = [Outcome(task.model, served.chain, served.experiment, failure=failure(served)) for served in where]
    if not went_on:
        return None, lost  # it died of the model itself, and so would another
    settled = task.settled | worker.settled | {served.experiment for served in where}
    dense = {key: record for key, record in worker.records.items() if record.chain == str(chains.Chain())}
    return replace(task, settled=settled, dense={**task.dense, **dense}), lost

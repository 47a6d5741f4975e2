"""Experiments in several processes of this machine, one task to each at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

from mariotte.experiments.branches import WAIT_S, Branches
from mariotte.experiments.pipeline import Held, Outcome, Task
from mariotte.experiments.work import Said, Work, add, narrate
from mariotte.models.step import Counters

__all__ = ["processes"]


def _die_with_parent() -> None:
    """End this process as soon as its parent is gone, however it went: nobody would store what it finds."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _work(line: Connection) -> None:
    """Do the tasks that come down the line, until one is None."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    held = Held()
    try:
        while (task := cast("Task | None", line.recv())) is not None:
            narrate(task, line.send, held)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return  # the parent got it too, and says so, or is gone


class _Worker:
    """A process, the line to it, and what it is doing."""

    def __init__(self, process: BaseProcess, line: Connection) -> None:
        self.process, self.line = process, line
        self.work = Work()

    def begin(self, task: Task) -> None:
        self.work = Work(task)
        self.tell(task)

    def tell(self, task: Task | None) -> None:
        """Hand over a task, or none any more; of a process that is dead already, the line says so when it is read."""
        with contextlib.suppress(OSError):
            self.line.send(task)

    def heard(self) -> Said | None:
        """What the process says next; None when it is dead, be it in the middle of a word."""
        try:
            return cast("Said", self.line.recv())
        except (EOFError, OSError):
            return None


def processes(
    branches: Branches, counters: Counters, progress: Callable[[str, float], None], workers: int
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
    team: list[_Worker] = []

    def hire() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the line ends when the worker does
        worker = _Worker(process, ours)
        team.append(worker)
        return worker

    def employ() -> None:
        """Give tasks to workers that wait, hire where there are too few, and let go those that are not needed."""
        for worker in [worker for worker in team if worker.work.task is None]:
            if task := branches.take():
                worker.begin(task)
            elif not branches:
                worker.tell(None)
                team.remove(worker)
        while len(team) < workers and (task := branches.take()):
            hire().begin(task)

    try:
        employ()
        while team or branches:
            if not any(worker.work.task for worker in team):
                progress("waiting for other processes", 0.0)
                time.sleep(WAIT_S)
            for line in wait([worker.line for worker in team], WAIT_S if branches else None):
                worker = next(worker for worker in team if worker.line is line)
                task = worker.work.task
                if (said := worker.heard()) is None:
                    team.remove(worker)
                    if task is None:
                        continue
                    add(counters, worker.work.counters)
                    rest, lost = _buried(worker)
                    yield from lost
                    if rest is not None:
                        branches.put_back(rest)
                    else:
                        branches.finished(task)
                    continue
                outcome = worker.work.hear(said, counters, progress)
                if outcome is not None:
                    yield outcome
                elif said[0] == "done" and task is not None:
                    branches.finished(task)
                    worker.work = Work()
            employ()
    finally:
        for worker in team:
            worker.process.terminate()
            worker.process.join()


def _buried(worker: _Worker) -> tuple[Task | None, list[Outcome]]:
    """What is left to do of a dead worker's task, and the failures of what it was doing."""
    worker.process.join()
    error = (
        f"the process that worked on this ended with code {worker.process.exitcode}: killed, perhaps for memory; "
        "try again with fewer workers"
    )
    return worker.work.left(error, worker.work.blamed())

"""Experiments in several processes of this machine, one model and seed to each at a time."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from multiprocessing.queues import Queue
from typing import Any

from mariotte.errors import MariotteError
from mariotte.experiments.pipeline import Outcome, Task, perform
from mariotte.models.step import Counters

__all__ = ["processes"]

_ASK_EVERY_S = 1.0
"""How often a silent worker is looked at: one that was killed says nothing."""


def _die_with_parent() -> None:
    """End this process as soon as its parent is gone, however it went: nobody would store what it finds."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _work(tasks: Queue[Task | None], found: Queue[tuple[str, Any]]) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        while (task := tasks.get()) is not None:
            counters = Counters()
            for outcome in perform(task, counters, lambda stage, done: found.put(("progress", (stage, done)))):
                found.put(("outcome", outcome))
            found.put(("done", counters))
    except KeyboardInterrupt:
        return  # the parent got it too, and says so
    except MariotteError as error:
        found.put(("error", error))
    except Exception:
        found.put(("bug", traceback.format_exc()))


def processes(
    tasks: Iterable[Task], counters: Counters, progress: Callable[[str, float], None], workers: int
) -> Iterator[Outcome]:
    """Perform tasks in `workers` processes and yield every outcome as soon as it is there.

    Workers never touch the store: the caller adds what comes back. They end with this process, however it ends.

    Raises
    ------
    MariotteError
        What a worker raised, or when one was killed.
    """
    # Started afresh rather than forked: a fork would copy torch's thread pools in whatever state they are.
    context = multiprocessing.get_context("spawn")
    todo: Queue[Task | None] = context.Queue()
    found: Queue[tuple[str, Any]] = context.Queue()
    team = [context.Process(target=_work, args=(todo, found), daemon=True) for _ in range(workers)]
    for worker in team:
        worker.start()
    try:
        left = 0
        for task in tasks:
            todo.put(task)
            left += 1
        for _ in team:
            todo.put(None)
        while left:
            try:
                kind, what = found.get(timeout=_ASK_EVERY_S)
            except queue.Empty:
                if killed := [worker for worker in team if worker.exitcode]:
                    raise MariotteError(
                        f"a worker ended with code {killed[0].exitcode} before its work was done: killed, perhaps "
                        "for memory; what was measured is stored, run again with fewer workers"
                    ) from None
                continue
            if kind == "outcome":
                yield what
            elif kind == "progress":
                progress(*what)
            elif kind == "error":
                raise what
            elif kind == "bug":
                raise RuntimeError(f"in a worker:\n{what}")
            else:
                left -= 1
                for part in fields(Counters):
                    setattr(counters, part.name, getattr(counters, part.name) + getattr(what, part.name))
    finally:
        for worker in team:
            worker.terminate()
            worker.join()

"""Experiments one after another in this process: the simplest runner, and the one a debugger can follow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from mariotte.experiments.branches import WAIT_S, Branches
from mariotte.experiments.pipeline import Held, Outcome, perform
from mariotte.models.step import Counters

__all__ = ["inline"]


def inline(branches: Branches, counters: Counters, progress: Callable[[str, float], None]) -> Iterator[Outcome]:
    """Perform tasks in order and yield every outcome as soon as it is there."""
    held = Held()
    while branches:
        if (task := branches.take()) is None:
            progress("waiting for other processes", 0.0)
            time.sleep(WAIT_S)
            continue
        yield from perform(task, counters, progress, held=held)
        branches.finished(task)

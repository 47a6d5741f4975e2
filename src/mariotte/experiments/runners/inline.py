"""Experiments one after another in this process: the simplest runner, and the one a debugger can follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mariotte.experiments.pipeline import Outcome, Task, perform
from mariotte.models.step import Counters

__all__ = ["inline"]


def inline(tasks: Iterable[Task], counters: Counters, progress: Callable[[str, float], None]) -> Iterator[Outcome]:
    """Perform tasks in order and yield every outcome as soon as it is there."""
    for task in tasks:
        yield from perform(task, counters, progress)

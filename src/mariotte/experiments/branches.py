"""The branches of a study's tree, handed out one by one to whoever runs them, here or elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mariotte import chain as chains
from mariotte.experiments import identity
from mariotte.experiments.pipeline import Outcome, Task
from mariotte.experiments.tree import grow
from mariotte.store.base import Claims
from mariotte.store.record import Record, digest

WAIT_S = 0.5
"""How often one that has nothing to do asks again: short beside an experiment, long beside the question."""

DENSE = str(chains.Chain())


def split(task: Task) -> list[Task]:
    """The branches of one model: the dense model alone, then, seed by seed, the chains that begin with the same step.

    Branches share no preparation, so that they can be worked on in different places; all but the first need the dense
    model's measurements.
    """
    root = grow(identity.resolve(chains.parse(text)) for text in task.chains)
    found: dict[str, list[str]] = {}
    for group in root.groups:
        # Amounts of the dense model's parameters are served by the same preparation as those in the step's own unit.
        first = str(replace(group.step, of=None).link())
        ends = [str(node.chain) for child in group.children.values() for node in child.walk() if node.wanted]
        found.setdefault(first, []).extend(ends)
    branches = [replace(task, chains=(), branch=digest([task.study, task.model]))]
    for seed in task.seeds:
        branches += [
            replace(task, chains=tuple(ends), seeds=(seed,), branch=digest([task.study, task.model, seed, first]))
            for first, ends in found.items()
        ]
    return branches


class Branches:
    """What a study has left to do, as tasks that are taken when there is room for them.

    Parameters
    ----------
    tasks : one a model, in the order in which they should begin
    apart : whether branches of one model may be taken by different workers; without it a task is a whole model
    claims : locks by which several processes share the study; None when this one has it to itself
    renew : the task as the store is now; called when it is taken, and under its claim
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        apart: bool = False,
        claims: Claims | None = None,
        renew: Callable[[Task], Task] = lambda task: task,
    ) -> None:
        self._claims, self._renew = claims, renew
        self._todo: list[Task] = []
        self._after_dense: dict[str, list[Task]] = {}
        self._dense: dict[str, dict[str, Record]] = {}
        self._measured: dict[str, str] = {}
        for task in tasks:
            # One checkpoint is the best of all chains: whoever chooses it must see them all. And of those that stay
            # only one process at a time may remove what was left half-written.
            whole = not apart or (task.shelf is not None and (task.shelf.keep == "best" or claims is not None))
            first, *others = [replace(task, branch=digest([task.study, task.model]))] if whole else split(task)
            self._todo.append(first)
            if others:
                self._after_dense[task.model] = others
        self._again: list[Task] = []
        self._ask_again = 0.0

    def __len__(self) -> int:
        """How many there are to take, of which some may have to wait."""
        return len(self._again) + len(self._todo) + sum(map(len, self._after_dense.values()))

    def take(self) -> Task | None:
        """A task that can begin now; None while all that is left waits for a dense model or for another process."""
        if self._again:
            return self._again.pop(0)
        if time.monotonic() < self._ask_again:
            return None
        for task in self._todo:
            if self._claims is None or self._claims.take(task.branch):
                self._todo.remove(task)
                new = self._renew(task)
                if task.model not in self._measured or task.chains == ():
                    return new
                dense = {**new.dense, **self._dense[task.model]}
                return replace(new, dense=dense, settled=new.settled | {self._measured[task.model]})
        # Every question goes to the database; runners ask whenever a worker has said something.
        self._ask_again = time.monotonic() + WAIT_S
        return None

    def put_back(self, task: Task) -> None:
        """Hand out first what is left of a task that nobody works on any more; it stays claimed."""
        self._again.append(task)

    def heard(self, outcome: Outcome) -> None:
        """Learn what became of an experiment; a model whose dense measurements failed has nothing more to do."""
        if outcome.chain != DENSE or outcome.model not in self._after_dense:
            return
        if outcome.failure is not None:
            del self._after_dense[outcome.model]
            return
        self._measured[outcome.model] = outcome.experiment
        self._dense[outcome.model] = {record.id: record for record in outcome.records}

    def finished(self, task: Task) -> None:
        """Say that all outcomes of a task are stored, so that others may look at it."""
        if self._claims is not None:
            self._claims.give_back(task.branch)
        self._ask_again = 0.0
        if task.model in self._measured:
            self._todo += self._after_dense.pop(task.model, [])

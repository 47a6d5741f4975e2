"""A task done where the parent is not: what the worker tells of it, and what is left of it when the worker dies."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mariotte import chain as chains
from mariotte.errors import MariotteError
from mariotte.experiments.pipeline import Held, Outcome, Serving, Task, now, perform
from mariotte.models.step import Counters
from mariotte.store.record import Failure, Record, digest

_SAY_EVERY_S = 0.2
"""How often a worker tells its progress: a step of training can take a millisecond."""

Said = tuple[str, Any]
"""What a worker says: the kind of message, and what belongs to it."""


def narrate(task: Task, tell: Callable[[Said], None], held: Held) -> None:
    """Do a task and tell everything about it, in a worker.

    Told are ``serving`` (what the next piece of work is for), ``progress`` (stage, share), ``outcome`` (it and the
    counters so far), and at the end one of ``done`` (the counters), ``error`` (a `MariotteError`) and ``bug`` (the
    traceback of anything else).

    Parameters
    ----------
    task : what to do
    tell : takes what is told, and passes it on to the parent
    held : the model that this worker loaded last
    """
    said = 0.0

    def progress(stage: str, done: float) -> None:
        nonlocal said
        if (moment := time.monotonic()) - said >= _SAY_EVERY_S:
            said = moment
            tell(("progress", (stage, done)))

    try:
        counters = Counters()
        for outcome in perform(task, counters, progress, lambda served: tell(("serving", served)), held):
            tell(("outcome", (outcome, replace(counters))))
        tell(("done", replace(counters)))
    except MariotteError as error:
        tell(("error", error))
    except Exception:
        tell(("bug", traceback.format_exc()))


@dataclass
class Work:
    """What the parent knows of a worker's task.

    Parameters
    ----------
    task : what it works on, None when it waits
    serving : the experiments that its present work is for
    settled : ids of the experiments of this task that it told the outcome of
    records : that came of them, by id
    counters : of this task, as of its last outcome
    """

    task: Task | None = None
    serving: tuple[Serving, ...] = ()
    settled: set[str] = field(default_factory=lambda: set[str]())
    records: dict[str, Record] = field(default_factory=lambda: dict[str, Record]())
    counters: Counters = field(default_factory=Counters)

    def hear(self, said: Said, total: Counters, progress: Callable[[str, float], None]) -> Outcome | None:
        """Take in what the worker says; an outcome is handed on.

        Parameters
        ----------
        total : counters that this task's are added to when it is done
        progress : told what the worker tells

        Raises
        ------
        MariotteError
            What the worker raised.
        """
        kind, what = said
        if kind == "outcome":
            outcome, self.counters = what
            self.settled.add(outcome.experiment)
            self.records |= {record.id: record for record in outcome.records}
            return outcome
        if kind == "progress":
            progress(*what)
        elif kind == "serving":
            self.serving = what
        elif kind == "error":
            raise what
        elif kind == "bug":
            raise RuntimeError(f"in a worker:\n{what}")
        else:
            assert kind == "done", f"a worker says outcome, progress, serving, error, bug or done, not {kind}"
            add(total, what)
        return None

    def blamed(self) -> tuple[Serving, ...]:
        """What was being worked on when the worker died; before its first experiment, the model itself."""
        # What it told the outcome of is in the store, though nothing else may have been begun since.
        if self.serving or self.settled:
            return tuple(served for served in self.serving if served.experiment not in self.settled)
        assert self.task is not None, "a worker without a task does nothing"
        return (Serving(digest([self.task.study, self.task.model]), str(chains.Chain()), self.task.seeds[0]),)

    def left(self, error: str, given_up: tuple[Serving, ...]) -> tuple[Task | None, list[Outcome]]:
        """What is left to do of a dead worker's task, and the failures of what is given up.

        Parameters
        ----------
        error : what the failures say
        given_up : of `blamed`, that which nobody tries again; without the model itself nothing is left
        """
        task = self.task
        assert task is not None, "a worker without a task has nothing to leave"
        went_on = bool(self.serving or self.settled)

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

        lost = [Outcome(task.model, served.chain, served.experiment, failure=failure(served)) for served in given_up]
        if not went_on:
            return (None if given_up else task), lost
        settled = task.settled | self.settled | {served.experiment for served in given_up}
        dense = {key: record for key, record in self.records.items() if record.chain == str(chains.Chain())}
        return replace(task, settled=settled, dense={**task.dense, **dense}), lost


def add(counters: Counters, more: Counters) -> None:
    """Add to counters what others counted."""
    for part in fields(Counters):
        setattr(counters, part.name, getattr(counters, part.name) + getattr(more, part.name))

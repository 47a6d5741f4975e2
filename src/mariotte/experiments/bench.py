"""A dense model and all that steps make of it: states are reached once each, a step is prepared once a state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mariotte.data import corpora, tokens
from mariotte.data.tokens import Blocks
from mariotte.errors import ModelError
from mariotte.experiments import identity
from mariotte.experiments.identity import Part
from mariotte.experiments.study import Calibration
from mariotte.experiments.tree import Group, Node
from mariotte.models.model import Model
from mariotte.models.step import Context, Counters, Step, apply_at, prepare_once, silent
from mariotte.store.record import digest


@dataclass(frozen=True)
class Built:
    """A state that was reached: the model there, and what it cost to come from the state before."""

    node: Node
    model: Model
    cost: Mapping[str, float]


@dataclass(frozen=True)
class Broken:
    """A state that was not reached, and why."""

    node: Node
    stage: str
    error: Exception


@dataclass
class Bench:
    """A dense model with everything that its steps may use.

    Parameters
    ----------
    model : the dense model
    seed : of every random choice
    calibration : blocks that steps may look at, None without
    work : folder of preparations and trunks; what is finished there is not done again
    counters : of the run
    progress : told the stage and the share of it that is done
    at : told, before any work, which states it is for
    """

    model: Model
    seed: int
    calibration: Blocks | None
    work: Path
    counters: Counters = field(default_factory=Counters)
    progress: Callable[[str, float], None] = silent
    at: Callable[[Sequence[Node]], None] = lambda nodes: None

    def experiment_id(self, parts: Sequence[Part]) -> str:
        """Fingerprint of what these steps make of this model.

        Raises
        ------
        DataError
            When text that a step reads is missing.
        """
        reads = [self._reads(part.step) for part in parts]
        return identity.experiment_id(self.model, parts, self.seed, self.calibration and self.calibration.sha256, reads)

    def context(self, parts: Sequence[Part], group: Group) -> Context:
        """What a step may use on the state that `parts` lead to; its folder depends on all but the amounts."""
        # The calibration once more: the dense model's id leaves it out, and what is learned from it there must not.
        text = None if self.calibration is None else [self.calibration.corpus, self.calibration.sha256]
        # Amounts of the dense model's parameters are served by the same preparation as those in the step's own unit.
        step = identity.step_identity(replace(group.step, of=None), self._reads(group.step))
        return self._context(self.work / digest([self.experiment_id(parts), self.seed, text, step])[:32])

    def _reads(self, step: Step) -> Mapping[str, str]:
        return step.reads(self.model, self._context(self.work))

    def _context(self, scratch: Path) -> Context:
        blocks = self.calibration
        return Context(
            dense=self.model,
            scratch=scratch,
            seed=self.seed,
            calibration=None if blocks is None else blocks.tokens,
            corpus=None if blocks is None else blocks.corpus,
            counters=self.counters,
            progress=self.progress,
            **({} if blocks is None else {"block": blocks.tokens.shape[1]}),
        )

    def walk(self, node: Node, model: Model, needed: Callable[[Node], bool]) -> Iterator[Built | Broken]:
        """Reach every needed state below `node`, depth first, holding one model a level.

        A step that fails breaks the states that need it and no other.
        """
        for group in node.groups:
            amounts = [amount for amount, child in group.children.items() if any(map(needed, child.walk()))]
            if not amounts:
                continue
            context = self.context(node.parts, group)
            self.at([below for amount in amounts for below in group.children[amount].walk() if needed(below)])
            started = time.perf_counter()
            try:
                if reason := group.step.refuse(model):
                    raise ModelError(f"{group.step.name()} cannot work on {model.name}: {reason}")
                prepared = prepare_once(group.step, model, context, amounts)
            except Exception as error:  # stored as a failure of each experiment that needed it
                for amount in amounts:
                    for child in filter(needed, group.children[amount].walk()):
                        yield Broken(child, f"prepare {group.step.link()}", error)
                continue
            prepare_s = time.perf_counter() - started
            for amount in amounts:
                child = group.children[amount]
                started = time.perf_counter()
                self.at([below for below in child.walk() if needed(below)])
                try:
                    compressed = apply_at(group.step, model, prepared, amount, context)
                except Exception as error:
                    for below in filter(needed, child.walk()):
                        yield Broken(below, f"apply {group.step.link(amount)}", error)
                    continue
                self.counters.applications += 1
                cost = {"prepare_s": round(prepare_s, 4), "apply_s": round(time.perf_counter() - started, 4)}
                if needed(child):
                    self.at([child])
                    yield Built(child, compressed, cost)
                yield from self.walk(child, compressed, needed)


def read_calibration(spec: Calibration | None, model: Model) -> Blocks | None:
    """The calibration blocks that a study asks for, as this model's tokens.

    Raises
    ------
    DataError
        When the corpus is missing, empty or too short.
    """
    if spec is None:
        return None
    corpus = corpora.find(spec.corpus)
    block = spec.block or tokens.usual_block(corpus, model)
    tokens.check_block(block, model, "calibration")
    found = tokens.read(corpus, "calibration", model.tokenizer, block, spec.rows)
    if model.kind != "masked" or model.tokenizer is None:
        return found
    # Its hash stays that of the text: what an encoder sees of it follows from it.
    return replace(found, tokens=tokens.hidden(found, model.tokenizer))

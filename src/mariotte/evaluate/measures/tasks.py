"""Accuracy on multiple-choice tasks: those of the testbed, and any task of lm-eval."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from mariotte.data.tokens import tokenizer_hash
from mariotte.errors import ChainError, DataError, ModelError, unknown
from mariotte.evaluate.base import Measure, Measurement
from mariotte.evaluate.choices import Question, encode, log_likelihoods
from mariotte.models.model import Model
from mariotte.store.record import digest
from mariotte.testbed import tasks as testbed

__all__ = ["Tasks"]

TESTBED = "testbed"
RULE = "largest summed log-likelihood of a choice given its context; the first of equals"


@functools.lru_cache(maxsize=32)
def _questions(
    name: str, items: int | None, tokenizer: PreTrainedTokenizerBase, hashed: str
) -> tuple[tuple[Question, ...], str]:
    """The first items of a task of the testbed as tokens, and their hash: read once for all models of one tokenizer."""
    chosen = testbed.task(name).items[:items]
    questions = encode(chosen, tokenizer)
    strange = tokenizer.unk_token_id
    for item, question in zip(chosen, questions, strict=True):
        words = [len(choice.split()) for choice in item.choices]
        if [*map(len, question.choices)] != words or any(strange in choice for choice in question.choices):
            raise DataError(
                f"the choices {', '.join(item.choices)} are no single tokens, word by word: these tasks are in the "
                "testbed's own language, so ask a testbed model"
            )
    return tuple(questions), digest([[q.context, q.choices, q.gold] for q in questions])


@dataclass(frozen=True, kw_only=True)
class Tasks(Measure):
    """Multiple-choice tasks: a model answers with the choice that it finds likeliest after the context.

    Parameters
    ----------
    on : ``testbed`` for all six of its tasks, ``testbed/NAME+NAME`` for some of them
    items : how many of each task, the first ones; None asks all (512 in the testbed)

    Notes
    -----
    ``accuracy`` is the unweighted mean over the tasks; beside it every task has a metric of its own name, and each
    its standard error under ``..._se``. The details hold, for every task, the number of items, chance, and which items
    were answered rightly as a text of 0 and 1, so that two models can be compared item by item.
    """

    items: int | None = None

    metrics: ClassVar = {"accuracy": "score"}

    def __post_init__(self) -> None:
        if self.items is not None and self.items < 1:
            raise ChainError(f"tasks: items must be at least 1, got {self.items}")
        self.names()

    def names(self) -> tuple[str, ...]:
        """The tasks, in the order of their source."""
        source, _, listed = self.on.partition("/")
        if source != TESTBED:
            raise unknown("set of tasks", source, [TESTBED])
        if not listed:
            return tuple(testbed.TASKS)
        asked = listed.split("+")
        for name in asked:
            if name not in testbed.TASKS:
                raise unknown("testbed task", name, testbed.TASKS)
        if len({*asked}) < len(asked):
            raise ChainError(f"tasks: {self.on!r} names a task twice; name each once")
        return tuple(name for name in testbed.TASKS if name in asked)

    def _read(self, model: Model) -> dict[str, tuple[tuple[Question, ...], str]]:
        if model.tokenizer is None:
            raise DataError(f"{model.name} has no tokenizer: put tokenizer.json into its folder to ask it questions")
        hashed = tokenizer_hash(model.tokenizer)
        return {name: _questions(name, self.items, model.tokenizer, hashed) for name in self.names()}

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        found = self._read(model)
        assert model.tokenizer is not None
        return {
            "tasks": {
                name: {"chance": testbed.TASKS[name], "n": len(questions), "items_sha256": hashed}
                for name, (questions, hashed) in found.items()
            },
            "tokenizer_sha256": tokenizer_hash(model.tokenizer),
            "rule": RULE,
            "shots": 0,
            "dtype": str(model.hf.dtype).removeprefix("torch."),
        }

    @override
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        found = self._read(model)
        # All tasks at once: rows of one length share a forward pass, whatever they ask.
        every = [question for questions, _ in found.values() for question in questions]
        sums = log_likelihoods(model, every)
        if not all(math.isfinite(value) for row in sums for value in row):
            raise ModelError(f"{model.name} computes non-finite logits: no choice is the likeliest")
        right = iter([row.index(max(row)) == question.gold for row, question in zip(sums, every, strict=True)])
        correct = {name: [next(right) for _ in questions] for name, (questions, _) in found.items()}
        return Measurement(
            metrics=_metrics(correct),
            protocol=self.protocol(model),
            details={
                name: {
                    "n": len(some),
                    "chance": testbed.TASKS[name],
                    "standard_error": _standard_error(some),
                    "correct": "".join("01"[one] for one in some),
                }
                for name, some in correct.items()
            },
        )


def _standard_error(correct: Sequence[bool]) -> float:
    """Of the share of right answers over items, drawn independently."""
    n, share = len(correct), sum(correct) / len(correct)
    return math.sqrt(share * (1 - share) / max(1, n - 1))


def _metrics(correct: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    """Mean over tasks, then each task, with standard errors."""
    shares = {name: sum(some) / len(some) for name, some in correct.items()}
    errors = {name: _standard_error(some) for name, some in correct.items()}
    total = math.sqrt(sum(error**2 for error in errors.values())) / len(errors)
    return {
        "accuracy": sum(shares.values()) / len(shares),
        "accuracy_se": total,
        **shares,
        **{f"{name}_se": error for name, error in errors.items()},
    }

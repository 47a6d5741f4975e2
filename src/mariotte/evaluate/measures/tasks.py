"""Accuracy on multiple-choice tasks: those of the testbed, and any task of lm-eval."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from mariotte.architectures import Kind
from mariotte.data.tokens import tokenizer_hash
from mariotte.errors import ChainError, DataError, ModelError, unknown
from mariotte.evaluate import harness
from mariotte.evaluate.base import Measure, Measurement, MetricKind, Work, batch_by_batch
from mariotte.evaluate.choices import Question, decoder_start, encode, log_likelihoods
from mariotte.evaluate.harness import Answers
from mariotte.models.model import Model
from mariotte.store.record import digest
from mariotte.testbed import tasks as testbed

__all__ = ["Tasks"]

RULES: Mapping[Kind, str] = {
    "causal": "largest summed log-likelihood of a choice given its context; the first of equals",
    "masked": "largest summed pseudo-log-likelihood of a choice, its tokens masked one by one; the first of equals",
    "seq2seq": "largest summed log-likelihood of a choice written after its context is read; the first of equals",
}


@functools.lru_cache(maxsize=32)
def _questions(
    name: str, items: int | None, tokenizer: PreTrainedTokenizerBase, hashed: str, kind: Kind, start: int | None
) -> tuple[tuple[Question, ...], str]:
    """The first items of a task of the testbed as tokens, and their hash: read once for all models of one tokenizer."""
    chosen = testbed.task(name).items[:items]
    questions = encode(chosen, tokenizer, kind, start)
    strange = tokenizer.unk_token_id
    for item, question in zip(chosen, questions, strict=True):
        words = [len(choice.split()) for choice in item.choices]
        if [*map(len, question.choices)] != words or any(strange in choice for choice in question.choices):
            raise DataError(
                f"the choices {', '.join(item.choices)} are no single tokens, word by word: these tasks are in the "
                "testbed's own language, so ask a testbed model"
            )
    asked = [[q.context, q.choices, q.gold] for q in questions]
    read = [[q.after, q.source] for q in questions]
    return tuple(questions), digest(asked if kind == "causal" else [asked, read])


@dataclass(frozen=True, kw_only=True)
class Tasks(Measure):
    """Multiple-choice tasks: a model answers with the choice that it finds likeliest after the context.

    Parameters
    ----------
    on : ``testbed`` for all six of its tasks, ``testbed/NAME+NAME`` for some of them; or tasks of lm-eval such as
        ``piqa+arc_easy+mmlu``, whose items are read from ``MARIOTTE_DATA/tasks`` where it holds them, else from the hub
    items : how many of each task, the first ones; None asks all (512 in the testbed). Of a group of lm-eval such as
        mmlu, so many of each of its tasks
    include : folder with descriptions of further lm-eval tasks, which go before lm-eval's own
    pseudo : score encoders, which have no likelihood, by pseudo-likelihood; others are scored by likelihood anyway

    Notes
    -----
    ``accuracy`` is the unweighted mean over the tasks; beside it every task has a metric of its own name, and each
    its standard error under ``..._se``. A group counts as one task, over all its items. The details hold, for every
    task, the number of items, chance, and which items were answered rightly as a text of 0 and 1, so that two models
    can be compared item by item. For lm-eval's they also hold ``chosen``, the choice of each item as a digit, and where
    the task has an ``acc_norm``: ``normalized``, which is that, ``correct_normalized`` and ``chosen_normalized``. No
    example is shown before a question (zero-shot). Of mmlu those subjects are asked whose files are there, and their
    number is part of the protocol. ``lambada_openai`` has no choices: right is the word that is likeliest token by
    token, and chance is 0.

    An encoder-decoder reads the question and writes the answer; of the testbed's tasks it reads its sentinel, where its
    tokenizer has one, in the place of what is missing. An encoder is refused unless its pseudo-likelihood is asked for,
    which is no likelihood: its numbers are compared with those of encoders alone.

    In the testbed a model without any knowledge of what is asked scores exactly chance; all choices of an item are
    equally long there, so that no normalisation is needed.
    """

    items: int | None = None
    include: str | None = None
    pseudo: bool = False

    metrics: ClassVar = {"accuracy": "score"}

    def __post_init__(self) -> None:
        # Lists are written with commas elsewhere; one way of writing, or the same measure would have two records.
        object.__setattr__(self, "on", self.on.replace(",", "+"))
        if self.items is not None and self.items < 1:
            raise ChainError(f"tasks: items must be at least 1, got {self.items}")
        if self.include is not None and self.in_testbed:
            raise ChainError(f"tasks: include adds tasks to lm-eval's, and {self.on!r} is the testbed's: leave it out")
        names = self.names()
        if len({*names}) < len(names):
            raise ChainError(f"tasks: {self.on!r} names a task twice; name each once")
        for name in names:
            if self.in_testbed and name not in testbed.TASKS:
                raise unknown("testbed task", name, testbed.TASKS)
            if not name or name in ("accuracy", "testbed"):
                raise ChainError(
                    f"tasks: expected testbed, testbed/NAME+NAME or tasks of lm-eval joined by '+', got {self.on!r}"
                )

    @property
    def in_testbed(self) -> bool:
        """Whether the tasks are the testbed's own."""
        return self.on == "testbed" or self.on.startswith("testbed/")

    def names(self) -> tuple[str, ...]:
        """The tasks, as written."""
        return tuple(testbed.TASKS) if self.on == "testbed" else tuple(self.on.removeprefix("testbed/").split("+"))

    @property
    @override
    def finds(self) -> Mapping[str, MetricKind]:
        return {**self.metrics, **dict.fromkeys(self.names(), "score")}

    @property
    @override
    def tokens(self) -> int:
        found = self.work("causal")
        return 0 if found is None else found.tokens

    @override
    def work(self, kind: Kind) -> Work | None:
        if not self.in_testbed:
            return None  # known when lm-eval has loaded them
        items = [item for name in self.names() for item in testbed.task(name).items[: self.items]]
        # One row for choices of one token, else about one for every choice but its last token.
        rows = [len(item.choices) if " " in item.choices[0] else 1 for item in items]
        tokens = sum(len(item.context.split()) * n for item, n in zip(items, rows, strict=True))
        return Work(items=len(items), passes=sum(rows), tokens=tokens)

    @override
    def check(self) -> None:
        if not self.in_testbed:
            harness.check(self.names(), self.include)

    def _questions(self, model: Model) -> dict[str, tuple[tuple[Question, ...], str]]:
        assert model.tokenizer is not None
        hashed = tokenizer_hash(model.tokenizer)
        start = decoder_start(model) if model.kind == "seq2seq" else None
        return {name: _questions(name, self.items, model.tokenizer, hashed, model.kind, start) for name in self.names()}

    @override
    def whole(self, kind: Kind) -> str | None:
        if self.in_testbed or kind != "causal":
            return batch_by_batch(kind)
        return (
            "leaves it to lm-eval how rows go through the model, a few at a time through all blocks, each time reading "
            "the whole model anew: measure it where it fits into memory"
        )

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        if model.tokenizer is None:
            raise DataError(f"{model.name} has no tokenizer: put tokenizer.json into its folder to ask it questions")
        if model.kind == "masked" and not self.pseudo:
            raise ModelError(
                f"tasks are scored by likelihood, which the encoder {model.name} does not have: ask for its "
                f"pseudo-likelihood, tasks:{self.on}(pseudo=true), or measure its knowledge"
            )
        found: dict[str, Any] = {
            "tokenizer_sha256": tokenizer_hash(model.tokenizer),
            "rule": RULES[model.kind],
            "shots": 0,
            "dtype": str(model.hf.dtype).removeprefix("torch."),
        }
        if not self.in_testbed:
            found["harness"] = f"lm-eval {harness.version()}"
            found["tasks"] = {name: harness.describe(name, self.items, self.include) for name in self.names()}
            return found
        found["tasks"] = {
            name: {"chance": testbed.TASKS[name], "n": len(questions), "items_sha256": hashed}
            for name, (questions, hashed) in self._questions(model).items()
        }
        return found

    @override
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        protocol = self.protocol(model)
        details: dict[str, dict[str, Any]] = {}
        if self.in_testbed:
            correct = _answered({name: asked for name, (asked, _) in self._questions(model).items()}, model)
        else:
            answers = harness.ask(model, self.names(), self.items, self.include)
            correct = {name: one.correct for name, one in answers.items()}
            details = {name: _kept(one) for name, one in answers.items()}
        return Measurement(
            metrics=_metrics(correct),
            protocol=protocol,
            details={
                name: {
                    "n": len(some),
                    "chance": protocol["tasks"][name]["chance"],
                    "standard_error": _standard_error(some),
                    "correct": "".join("01"[one] for one in some),
                    **details.get(name, {}),
                }
                for name, some in correct.items()
            },
        )


def _answered(tasks: Mapping[str, Sequence[Question]], model: Model) -> dict[str, tuple[bool, ...]]:
    """Which questions of each task are answered rightly."""
    # All tasks at once: rows of one length share a forward pass, whatever they ask.
    every = [question for questions in tasks.values() for question in questions]
    sums = log_likelihoods(model, every)
    if not all(math.isfinite(value) for row in sums for value in row):
        raise ModelError(f"accuracy cannot be measured: {model.name} computes non-finite logits")
    right = iter([row.index(max(row)) == question.gold for row, question in zip(sums, every, strict=True)])
    return {name: tuple(next(right) for _ in questions) for name, questions in tasks.items()}


def _kept(answers: Answers) -> dict[str, Any]:
    """What is kept of lm-eval's answers beside which are right, a character an item."""
    kept: dict[str, Any] = {}
    if answers.chosen is not None:
        kept["chosen"] = _digits(answers.chosen)
    if answers.normalized is not None:
        kept["normalized"] = _share(answers.normalized)
        kept["correct_normalized"] = _digits([*map(int, answers.normalized)])
    if answers.chosen_normalized is not None:
        kept["chosen_normalized"] = _digits(answers.chosen_normalized)
    return kept


def _digits(numbers: Sequence[int]) -> str:
    """One character each: 0 to 9, then letters; ``?`` for those beyond z, of which no task is known."""
    return "".join("0123456789abcdefghijklmnopqrstuvwxyz"[n] if n < 36 else "?" for n in numbers)


def _share(correct: Sequence[bool]) -> float:
    return sum(correct) / len(correct)


def _standard_error(correct: Sequence[bool]) -> float:
    """Of the share of right answers over items, drawn independently."""
    n, share = len(correct), _share(correct)
    return math.sqrt(share * (1 - share) / max(1, n - 1))


def _metrics(correct: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    """Mean over tasks, then each task, with standard errors."""
    shares = {name: _share(some) for name, some in correct.items()}
    errors = {name: _standard_error(some) for name, some in correct.items()}
    return {
        "accuracy": sum(shares.values()) / len(shares),
        "accuracy_se": math.sqrt(sum(error**2 for error in errors.values())) / len(errors),
        **shares,
        **{f"{name}_se": error for name, error in errors.items()},
    }

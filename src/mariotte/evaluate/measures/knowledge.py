"""Parametric knowledge: which facts a model still tells, and which it lost."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.data.tokens import separator_of, tokenizer_hash
from mariotte.errors import ChainError, DataError
from mariotte.evaluate.base import Measure, Measurement
from mariotte.models.model import Model
from mariotte.store.record import digest
from mariotte.testbed.world import Fact, World

__all__ = ["Knowledge"]

SETS = ("testbed",)


@functools.lru_cache(maxsize=1)
def _all_facts() -> tuple[Fact, ...]:
    return tuple(sorted(World().facts(), key=lambda fact: (-fact.popularity, fact.id)))


def _chosen(count: int | None) -> tuple[Fact, ...]:
    """Evenly spaced by popularity, so that a subset keeps the mixture of well-known and rare facts."""
    facts = _all_facts()
    if count is None or count >= len(facts):
        return facts
    return tuple(facts[i * len(facts) // count] for i in range(count))


@torch.no_grad()
def answer_ranks(model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[int], *, batch: int = 256) -> Tensor:
    """Rank of the right answer among the whole vocabulary, 1 being first.

    Parameters
    ----------
    prompts : token ids of each prompt, the answer being the next token
    answers : token id of each answer
    batch : prompts asked at once

    Returns
    -------
    (n,) int64; a tie counts against the model, so that equal logits never look like knowledge
    """
    ranks = torch.zeros(len(prompts), dtype=torch.int64)
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)  # equal lengths together: no padding, no mask
    for indices in by_length.values():
        for start in range(0, len(indices), batch):
            chosen = indices[start : start + batch]
            tokens_BT = torch.tensor([prompts[i] for i in chosen], device=model.device)
            logits_BV = model.hf(input_ids=tokens_BT, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            right_B1 = logits_BV.gather(1, torch.tensor([[answers[i]] for i in chosen], device=model.device))
            ranks[chosen] = (logits_BV >= right_B1).sum(1).cpu()
    return ranks


def _scores(ranks: Tensor, prefix: str = "") -> dict[str, float]:
    found = ranks.double()
    return {
        f"{prefix}top1": float((found <= 1).double().mean()),
        f"{prefix}top5": float((found <= 5).double().mean()),
        f"{prefix}mrr": float((1 / found).mean()),
    }


@dataclass(frozen=True, kw_only=True)
class Knowledge(Measure):
    """Facts asked as cloze questions, the answer ranked against the whole vocabulary.

    Parameters
    ----------
    on : the set of facts: testbed
    facts : how many to ask, evenly spaced by popularity; None asks all

    Notes
    -----
    Every fact is asked twice: through a pattern in which it was seen in training, and through one that training held
    out for this fact (though it was seen with other subjects); the latter's metrics begin with ``heldout_``. The
    details give the same by relation and by quarter of popularity, the facts known by the dense model, and for every
    other model those lost and gained against it.

    References
    ----------
    [petroni2019lama]_ for cloze questions and precision at k.
    """

    facts: int | None = None

    metrics: ClassVar = {
        "top1": "score",
        "top5": "score",
        "mrr": "score",
        "heldout_top1": "score",
        "heldout_top5": "score",
        "heldout_mrr": "score",
    }

    def __post_init__(self) -> None:
        if self.on not in SETS:
            raise ChainError(f"knowledge has no set of facts {self.on!r}; it has {', '.join(SETS)}")
        if self.facts is not None and self.facts < 1:
            raise ChainError(f"knowledge: facts must be at least 1, got {self.facts}")

    def _questions(self, model: Model) -> tuple[tuple[Fact, ...], list[list[int]], list[list[int]], list[int]]:
        """The facts, their seen and held-out prompts and their answers, as this model's tokens."""
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise DataError(f"{model.name} has no tokenizer: put tokenizer.json into its folder to ask it for facts")
        facts = _chosen(self.facts)
        separator = separator_of(tokenizer)
        first = [] if separator is None else [separator]

        def ids(texts: Iterable[str]) -> list[list[int]]:
            return [
                [*first, *found]
                for found in cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False)["input_ids"])
            ]

        answers = cast("list[list[int]]", tokenizer([f.answer for f in facts], add_special_tokens=False)["input_ids"])
        for fact, found in zip(facts, answers, strict=True):
            if len(found) != 1 or found[0] == tokenizer.unk_token_id:
                raise DataError(
                    f"knowledge:{self.on} asks for one-token answers, and {fact.answer!r} is no single token of "
                    f"{model.name}: these facts are told in the testbed's own language, so ask a testbed model"
                )
        return facts, ids(f.seen[0] for f in facts), ids(f.heldout for f in facts), [found[0] for found in answers]

    @property
    @override
    def tokens(self) -> int:
        return 2 * 8 * (self.facts or len(_all_facts()))  # asked in two patterns of about eight words

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        facts, seen, heldout, answers = self._questions(model)
        assert model.tokenizer is not None
        return {
            "facts": self.on,
            "n_facts": len(facts),
            "questions_sha256": digest([seen, heldout, answers]),
            "tokenizer_sha256": tokenizer_hash(model.tokenizer),
            "candidates": "whole vocabulary",
            "chance_top1": 1 / model.shape.vocab,
            "dtype": str(model.hf.dtype).removeprefix("torch."),
        }

    @override
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        facts, seen, heldout, answers = self._questions(model)
        seen_ranks, heldout_ranks = answer_ranks(model, seen, answers), answer_ranks(model, heldout, answers)

        def part(chosen: list[int]) -> dict[str, float]:
            return {"n": len(chosen), **_scores(seen_ranks[chosen]), **_scores(heldout_ranks[chosen], "heldout_")}

        relations: defaultdict[str, list[int]] = defaultdict(list)
        quarters: defaultdict[str, list[int]] = defaultdict(list)
        for index, fact in enumerate(facts):
            relations[fact.relation].append(index)
            quarters[str(fact.popularity_quarter)].append(index)
        known = {fact.id for fact, rank in zip(facts, seen_ranks, strict=True) if int(rank) == 1}
        details: dict[str, Any] = {
            "relations": {name: part(chosen) for name, chosen in sorted(relations.items())},
            "quarters": {name: part(chosen) for name, chosen in sorted(quarters.items())},
        }
        if dense is None:
            details["known"] = sorted(known)
        else:
            before = set(dense.details["known"])
            details |= {"lost": sorted(before - known), "gained": sorted(known - before)}
        return Measurement(
            metrics={**_scores(seen_ranks), **_scores(heldout_ranks, "heldout_")},
            protocol=self.protocol(model),
            details=details,
        )

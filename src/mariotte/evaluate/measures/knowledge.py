"""Parametric knowledge: which facts a model still tells, and which it lost."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.architectures import Kind
from mariotte.data import lama as data
from mariotte.data.lama import Probe
from mariotte.data.tokens import separator_of, tokenizer_hash
from mariotte.errors import ChainError, DataError, unknown
from mariotte.evaluate import lama
from mariotte.evaluate.base import Measure, Measurement, MetricKind, Work, batch_by_batch
from mariotte.evaluate.cloze import Asker, Prompt, plain, vocabulary_placings
from mariotte.evaluate.facts import Told, facts_told
from mariotte.models.blockwise import logits
from mariotte.models.model import Model
from mariotte.store.record import digest
from mariotte.testbed.world import Fact, World

__all__ = ["Knowledge"]

SETS = ("testbed", "lama", *(f"lama/{subset}" for subset in data.SUBSETS))


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
def answer_ranks(
    model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[int], *, batch: int = 256
) -> tuple[Tensor, Tensor]:
    """Rank of the right answer among the whole vocabulary, 1 being first, and its log-probability.

    Parameters
    ----------
    prompts : token ids of each prompt, the answer being the next token
    answers : token id of each answer
    batch : prompts asked at once

    Returns
    -------
    (n,) int64 ranks; a tie counts against the model, so that equal logits never look like knowledge
    (n,) float64, nats
    """
    ranks = torch.zeros(len(prompts), dtype=torch.int64)
    logs = torch.zeros(len(prompts), dtype=torch.float64)
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)  # equal lengths together: no padding, no mask
    groups = [indices[at : at + batch] for indices in by_length.values() for at in range(0, len(indices), batch)]
    rows = [torch.tensor([prompts[i] for i in chosen]) for chosen in groups]
    for chosen, logits_BTV in zip(groups, logits(model, rows, [1] * len(rows)), strict=True):
        logits_BV = logits_BTV[:, -1].float()
        right_B1 = logits_BV.gather(1, torch.tensor([[answers[i]] for i in chosen], device=model.device))
        ranks[chosen] = (logits_BV >= right_B1).sum(1).cpu()
        logs[chosen] = (right_B1[:, 0] - logits_BV.logsumexp(1)).double().cpu()
    return ranks, logs


def _filled(model: Model, prompts: Sequence[Prompt], answers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`answer_ranks` of a masked model or an encoder-decoder."""
    found = vocabulary_placings(model, prompts, answers)
    assert found.logs is not None
    return found.ranks, found.logs


def _scores(ranks: Tensor, prefix: str = "") -> dict[str, float]:
    found = ranks.double()
    return {
        f"{prefix}top1": float((found <= 1).double().mean()),
        f"{prefix}top5": float((found <= 5).double().mean()),
        f"{prefix}mrr": float((1 / found).mean()),
    }


@dataclass(frozen=True, kw_only=True)
class Knowledge(Measure):
    """Facts asked as cloze questions, the answer ranked against other answers.

    Parameters
    ----------
    on : the set of facts: ``testbed``; ``lama`` for all of LAMA that is in ``MARIOTTE_DATA/lama``; or some of its four
        parts: ``lama/trex``, ``lama/google_re``, ``lama/squad``, ``lama/conceptnet``, ``lama/trex+google_re``
    facts : how many to ask; None asks all. In the testbed evenly spaced by popularity, in LAMA of each relation,
        drawn at random
    seed : of that draw
    relations : of LAMA, only these, such as ``P19+P20``
    candidates : what LAMA's right answers are ranked among: ``relation``, the answers of the relation; ``vocabulary``,
        all tokens of the model; ``common``, those that LAMA's models have in common. None takes ``vocabulary`` for a
        masked model, as LAMA does, and ``relation`` for others, whose answers may be several tokens
    per_token : rank LAMA's answers by log-likelihood per token; otherwise it is summed, which favours short answers
    paraphrases : in LAMA, how many of ParaRel's patterns are asked beside the relation's template

    Notes
    -----
    In the testbed every fact is asked twice: through a pattern in which it was seen in training, and through one that
    training held out for this fact (though it was seen with other subjects); the latter's metrics begin with
    ``heldout_``. Answers are ranked against the whole vocabulary, and a tie counts against the model. An encoder and an
    encoder-decoder are asked with a gap before the sentence's stop. The details give the same by relation and by
    quarter of popularity.

    LAMA is asked by the kind of model: a masked one at its mask, an encoder-decoder after its sentinel, a causal one
    where the answer comes last, so that a relation whose template ends otherwise is asked through the first of
    ParaRel's patterns that does not, and left out where there is none. Metrics are means over relations within a
    subset, then over subsets, of the facts that the model can be asked; among equal scores the order is random (its
    expectation is taken), so that a model that knows nothing scores chance. ``free_top1`` is the share of facts with
    one-token answers whose answer is the likeliest of all tokens. With paraphrases, ``consistency`` is the share of
    pairs of wordings with equal predictions among the relation's answers, ``consistent_accuracy`` that of facts told
    rightly in all of them, ``paraphrase_accuracy`` the mean of the paraphrases. The details give every subset and
    relation, and count what is missing and what is unreachable, with the reasons.

    For both, the details list the facts known by the dense model, and for every other model those lost and gained
    against it; `mariotte.evaluate.facts` tells these to people and writes them to a file.

    References
    ----------
    [petroni2019lama]_ for cloze questions and precision at k; [elazar2021pararel]_ for paraphrases and consistency.
    """

    facts: int | None = None
    seed: int = 0
    relations: str | None = None
    candidates: str | None = None
    per_token: bool = False
    paraphrases: int = 0

    metrics: ClassVar = {"top1": "score", "top5": "score", "mrr": "score"}

    def __post_init__(self) -> None:
        # Lists are written with commas elsewhere; one way of writing, or the same measure would have two records.
        object.__setattr__(self, "on", self.on.replace(",", "+"))
        if self.on not in SETS and not (self.in_lama and {*self._subsets()} <= {*data.SUBSETS}):
            raise ChainError(f"knowledge has no set of facts {self.on!r}; it has {', '.join(SETS)}")
        if self.facts is not None and self.facts < 1:
            raise ChainError(f"knowledge: facts must be at least 1, got {self.facts}")
        if not self.in_lama:
            given = {"seed": 0, "relations": None, "candidates": None, "per_token": False, "paraphrases": 0}
            for name, default in given.items():
                if getattr(self, name) != default:
                    raise ChainError(f"knowledge: {name} is for LAMA, and {self.on!r} is the testbed's: leave it out")
            return
        if self.candidates not in (None, *get_args(lama.Candidates)):
            known = ", ".join(get_args(lama.Candidates))
            raise ChainError(f"knowledge: candidates must be one of {known}, got {self.candidates!r}")
        if self.paraphrases < 0:
            raise ChainError(f"knowledge: paraphrases must be at least 0, got {self.paraphrases}")
        if self.per_token and self.candidates in ("common", "vocabulary"):
            raise ChainError(
                f"knowledge: per_token is for answers of several tokens, and candidates={self.candidates} are single "
                "tokens: leave one of them out"
            )
        known = [name for subset in self._subsets() for name in data.names(subset)]
        for name in () if self.relations is None else self._relations() or ("",):
            if name not in known:
                raise unknown("relation", name, known, hint=f" of {self.on}")

    @property
    def in_lama(self) -> bool:
        """Whether the facts are LAMA's."""
        return self.on == "lama" or self.on.startswith("lama/")

    def _subsets(self) -> tuple[str, ...]:
        return data.SUBSETS if self.on == "lama" else tuple(self.on.removeprefix("lama/").split("+"))

    def _relations(self) -> tuple[str, ...] | None:
        return None if self.relations is None else tuple(self.relations.replace(",", "+").split("+"))

    def _asked(self, kind: str) -> lama.Asked:
        candidates = self.candidates or lama.usual_candidates(kind)
        return lama.Asked(
            subsets=self._subsets(),
            relations=self._relations(),
            facts=self.facts,
            seed=self.seed,
            candidates=cast(lama.Candidates, candidates),
            per_token=self.per_token,
            paraphrases=self.paraphrases,
            every=self.on == "lama",
        )

    @override
    def check(self) -> None:
        if self.in_lama:
            lama.check(self._asked("causal"))

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
                raise self._strange(fact.answer, model)
        return facts, ids(f.seen[0] for f in facts), ids(f.heldout for f in facts), [found[0] for found in answers]

    def _gaps(self, model: Model) -> tuple[tuple[Fact, ...], list[Prompt], list[Prompt], list[int]]:
        """The same for a model that fills gaps, as which it is asked whole sentences."""
        asker = Asker(model)
        facts = _chosen(self.facts)

        def probes(texts: Iterable[str]) -> list[Probe]:
            return [Probe(fact.id, f"{text} ", " .", fact.answer) for fact, text in zip(facts, texts, strict=True)]

        seen, heldout = probes(fact.seen[0] for fact in facts), probes(fact.heldout for fact in facts)
        names = sorted({fact.answer for fact in facts})
        tokens = dict(zip(names, asker.answers(seen[0], names), strict=True))
        for name, found in tokens.items():
            if found is None or len(found) != 1:
                raise self._strange(name, model)
        answers = [found[0] for fact in facts if (found := tokens[fact.answer]) is not None]
        return facts, asker.prompts(seen), asker.prompts(heldout), answers

    def _strange(self, answer: str, model: Model) -> DataError:
        return DataError(
            f"knowledge:{self.on} asks for one-token answers, and {answer!r} is no single token of "
            f"{model.name}: these facts are told in the testbed's own language, so ask a testbed model"
        )

    @property
    @override
    def finds(self) -> Mapping[str, MetricKind]:
        if self.in_lama:
            asked = ("consistency", "consistent_accuracy", "paraphrase_accuracy") if self.paraphrases else ()
            names = ("top1", "top5", "top10", "mrr", "free_top1", *asked)
        else:
            names = (*self.metrics, *(f"heldout_{name}" for name in self.metrics))
        return dict.fromkeys(names, "score")

    @property
    @override
    def tokens(self) -> int:
        found = self.work("causal")
        return 0 if found is None else found.tokens

    @override
    def work(self, kind: Kind) -> Work | None:
        if self.in_lama:
            return lama.work(self._asked(kind), kind)
        facts = min(self.facts or len(_all_facts()), len(_all_facts()))
        return Work(items=facts, passes=2 * facts, tokens=2 * 8 * facts)  # in two patterns of about eight words

    @override
    def whole(self, kind: Kind) -> str | None:
        if self.in_lama and kind == "causal":
            return (
                "follows LAMA's answers token by token from keys and values that it keeps, each time reading the whole "
                "model anew: measure it where it fits into memory"
            )
        return batch_by_batch(kind)

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        if self.in_lama:
            return self._lama_protocol(model)
        asked: list[Any]
        if model.kind == "causal":
            facts, *asked = self._questions(model)
        else:
            facts, seen, heldout, answers = self._gaps(model)
            asked = [*([[p.tokens, p.position, p.source] for p in prompts] for prompts in (seen, heldout)), answers]
        assert model.tokenizer is not None
        return {
            "facts": self.on,
            "n_facts": len(facts),
            "questions_sha256": digest(asked),
            "tokenizer_sha256": tokenizer_hash(model.tokenizer),
            "candidates": "whole vocabulary",
            "chance_top1": 1 / model.shape.vocab,
            "dtype": str(model.hf.dtype).removeprefix("torch."),
        }

    @override
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        return self.tell(model, dense)[0]

    def tell(self, model: Model, dense: Measurement | None = None) -> tuple[Measurement, tuple[Told, ...]]:
        """Measure a model, and say what it made of every fact; see `mariotte.evaluate.facts.Tells`."""
        if self.in_lama:
            return self._lama(model, dense)
        if model.kind == "causal":
            facts, seen, heldout, answers = self._questions(model)
            (seen_ranks, seen_logs), (heldout_ranks, heldout_logs) = (
                answer_ranks(model, prompts, answers) for prompts in (seen, heldout)
            )
        else:
            facts, seen_gaps, heldout_gaps, answers = self._gaps(model)
            (seen_ranks, seen_logs), (heldout_ranks, heldout_logs) = (
                _filled(model, prompts, answers) for prompts in (seen_gaps, heldout_gaps)
            )

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
        details |= facts_told(known, dense)
        found = Measurement(
            metrics={**_scores(seen_ranks), **_scores(heldout_ranks, "heldout_")},
            protocol=self.protocol(model),
            details=details,
        )
        return found, (
            *_told(facts, "main", seen_ranks, seen_logs),
            *_told(facts, "heldout", heldout_ranks, heldout_logs),
        )

    def _lama_protocol(self, model: Model) -> dict[str, Any]:
        asked = self._asked(model.kind)
        planned = lama.plan(model, asked)
        assert model.tokenizer is not None
        found: dict[str, Any] = {
            "facts": self.on,
            "kind": model.kind,
            "n_facts": planned.n_facts,
            "n_unreachable": planned.n_unreachable,
            "missing": list(planned.missing),
            "questions_sha256": planned.sha256,
            "tokenizer_sha256": tokenizer_hash(model.tokenizer),
            "candidates": asked.candidates,
            "chance_top1": lama.chance(planned, model.shape.vocab),
            "dtype": str(model.hf.dtype).removeprefix("torch."),
        }
        if asked.candidates == "relation":
            # Before chance_top1: the desk takes the first whose name a metric ends with.
            chance_free = {"chance_free_top1": 1 / model.shape.vocab}
            ranking = "log-likelihood per token" if self.per_token else "summed log-likelihood"
            found = {**chance_free, **found, "ranking": ranking}
        return found

    def _lama(self, model: Model, dense: Measurement | None) -> tuple[Measurement, tuple[Told, ...]]:
        planned = lama.plan(model, self._asked(model.kind))
        found = lama.result(model, planned, per_token=self.per_token)
        details: dict[str, Any] = {
            "subsets": dict(found.subsets),
            "relations": dict(found.relations),
            "unasked": dict(planned.unasked),
            "missing": list(planned.missing),
            **facts_told(set(found.known), dense),
        }
        measured = Measurement(metrics=found.metrics, protocol=self._lama_protocol(model), details=details)
        return measured, found.told


def _told(facts: Sequence[Fact], wording: Literal["main", "heldout"], ranks: Tensor, logs: Tensor) -> Iterator[Told]:
    """What was made of the testbed's facts."""
    for fact, (rank, probability) in zip(facts, plain(ranks, logs), strict=True):
        words = fact.seen[0] if wording == "main" else fact.heldout
        yield Told(
            fact=fact.id,
            relation=fact.relation,
            subject=fact.subject,
            template=f"{words.replace(fact.subject, data.SUBJECT)} {data.ANSWER}",
            wording=wording,
            answer=fact.answer,
            rank=rank,
            probability=probability,
        )

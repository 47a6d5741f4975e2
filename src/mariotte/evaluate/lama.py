"""LAMA asked of a model: which facts can be asked, and what the answers say by relation and subset."""

from __future__ import annotations

import functools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from mariotte.architectures import Kind
from mariotte.data import lama
from mariotte.data.lama import Probe, Relation
from mariotte.data.tokens import tokenizer_hash
from mariotte.errors import DataError
from mariotte.evaluate.base import Work
from mariotte.evaluate.cloze import (
    Asker,
    Placings,
    Prompt,
    Tokens,
    log_likelihoods,
    place,
    plain,
    vocabulary_placings,
)
from mariotte.evaluate.facts import Told
from mariotte.models.model import Model
from mariotte.store.record import digest

Candidates = Literal["relation", "common", "vocabulary"]

TOKENS_OF_A_WORD = 1.3
"""About, in English, with a vocabulary of some ten thousand tokens; for estimates."""

NOT_LAST = "the answer does not come last"
NO_TOKEN = "the answer has no tokens of its own, or more than one where one is needed"
NOT_COMMON = "the answer is not in the common vocabulary"
TOO_LONG = "longer than the model's positions"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How LAMA is asked: what its numbers depend on besides the model.

    Parameters
    ----------
    subsets : of `mariotte.data.lama.SUBSETS`
    relations : only these, None for all
    facts : of each relation, drawn with `seed`; None for all
    candidates : what the right answer is ranked among
    per_token : rank by log-likelihood per token of the answer, not summed
    paraphrases : of ParaRel's patterns, how many are asked beside LAMA's own
    every : whether all the subsets were asked for, so that those that are not here are counted, not refused
    """

    subsets: tuple[str, ...]
    relations: tuple[str, ...] | None
    facts: int | None
    seed: int
    candidates: Candidates
    per_token: bool
    paraphrases: int
    every: bool


@dataclass(frozen=True)
class Wording:
    """The facts of one relation in one template as a model's tokens.

    Parameters
    ----------
    template : None where facts bring their own sentences
    prompts : one a fact
    tokens : of each answer of the relation, in the order of `Questions.answers`
    """

    template: str | None
    prompts: tuple[Prompt, ...]
    tokens: tuple[Tokens, ...]


@dataclass(frozen=True)
class Questions:
    """One relation as it is asked of a model.

    Parameters
    ----------
    relation : where it comes from
    probes : the facts that can be asked, in the words of the main template
    answers : of the relation, each once, those that the model can give; right answers as indices into them in `right`
    among : token ids that a right answer is ranked among, None for the whole vocabulary and, with `ranked`, for those
        of `answers`
    ranked : whether the answers of the relation are the candidates
    wordings : LAMA's template first, then paraphrases
    unreachable : why facts cannot be asked, with their number
    """

    relation: Relation
    probes: tuple[Probe, ...]
    answers: tuple[str, ...]
    right: tuple[int, ...]
    among: tuple[int, ...] | None
    ranked: bool
    wordings: tuple[Wording, ...]
    unreachable: Mapping[str, int]

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the facts that can be asked."""
        return tuple(probe.id for probe in self.probes)

    @property
    def main(self) -> Wording:
        """LAMA's own template, or the first that a causal model can be asked."""
        return self.wordings[0]

    def chance(self, vocab: int) -> float:
        """Of the first place, for a guesser."""
        return 1 / (len(self.answers) if self.ranked else vocab if self.among is None else len(self.among))

    def single(self) -> list[int]:
        """The facts whose answers are one token."""
        return [i for i, right in enumerate(self.right) if len(self.main.tokens[right]) == 1]


@dataclass(frozen=True)
class Plan:
    """All that is asked of a model, and what cannot be.

    Parameters
    ----------
    questions : by relation
    missing : subsets and relations that are not in MARIOTTE_DATA
    unasked : relations of which no fact can be asked, with the reason that most of them have
    sha256 : of everything that is asked
    """

    questions: tuple[Questions, ...]
    missing: tuple[str, ...]
    unasked: Mapping[str, Mapping[str, int]]
    sha256: str

    @property
    def n_facts(self) -> int:
        """Facts asked."""
        return sum(len(one.ids) for one in self.questions)

    @property
    def n_unreachable(self) -> int:
        """Facts that this model cannot be asked."""
        return sum(sum(one.unreachable.values()) for one in self.questions) + sum(
            sum(reasons.values()) for reasons in self.unasked.values()
        )


def check(asked: Asked) -> None:
    """Refuse data that are missing before any model is loaded.

    Raises
    ------
    DataError
        When nothing that is asked is there, or a relation asked by name is not.
    """
    _here(asked)


def work(asked: Asked, kind: Kind) -> Work | None:
    """What asking all that is here takes; None where something is missing or broken."""
    try:
        here, _ = _here(asked)
        subsets = [
            lama.read(s, None if asked.relations is None else [n for n in asked.relations if n in lama.names(s)])
            for s in here
        ]
    except DataError:
        return None
    items = passes = words = 0
    for relation in (relation for subset in subsets for relation in subset.relations):
        template = relation.templates[0] if relation.templates else None
        prompts = [probe.before + probe.after for probe in relation.probes(_drawn(relation, asked), template)]
        wordings = 1 + min(asked.paraphrases, max(0, len(relation.templates) - 1))
        # Answers of several words are followed word by word, beginnings that they share once.
        longer = [answer.split() for answer in relation.answers] if asked.candidates == "relation" else []
        beginnings = {tuple(answer[:n]) for answer in longer for n in range(1, len(answer))} if kind != "masked" else ()
        items += len(prompts)
        passes += wordings * len(prompts) * (1 + len(beginnings))
        words += wordings * (sum(len(one.split()) + 1 for one in prompts) + len(prompts) * len(beginnings))
    return Work(items=items, passes=passes, tokens=round(words * TOKENS_OF_A_WORD))


def _here(asked: Asked) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The subsets that are here, and what is missing of those that are asked."""
    if not lama.home("lama").is_dir():
        raise DataError(f"LAMA must be in {lama.home('lama')}, and there is no such folder: put its files there")
    here: list[str] = []
    missing: list[str] = []
    for subset in asked.subsets:
        wanted = None if asked.relations is None else [n for n in asked.relations if n in lama.names(subset)]
        if wanted == []:
            continue
        found, without = lama.find(subset, wanted)
        missing += [name if name == subset else f"{subset}/{name}" for name in without]
        if found:
            here.append(subset)
        elif not asked.every:
            first = lama.names(subset)[0]
            raise DataError(
                f"LAMA's {subset} must be in files such as {lama.path(subset, first)}, and there are none: "
                "put them there or ask another subset"
            )
    if not here:
        raise DataError(
            f"{lama.home('lama')} must hold at least one subset of LAMA, and holds none: put its files there"
        )
    return tuple(here), tuple(missing)


def _drawn(relation: Relation, asked: Asked) -> list[tuple[str, str, str | None]]:
    """The facts of a relation that are asked: all, or some at random that depend on seed and relation alone."""
    if asked.facts is None or asked.facts >= len(relation.pairs):
        return [*relation.pairs]
    chosen = random.Random(f"{asked.seed} {relation.label}").sample(range(len(relation.pairs)), asked.facts)
    return [relation.pairs[i] for i in sorted(chosen)]


@dataclass
class _Planner:
    asked: Asked
    asker: Asker
    common: Mapping[int, None] | None

    def questions(self, relation: Relation) -> tuple[Questions | None, Mapping[str, int]]:
        """What can be asked of a relation, and why the rest cannot."""
        asked, asker = self.asked, self.asker
        pairs = _drawn(relation, asked)
        reasons: Counter[str] = Counter()
        # A template that this kind of model can be asked: the relation's own first.
        fitting = [t for t in relation.templates if asker.fits(relation.probes(pairs[:1], t)[0])]
        if relation.templates and not fitting:
            return None, {NOT_LAST: len(pairs)}
        template = fitting[0] if fitting else None
        probes = [probe for probe in relation.probes(pairs, template) if asker.fits(probe)]
        if len(probes) < len(pairs):
            reasons[NOT_LAST] += len(pairs) - len(probes)
        if not probes:
            return None, reasons
        # Candidates are all answers of the relation, whichever of its facts are asked.
        given = dict(zip(relation.answers, asker.answers(probes[0], relation.answers), strict=True))
        ranked = asked.candidates == "relation"
        known: dict[str, Tokens] = {}
        refused: dict[str, str] = {}
        for answer, tokens in given.items():
            if tokens is None or not (ranked or len(tokens) == 1):
                refused[answer] = NO_TOKEN
            elif self.common is not None and tokens[0] not in self.common:
                refused[answer] = NOT_COMMON
            else:
                known[answer] = tokens
        # Answers that are the same tokens, such as two spellings for a model without capitals, are one candidate.
        index: dict[Tokens, int] = {}
        for tokens in known.values():
            index.setdefault(tokens, len(index))
        longest = max(known.values(), key=len, default=())
        reachable: list[tuple[Probe, Prompt]] = []
        for probe, prompt in zip(probes, asker.prompts(probes), strict=True):
            if probe.answer in refused:
                reasons[refused[probe.answer]] += 1
            elif not asker.room(prompt, longest):
                reasons[TOO_LONG] += 1
            else:
                reachable.append((probe, prompt))
        if not reachable:
            return None, reasons
        answers = tuple(
            {index[tokens]: answer for answer, tokens in reversed(known.items())}[i] for i in range(len(index))
        )
        kept = {probe.id for probe, _ in reachable}
        asked_pairs = [p for p in pairs if relation.probes([p], template)[0].id in kept] if asked.paraphrases else []
        return (
            Questions(
                relation=relation,
                probes=tuple(probe for probe, _ in reachable),
                answers=answers,
                right=tuple(index[known[probe.answer]] for probe, _ in reachable),
                among=None if self.common is None else tuple(self.common),
                ranked=ranked,
                wordings=(
                    Wording(template, tuple(prompt for _, prompt in reachable), tuple(index)),
                    *self._paraphrases(relation, asked_pairs, answers, [t for t in fitting if t != template]),
                ),
                unreachable=dict(sorted(reasons.items())),
            ),
            reasons,
        )

    def _paraphrases(
        self,
        relation: Relation,
        pairs: Sequence[tuple[str, str, str | None]],
        answers: Sequence[str],
        templates: Sequence[str],
    ) -> list[Wording]:
        """The first paraphrases in which every candidate can be given, so that predictions are comparable."""
        found: list[Wording] = []
        for template in templates:
            if len(found) == self.asked.paraphrases:
                break
            probes = relation.probes(pairs, template)
            tokens = [one for one in self.asker.answers(probes[0], answers) if one is not None]
            if len({*tokens}) < len(answers):
                continue
            prompts = self.asker.prompts(probes)
            if all(self.asker.room(prompt, max(tokens, key=len)) for prompt in prompts):
                found.append(Wording(template, tuple(prompts), tuple(tokens)))
        return found


_COMMON = Probe("", "It is ", " .", "")


def _common(asker: Asker) -> dict[int, None]:
    """Single tokens of LAMA's common vocabulary as they stand within a sentence."""
    probe = Probe("", _COMMON.before, "" if asker.kind == "causal" else _COMMON.after, "")
    found = asker.answers(probe, lama.common_vocabulary())
    return {tokens[0]: None for tokens in found if tokens is not None and len(tokens) == 1}


def plan(model: Model, asked: Asked) -> Plan:
    """Everything that is asked of a model, read and tokenized once for all models of one tokenizer and kind.

    Raises
    ------
    DataError
        When data are missing or malformed, or nothing of what is there can be asked.
    """
    asker = Asker(model)
    here, missing = _here(asked)
    wanted = tuple(
        lama.read(s, None if asked.relations is None else [n for n in asked.relations if n in lama.names(s)])
        for s in here
    )
    relations = tuple(relation for subset in wanted for relation in subset.relations)
    return _plan(relations, missing, asked, _Key(asker, tokenizer_hash(asker.tokenizer)))


@dataclass(frozen=True, eq=False)
class _Key:
    """An asker that equals another where it asks the same: by tokenizer, kind and room."""

    asker: Asker
    hashed: str

    def _what(self) -> tuple[Any, ...]:
        starts = [self.asker.config.get(key) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id")]
        return self.hashed, self.asker.kind, self.asker.longest, *starts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._what() == other._what()

    def __hash__(self) -> int:
        return hash(self._what())


@functools.lru_cache(maxsize=16)
def _plan(relations: tuple[Relation, ...], missing: tuple[str, ...], asked: Asked, key: _Key) -> Plan:
    planner = _Planner(asked, key.asker, _common(key.asker) if asked.candidates == "common" else None)
    questions: list[Questions] = []
    unasked: dict[str, Mapping[str, int]] = {}
    for relation in relations:
        found, reasons = planner.questions(relation)
        if found is None:
            unasked[relation.label] = dict(sorted(reasons.items()))
        else:
            questions.append(found)
    if not questions:
        why = Counter[str]()
        for reasons in unasked.values():
            why.update(reasons)
        most = why.most_common(1)[0][0] if why else "there are no facts"
        raise DataError(
            f"none of the facts of {', '.join(asked.subsets)} can be asked of {key.asker.name} ({most}): "
            "ask other relations, or with candidates='relation'"
        )
    hashed = digest([_plain(one) for one in questions])
    return Plan(tuple(questions), missing, unasked, hashed)


def _plain(one: Questions) -> list[Any]:
    """Everything that is asked of a relation, as JSON can hold it."""
    wordings = [
        [word.template, [[prompt.tokens, prompt.position, prompt.source] for prompt in word.prompts], word.tokens]
        for word in one.wordings
    ]
    return [one.ids, one.answers, one.right, one.among, wordings]


@dataclass(frozen=True)
class Answers:
    """What a model answered of one relation.

    Parameters
    ----------
    placings : of the right answers among the candidates
    free : (m,) bool, of the facts with one-token answers, whether the answer is the likeliest token of all; None where
        no answer of the relation is one token, or the whole vocabulary is what answers are ranked among
    agreement, all_right : (n,) float64, of each fact, the share of pairs of wordings that predict the same, and whether
        all predict the right answer; None without paraphrases
    paraphrased : mean accuracy over the paraphrases
    others : placings of each paraphrase
    """

    placings: Placings
    free: Tensor | None = None
    agreement: Tensor | None = None
    all_right: Tensor | None = None
    paraphrased: float | None = None
    others: tuple[Placings, ...] = ()

    def scores(self) -> dict[str, float]:
        """Metrics of this relation."""
        found = {f"top{k}": float(self.placings.hits(k).mean()) for k in (1, 5, 10)}
        found["mrr"] = float(self.placings.reciprocal().mean())
        if self.free is not None:
            found["free_top1"] = float(self.free.double().mean())
        if self.agreement is not None and self.all_right is not None and self.paraphrased is not None:
            found["consistency"] = float(self.agreement.mean())
            found["consistent_accuracy"] = float(self.all_right.mean())
            found["paraphrase_accuracy"] = self.paraphrased
        return found


def ask(model: Model, questions: Questions, *, per_token: bool = False) -> Answers:
    """Ask the facts of one relation."""
    right = torch.tensor(questions.right)
    main = questions.main

    def ranked(wording: Wording) -> tuple[Placings, Tensor]:
        scores, likeliest = log_likelihoods(model, wording.prompts, wording.tokens, per_token=per_token)
        logs = scores.gather(1, right[:, None])[:, 0]
        if per_token:
            logs *= torch.tensor([len(wording.tokens[i]) for i in questions.right])
        return place(scores, right, logs), likeliest

    free = placings = None
    told: list[Placings] = []
    if questions.ranked or len(questions.wordings) > 1:
        placings, likeliest = ranked(main)
        told.append(placings)
        if questions.ranked and (single := questions.single()):
            wanted = torch.tensor([main.tokens[questions.right[i]][0] for i in single])
            free = likeliest[single] == wanted
    told += [ranked(wording)[0] for wording in questions.wordings[1:]]
    if not questions.ranked:
        wanted = [main.tokens[i][0] for i in questions.right]
        placings = vocabulary_placings(model, main.prompts, wanted, questions.among)
    assert placings is not None, "answers are ranked among the relation's or among tokens"
    if len(told) < 2:
        return Answers(placings, free)
    predictions = [one.best for one in told]
    agree = torch.stack([(a == b).double() for a, b in combinations(predictions, 2)]).mean(0)
    correct = torch.stack([(one == right).double() for one in predictions])
    return Answers(placings, free, agree, correct.amin(0), float(correct[1:].mean()), tuple(told[1:]))


def _mean(parts: Sequence[Mapping[str, float]], weights: Sequence[int] | None = None) -> dict[str, float]:
    """Mean of each metric over the parts that have it, weighted where asked."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [(part[name], 1 if weights is None else weights[i]) for i, part in enumerate(parts) if name in part]
        found[name] = sum(value * weight for value, weight in having) / sum(weight for _, weight in having)
    return found


@dataclass(frozen=True)
class Result:
    """What LAMA found of a model.

    Parameters
    ----------
    metrics : means over relations within each subset, as LAMA reports them (over facts for subsets of sentences), then
        over subsets
    subsets, relations : the same of each part, with the number of facts
    known : ids of the facts whose answer comes first and alone
    told : what the model made of every fact, in the relation's wording and in paraphrases
    """

    metrics: Mapping[str, float]
    subsets: Mapping[str, Mapping[str, float]]
    relations: Mapping[str, Mapping[str, Any]]
    known: frozenset[str]
    told: tuple[Told, ...]


def _told(questions: Questions, answers: Answers) -> Iterator[Told]:
    """What was made of each fact of a relation."""
    placings = (answers.placings, *answers.others)
    for number, (wording, one) in enumerate(zip(questions.wordings, placings, strict=True)):
        assert one.logs is not None
        for probe, (rank, probability) in zip(questions.probes, plain(one.ranks, one.logs), strict=True):
            yield Told(
                fact=probe.id,
                relation=questions.relation.label,
                subject=probe.subject,
                template=wording.template or probe.sentence(lama.ANSWER),
                wording="paraphrase" if number else "main",
                answer=probe.answer,
                rank=rank,
                probability=probability,
            )


def result(model: Model, planned: Plan, *, per_token: bool = False) -> Result:
    """Ask everything that is planned."""
    scores: dict[str, dict[str, float]] = {}
    relations: dict[str, Mapping[str, Any]] = {}
    known: set[str] = set()
    told: list[Told] = []
    groups: defaultdict[str, list[Questions]] = defaultdict(list)
    for one in planned.questions:
        answers = ask(model, one, per_token=per_token)
        label = one.relation.label
        scores[label] = answers.scores()
        known |= {fact for fact, knows in zip(one.ids, answers.placings.known(), strict=True) if bool(knows)}
        told += _told(one, answers)
        groups[one.relation.subset].append(one)
        relations[label] = {
            "n": len(one.ids),
            "candidates": round(1 / one.chance(model.shape.vocab)),
            "template": one.main.template,
            "paraphrases": len(one.wordings) - 1,
            "unreachable": dict(one.unreachable),
            **scores[label],
        }
    subsets: dict[str, Mapping[str, float]] = {}
    for subset, members in groups.items():
        counts = [len(one.ids) for one in members]
        weights = counts if subset in lama.WHOLE else None
        subsets[subset] = {"n": sum(counts), **_mean([scores[one.relation.label] for one in members], weights)}
    metrics = _mean([{name: value for name, value in part.items() if name != "n"} for part in subsets.values()])
    return Result(metrics, subsets, relations, frozenset(known), tuple(told))


def chance(planned: Plan, vocab: int) -> float:
    """Of the first place, averaged as the metrics are."""
    groups: defaultdict[str, list[Questions]] = defaultdict(list)
    for one in planned.questions:
        groups[one.relation.subset].append(one)
    means = [
        _mean(
            [{"top1": one.chance(vocab)} for one in members],
            [len(one.ids) for one in members] if subset in lama.WHOLE else None,
        )
        for subset, members in groups.items()
    ]
    return _mean(means)["top1"]


def usual_candidates(kind: str) -> Candidates:
    """A masked model's answer is ranked in the whole vocabulary, as LAMA does; others' among the relation's answers."""
    return "vocabulary" if kind == "masked" else "relation"


__all__ = [
    "Answers",
    "Asked",
    "Candidates",
    "Plan",
    "Questions",
    "Result",
    "ask",
    "chance",
    "check",
    "plan",
    "result",
    "usual_candidates",
    "work",
]

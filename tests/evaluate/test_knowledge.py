from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mariotte.errors import ChainError, DataError
from mariotte.evaluate.measures.knowledge import Knowledge, answer_ranks
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.testbed.world import World


class Oracle(torch.nn.Module):
    """A model that answers each prompt it has a rank for: the answer comes at that rank."""

    def __init__(self, answers: Mapping[tuple[int, ...], tuple[int, int]], vocab: int) -> None:
        super().__init__()
        self.answers, self.vocab = answers, vocab

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.zeros(len(input_ids), 1, self.vocab)
        for row, prompt in zip(logits, input_ids.tolist(), strict=True):
            answer, rank = self.answers[tuple(prompt)]
            others = [t for t in range(self.vocab) if t != answer]
            row[0, others[: rank - 1]] = 2.0
            row[0, answer] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.fixture
def model(model_folder: Path) -> Model:
    return load(model_folder)


def oracle(model: Model, measure: Knowledge, seen_rank: int, heldout_rank: int) -> None:
    _, seen, heldout, answers = measure._questions(model)
    table = {tuple(p): (a, heldout_rank) for p, a in zip(heldout, answers, strict=True)}
    table |= {tuple(p): (a, seen_rank) for p, a in zip(seen, answers, strict=True)}
    knows = Oracle(table, model.shape.vocab)
    model.hf.forward = knows.forward


def test_a_model_that_knows_the_answers_scores_one(model: Model) -> None:
    measure = Knowledge(on="testbed", facts=40)
    oracle(model, measure, 1, 1)
    found = measure.measure(model)
    assert set(found.metrics.values()) == {1.0}
    assert len(found.details["known"]) == 40


def test_ranks_become_the_metrics(model: Model) -> None:
    measure = Knowledge(on="testbed", facts=40)
    oracle(model, measure, 2, 6)
    found = measure.measure(model).metrics
    assert (found["top1"], found["top5"], found["mrr"]) == (0.0, 1.0, 0.5)
    assert (found["heldout_top1"], found["heldout_top5"]) == (0.0, 0.0)
    assert found["heldout_mrr"] == pytest.approx(1 / 6)


def test_equal_logits_never_look_like_knowledge(model: Model) -> None:
    with torch.no_grad():
        model.final_norm.weight.zero_()
    found = Knowledge(on="testbed", facts=40).measure(model).metrics
    assert found["top1"] == found["top5"] == 0
    assert found["mrr"] == pytest.approx(1 / model.shape.vocab)


def test_batches_and_lengths_change_no_rank(model: Model) -> None:
    prompts = [[0, 5, 6], [0, 7], [0, 8, 9], [0, 10, 11, 12]]
    answers = [20, 21, 22, 23]
    together, _ = answer_ranks(model, prompts, answers, batch=2)
    alone = [int(answer_ranks(model, [p], [a])[0]) for p, a in zip(prompts, answers, strict=True)]
    assert together.tolist() == alone


def test_what_was_lost_and_gained_is_listed(model: Model) -> None:
    measure = Knowledge(on="testbed", facts=40)
    oracle(model, measure, 1, 1)
    dense = measure.measure(model)
    oracle(model, measure, 2, 2)
    worse = measure.measure(model, dense)
    assert worse.details["lost"] == dense.details["known"]
    assert worse.details["gained"] == []
    assert measure.measure(model).details["known"] == []


def test_every_fact_is_told_in_both_wordings(model: Model) -> None:
    measure = Knowledge(on="testbed", facts=40)
    oracle(model, measure, 1, 2)
    found, told = measure.tell(model)
    assert [one.wording for one in told] == ["main"] * 40 + ["heldout"] * 40
    assert [one.rank for one in told] == [1] * 40 + [2] * 40
    assert sorted(one.fact for one in told[:40]) == found.details["known"]
    vocab = model.shape.vocab
    alone = math.e / (math.e + vocab - 1)
    assert told[0].probability == pytest.approx(alone)
    assert told[40].probability == pytest.approx(math.e / (math.e**2 + math.e + vocab - 2))
    one = told[0]
    world = {fact.id: fact for fact in World().facts()}[one.fact]
    assert one.template.startswith("[X] ")
    assert one.template.replace("[X]", one.subject).removesuffix(" [Y]") == world.seen[0]
    assert (one.answer, one.relation) == (world.answer, world.relation)


def test_parts_add_up(model: Model) -> None:
    details = Knowledge(on="testbed", facts=100).measure(model).details
    assert len(details["relations"]) == 5
    assert set(details["quarters"]) == {"0", "1", "2", "3"}
    assert sum(part["n"] for part in details["relations"].values()) == 100
    assert sum(part["n"] for part in details["quarters"].values()) == 100


def test_a_model_of_another_language_is_refused(shared: Path) -> None:
    with pytest.raises(DataError, match=r"is no single token of .*ask a testbed model"):
        Knowledge(on="testbed").protocol(load(shared / "data/models/stories260K"))


def test_fields_are_checked() -> None:
    with pytest.raises(ChainError, match="knowledge has no set of facts 'wikidata'; it has testbed"):
        Knowledge(on="wikidata")
    with pytest.raises(ChainError, match="facts must be at least 1"):
        Knowledge(on="testbed", facts=0)


class Gaps(torch.nn.Module):
    """An encoder or encoder-decoder that answers each sentence it has a rank for, in the place of its gap."""

    def __init__(self, answers: Mapping[tuple[int, ...], tuple[int, int]], vocab: int) -> None:
        super().__init__()
        self.answers, self.vocab, self.dtype = answers, vocab, torch.float32

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None, **_: Any) -> SimpleNamespace:
        positions = input_ids if decoder_input_ids is None else decoder_input_ids
        logits = torch.zeros(*positions.shape, self.vocab)
        for row, sentence in zip(logits, input_ids.tolist(), strict=True):
            answer, rank = self.answers[tuple(sentence)]
            row[:, [t for t in range(self.vocab) if t != answer][: rank - 1]] = 2.0
            row[:, answer] = 1.0
        return SimpleNamespace(logits=logits, encoder_last_hidden_state=None)


def gap_model(kind: str) -> Model:
    """A model of a kind that speaks the testbed's language and knows nothing yet."""
    words = [*World().vocabulary, "<mask>" if kind == "masked" else "<extra_id_0>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra: dict[str, Any] = {"mask_token": words[-1]} if kind == "masked" else {"extra_special_tokens": [words[-1]]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=words[0], unk_token=words[1], **extra)
    made = SimpleNamespace(
        kind=kind,
        name=kind,
        tokenizer=tokenizer,
        config={"decoder_start_token_id": 0, "model_type": "other"},
        longest=None,
        device=torch.device("cpu"),
        shape=SimpleNamespace(vocab=len(words)),
        hf=Gaps({}, len(words)),
    )
    return cast(Model, made)


@pytest.mark.parametrize("kind", ["masked", "seq2seq"])
def test_models_that_fill_gaps_are_asked_for_the_same_facts(kind: str) -> None:
    model, measure = gap_model(kind), Knowledge(on="testbed", facts=40)
    facts, seen, heldout, answers = measure._gaps(model)
    stop = World().vocabulary.index(".")
    ranks: dict[tuple[int, ...], tuple[int, int]] = {}
    for prompts, rank in ((heldout, 6), (seen, 1)):
        for prompt, answer in zip(prompts, answers, strict=True):
            sentence = prompt.source or prompt.tokens
            assert sentence[-1] == stop
            assert sentence[-2] == len(World().vocabulary)
            ranks[sentence] = (answer, rank)
    model.hf.answers = ranks
    found = measure.measure(model)
    assert found.metrics["top1"] == found.metrics["mrr"] == 1
    assert (found.metrics["heldout_top1"], found.metrics["heldout_top5"]) == (0, 0)
    assert found.metrics["heldout_mrr"] == pytest.approx(1 / 6)
    assert found.details["known"] == sorted(fact.id for fact in facts)
    assert found.protocol["n_facts"] == 40


@pytest.mark.parametrize("kind", ["masked", "seq2seq"])
def test_equal_logits_of_models_that_fill_gaps_never_look_like_knowledge(kind: str) -> None:
    model = gap_model(kind)

    def even(input_ids: Tensor, decoder_input_ids: Tensor | None = None, **_: Any) -> SimpleNamespace:
        given = input_ids if decoder_input_ids is None else decoder_input_ids
        return SimpleNamespace(
            logits=torch.zeros(*given.shape, model.shape.vocab), encoder_last_hidden_state=None, past_key_values=None
        )

    model.hf.forward = even
    found, told = Knowledge(on="testbed", facts=40).tell(model)
    assert found.metrics["top1"] == found.metrics["top5"] == 0
    assert found.metrics["mrr"] == pytest.approx(1 / model.shape.vocab) == found.protocol["chance_top1"]
    # The probability is chance exactly.
    assert {round(one.probability * model.shape.vocab, 4) for one in told} == {1}

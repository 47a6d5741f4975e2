from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mariotte.errors import ChainError, DataError
from mariotte.evaluate.measures.knowledge import Knowledge, answer_ranks
from mariotte.models.load import load
from mariotte.models.model import Model


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
    together = answer_ranks(model, prompts, answers, batch=2)
    alone = [int(answer_ranks(model, [p], [a])) for p, a in zip(prompts, answers, strict=True)]
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

"""The formula, teacher and student alike, mixtures, and the conformance suite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typing_extensions import override

from mariotte.errors import ChainError, ModelError
from mariotte.models.nll import token_nll
from mariotte.recover.methods.distill import Distill, divergence
from mariotte.testing.recoveries import RecoveryConformance, context_of, counting_corpus, recovered, tiny_reader
from mariotte.testing.tiny import random_tokens, tiny

STEP = Distill(batch=5, lr=1e-2, warmup=3, rank=4, mix=0.5)
"""Half of the text: the dense model of the suite is the random model itself, which teaches nothing new."""


class TestConformance(RecoveryConformance):
    @override
    def recovery(self) -> Distill:
        return STEP


def test_the_divergence_is_the_formula() -> None:
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(divergence(student, teacher, 2.0).double(), expected, atol=1e-5, rtol=1e-5)
    assert divergence(teacher, teacher, 2.0).abs() < 1e-6


@pytest.mark.parametrize("adapters", [True, False])
def test_a_student_comes_nearer_to_its_teacher(adapters: bool, tmp_path: Path) -> None:
    corpus = counting_corpus(tmp_path)
    dense = tiny_reader("llama")
    student = dense.copy()
    with torch.no_grad():
        for matrix in student.matrices("ffn"):
            matrix.weight.add_(0.05 * torch.randn(matrix.weight.shape, generator=torch.Generator().manual_seed(1)))
    context = replace(context_of(dense, tmp_path / "scratch", corpus), dense=dense)
    step = Distill(lr=5e-3 if adapters else 2e-3, adapters=adapters)
    result = recovered(step, student, context, [4_800])[4_800]
    facts = result.done[-1].facts
    assert facts["loss_end"] < 0.5 * facts["loss_begin"]
    assert facts["adapters"] is adapters


def test_the_text_counts_as_much_as_asked(tmp_path: Path) -> None:
    model, other = tiny_reader("llama"), tiny("llama", layers=1, seed=5)
    context = context_of(other, tmp_path, None)
    rows = random_tokens(3, 16)
    text = token_nll(model, rows).mean()
    only = Distill().loss(model, context)(model.hf, rows)
    mixed = Distill(mix=0.25).loss(model, context)(model.hf, rows)
    torch.testing.assert_close(mixed, 0.75 * only + 0.25 * text, atol=1e-5, rtol=1e-5)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    context = context_of(tiny("llama", vocab=80), tmp_path, None)
    with pytest.raises(ModelError, match="has 64 of them where the dense model has 80"):
        Distill().loss(tiny("llama"), context)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"mix": 1.0}, r"mix must be in \[0, 1\), got 1.0"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ChainError, match=said):
        Distill(**fields)

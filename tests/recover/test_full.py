"""All weights train; zeros stay, a tied head stays tied, bf16 comes back as bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typing_extensions import override

from mariotte.errors import ModelError
from mariotte.models.model import Done
from mariotte.recover.methods.full import Full
from mariotte.testing.recoveries import (
    RecoveryConformance,
    context_of,
    recovered,
    tiny_reader,
)
from mariotte.testing.tiny import tiny

STEP = Full(batch=5, lr=5e-3, warmup=3)


class TestConformance(RecoveryConformance):
    @override
    def recovery(self) -> Full:
        return STEP


def test_every_weight_changes_and_a_tied_head_stays_tied(tmp_path: Path, corpus: str) -> None:
    model = tiny_reader("qwen2")
    assert model.head.weight is model.embeddings.weight
    result = recovered(STEP, model, context_of(model, tmp_path / "scratch", corpus), [900])[900]
    assert result.head.weight is result.embeddings.weight
    for (name, old), (_, new) in zip(model.hf.named_parameters(), result.hf.named_parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_weights_set_to_zero_stay_zero(tmp_path: Path, corpus: str) -> None:
    model = tiny_reader("llama")
    with torch.no_grad():
        for matrix in model.matrices("ffn"):
            matrix.weight.masked_fill_(matrix.weight.abs() < matrix.weight.abs().median(), 0.0)
    zeros = model.zeros()
    done = Done(
        step="magnitude@0.5:ffn",
        name="magnitude",
        unit="weights",
        family="unstructured",
        amount=0.5,
        obtained=0.5,
        zeros=zeros,
        in_scope=2 * zeros,
        facts={},
    )
    model = model.after(done)
    before = [matrix.weight == 0 for matrix in model.matrices()]
    result = recovered(STEP, model, context_of(model, tmp_path / "scratch", corpus), [3_000])[3_000]
    assert result.done[-1].facts["mask_reapplied"] == zeros
    assert all(torch.equal(m.weight == 0, zero) for m, zero in zip(result.matrices(), before, strict=True))
    assert result.done[-1].facts["loss_end"] < result.done[-1].facts["loss_begin"] - 0.3


def test_bf16_weights_train_in_float32_and_come_back_as_bf16(tmp_path: Path, corpus: str) -> None:
    model = tiny("llama", layers=1, dtype=torch.bfloat16)
    model.tokenizer = tiny_reader("llama").tokenizer
    step = replace(STEP, lr=1e-4)  # a step smaller than what bf16 can tell apart near 1
    context = context_of(model, tmp_path / "scratch", corpus)
    assert {p.dtype for p in step.learner(model, context).module.parameters()} == {torch.float32}
    result = recovered(step, model, context, [4_000])[4_000]
    assert {p.dtype for p in result.hf.parameters()} == {torch.bfloat16}
    assert result.done[-1].facts["loss_end"] < result.done[-1].facts["loss_begin"]


def test_integer_weights_are_refused(tmp_path: Path, corpus: str) -> None:
    model = tiny_reader("llama")
    weight = model.blocks[0].query.weight
    model.blocks[0].query.weight = torch.nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"full trains plain weights, and .*q_proj\.weight is quantized"):
        STEP.prepare(model, context_of(model, tmp_path, corpus), [900])

"""Encoders: calibration text as they read it in training, and matrices cut by what they read then."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mariotte.compress.calibration import mean_squares
from mariotte.compress.methods.gptq import GPTQ
from mariotte.compress.methods.wanda import Wanda
from mariotte.compress.sparsity import readers
from mariotte.data import corpora, tokens
from mariotte.errors import DataError, ModelError
from mariotte.experiments.bench import read_calibration
from mariotte.experiments.pipeline import compress_model
from mariotte.experiments.study import Calibration
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.testing.methods import context_of, run
from mariotte.testing.tiny import random_tokens, tiny

ENCODERS = ("bert", "roberta", "distilbert", "albert")


def test_text_of_an_encoder_is_pieces_of_documents_with_tokens_hidden() -> None:
    model = load("testbed/bert-181k")
    corpus = corpora.find("testbed/all")
    packed = tokens.read(corpus, "calibration", model.tokenizer, 64, 6)
    assert model.tokenizer is not None
    rows = tokens.hidden(packed, model.tokenizer)
    before, after = tokens.frame(model.tokenizer)
    assert torch.equal(rows, tokens.hidden(packed, model.tokenizer))
    mask, text = cast(int, model.tokenizer.mask_token_id), iter(packed.tokens[packed.n_bytes > 0].tolist())
    documents = iter(packed.documents[packed.n_bytes > 0].tolist())
    for row in rows:
        present = row[row >= 0].tolist()
        assert row[len(present) :].eq(tokens.PADDING).all()
        assert tuple(present[: len(before)]) == before
        assert tuple(present[len(present) - len(after) :]) == after
        piece = present[len(before) : len(present) - len(after)]
        whole = [next(text) for _ in piece]
        assert len({next(documents) for _ in piece}) == 1
        gone = [seen == mask for seen in piece]
        assert sum(gone) == max(1, round(0.15 * len(piece)))
        assert all(a == b for a, b, out in zip(piece, whole, gone, strict=True) if not out)
    assert next(text, None) is None
    read = read_calibration(Calibration(corpus="testbed/all", rows=6, block=64), model)
    assert read is not None
    assert torch.equal(read.tokens, rows)
    assert read.sha256 == packed.sha256


def test_a_tokenizer_without_a_mask_cannot_hide_anything() -> None:
    model = load("testbed/qwen2-46k")
    packed = tokens.read(corpora.find("testbed/all"), "calibration", model.tokenizer, 64, 1)
    assert model.tokenizer is not None
    with pytest.raises(DataError, match=r"^calibration of an encoder hides tokens, .* has no mask token .*: add it"):
        tokens.hidden(packed, model.tokenizer)


def of_different_lengths() -> Tensor:
    rows = random_tokens(5, 12)
    for row, length in enumerate((12, 3, 7, 1, 9)):
        rows[row, length:] = tokens.PADDING
    return rows


@torch.no_grad()
def one_by_one(model: Model, matrix: nn.Module, rows: Tensor) -> Tensor:
    """Mean square of what a matrix reads, each row run alone without padding."""
    seen: list[Tensor] = []
    handle = matrix.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    for row in rows:
        present = row[row >= 0][None]
        cast(Any, model.hf)(input_ids=present, attention_mask=torch.ones_like(present))
    handle.remove()
    return torch.cat(seen).double().square().mean(0)


@pytest.mark.parametrize("family", ENCODERS)
def test_what_stands_behind_a_row_changes_nothing(family: str, tmp_path: Path) -> None:
    model, rows = tiny(family), of_different_lengths()
    inputs = {part: [some[0]] for part, some in readers(model.blocks[-1], "all").items()}
    found = mean_squares(model, context_of(model, tmp_path, rows), "test", inputs)
    assert [*inputs] == ["attention", "output", "mlp", "down"]
    for part, (matrix,) in inputs.items():
        torch.testing.assert_close(found[part], one_by_one(model, matrix, rows), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_each_block_is_measured_behind_those_already_cut(family: str, tmp_path: Path) -> None:
    model, rows = tiny(family), of_different_lengths()
    cut = run(Wanda(), model, 0.5, tmp_path, rows)
    half = model.copy()
    with torch.no_grad():
        for name in ("attention", "ffn"):
            for to, by in zip(getattr(half.blocks[0], name), getattr(cut.blocks[0], name), strict=True):
                to.weight.copy_(by.weight)
    last, new = half.blocks[1].ffn[-1], cut.blocks[1].ffn[-1]
    score = last.weight.detach().double().abs() * one_by_one(half, last, rows).sqrt()
    gone = score.argsort(1)[:, : score.shape[1] // 2]
    expected = last.weight.detach().clone().scatter_(1, gone, 0.0)
    torch.testing.assert_close(new.weight.detach(), expected)


def test_on_the_testbed_it_loses_less_than_without_text() -> None:
    model = load("testbed/bert-181k")
    chains = ("wanda@0.3", "magnitude@0.3", "gptq@4", "rtn@4")
    assert model.tokenizer is not None
    text = tokens.read(corpora.find("testbed/all"), "test", model.tokenizer, 64, 32)
    tokens_NT = tokens.hidden(text, model.tokenizer)
    with torch.no_grad():
        given = {"input_ids": tokens_NT.clamp(min=0), "attention_mask": (tokens_NT >= 0).long()}
        expected = cast(Any, model.hf)(**given).logits[tokens_NT >= 0].log_softmax(-1)
        lost: dict[str, float] = {}
        for chain in chains:
            cut = compress_model(model, chain, calibration="testbed/all", rows=32)
            found = cast(Any, cut.hf)(**given).logits[tokens_NT >= 0].log_softmax(-1)
            lost[chain] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert lost["wanda@0.3"] < lost["magnitude@0.3"]
    assert lost["gptq@4"] < lost["rtn@4"]


def test_what_is_for_decoders_alone_is_refused_by_name() -> None:
    assert Wanda(allocation="influence").refuse(tiny("bert")) == (
        "needs a causal decoder for allocation=influence, and bert is masked: leave it out"
    )
    assert "needs a causal decoder, and bert predicts otherwise" in str(GPTQ(by="llm-compressor").refuse(tiny("bert")))
    with pytest.raises(
        ModelError, match="needs a model that reads one text, and t5 reads one and writes another, which"
    ):
        compress_model(tiny("t5"), "wanda@0.5")

from __future__ import annotations

import math

import pytest
import torch

from mariotte.models.nll import token_nll
from mariotte.testing.tiny import VOCAB, random_tokens, tiny


def test_a_uniform_model_scores_ln_v() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.head.weight.zero_()
    assert token_nll(model, random_tokens()).numpy() == pytest.approx(math.log(VOCAB), abs=1e-6)


def test_it_equals_transformers_own_loss() -> None:
    model, tokens_BT = tiny("qwen2"), random_tokens()
    with torch.no_grad():
        theirs = float(model.hf(input_ids=tokens_BT, labels=tokens_BT).loss)
    assert float(token_nll(model, tokens_BT).mean()) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_batching_changes_nothing(batch: int) -> None:
    model, tokens_BT = tiny("llama"), random_tokens()
    assert torch.allclose(token_nll(model, tokens_BT, batch=batch), token_nll(model, tokens_BT), atol=1e-5)

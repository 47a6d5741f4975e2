from __future__ import annotations

import math

import pytest
import torch

from mariotte.models.nll import scored_nll, token_nll
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("at_once", [1, 40, None])
def test_tokens_asked_for_are_scored_given_those_before_them(family: str, at_once: int | None) -> None:
    model, tokens_NT = tiny(family), random_tokens()
    generator = torch.Generator().manual_seed(0)
    lengths_N = torch.randint(1, tokens_NT.shape[1] + 1, (len(tokens_NT),), generator=generator)
    places_T = torch.arange(tokens_NT.shape[1])
    # Some rows are asked for their end, as windows that overlap are, some for scattered tokens, the last for none.
    first_N = torch.randint(1, tokens_NT.shape[1], (len(tokens_NT),), generator=generator)
    scattered_NT = torch.rand(tokens_NT.shape, generator=generator) < 0.5
    scored_NT = (places_T >= first_N[:, None]) | (scattered_NT & (torch.arange(len(tokens_NT)) % 3 == 0)[:, None])
    scored_NT &= (places_T >= 1) & (places_T < lengths_N[:, None])
    scored_NT[-1] = False
    expected = [
        token_nll(model, tokens_NT[row : row + 1, : int(length)])[0][scored_NT[row, 1 : int(length)]]
        for row, length in enumerate(lengths_N)
        if length > 1
    ]
    found_M = scored_nll(model, tokens_NT, scored_NT, lengths_N, at_once=at_once)
    assert len(found_M) == int(scored_NT.sum()) > 0
    assert torch.allclose(found_M, torch.cat(expected), atol=1e-5)

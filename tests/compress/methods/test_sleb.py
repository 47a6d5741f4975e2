"""SLEB: the greedy order against brute force, and an order that is continued."""

from __future__ import annotations

import itertools

import pytest
import torch

from mariotte.compress.blocks import keep_blocks
from mariotte.compress.methods.sleb import SLEB, greedy_order
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models.nll import token_nll
from mariotte.models.step import prepare_once
from mariotte.testing.methods import context_of, overflowing
from mariotte.testing.tiny import random_tokens, tiny, weights_hash


def test_the_order_by_hand():
    losses = {
        (0, 1, 2): 1.0,
        (1, 2): 3.0,
        (0, 2): 2.0,
        (0, 1): 2.5,
        (2,): 4.0,
        (0,): 5.0,
    }
    assert greedy_order(lambda kept: losses[tuple(kept)], range(3), range(3), 2) == ([1, 0], [2.0, 4.0])
    # Of equal ones the first; one that is spared never.
    assert greedy_order(lambda kept: 1.0, range(3), [1, 2], 2) == ([1, 2], [1.0, 1.0])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_order_equals_brute_force_on_four_blocks(family, tmp_path):
    """Every subset of blocks is cut out and measured by itself; the greedy path is then looked up."""
    model, tokens = tiny(family, layers=4), random_tokens()
    losses = {}
    for size in range(1, 5):
        for kept in itertools.combinations(range(4), size):
            cut = model.copy()
            for index in set(range(4)) - set(kept):
                # A block that adds nothing is a block that is not there.
                for matrix in (cut.blocks[index].output, cut.blocks[index].down):
                    torch.nn.init.zeros_(matrix.weight)
            losses[kept] = float(token_nll(cut, tokens).double().mean())
    left, order = [0, 1, 2, 3], []
    while len(left) > 1:
        gone = min(left, key=lambda b: losses[tuple(k for k in left if k != b)])
        left.remove(gone)
        order.append(gone)
    step, context = SLEB(), context_of(model, tmp_path, tokens)
    prepared = prepare_once(step, model, context, [0.9])
    assert prepared.facts["order"] == order
    path = [tuple(b for b in range(4) if b not in order[:k]) for k in range(4)]
    assert prepared.facts["losses"] == pytest.approx([losses[kept] for kept in path], abs=1e-5)
    for count, kept in enumerate(path):
        cut = step.apply(model, prepared, count / 4, context)
        assert weights_hash(cut) == weights_hash(keep_blocks(model, kept))
        assert cut.done[-1].facts["removed_blocks"] == sorted(order[:count])
        assert float(token_nll(cut, tokens).double().mean()) == pytest.approx(losses[kept], abs=1e-5)


def test_an_order_is_continued_and_not_begun_again(tmp_path, monkeypatch):
    model, step = tiny("llama", layers=4), SLEB()
    context = context_of(model, tmp_path / "a")
    first = prepare_once(step, model, context, [0.25]).facts["order"]
    assert len(first) == 1
    measured = []

    def counting(cut, tokens, batch):
        measured.append(cut.shape.layers)
        return token_nll(cut, tokens, batch=batch)

    monkeypatch.setattr("mariotte.compress.methods.sleb.token_nll", counting)
    again = prepare_once(step, model, context, [0.25])
    assert not measured
    again = prepare_once(step, model, context, [0.75])
    assert measured == [2, 2, 2, 1, 1]
    whole = prepare_once(step, model, context_of(model, tmp_path / "b"), [0.75])
    assert again.facts == whole.facts
    assert again.facts["order"][:1] == first


def test_spared_blocks_stay(tmp_path):
    model = tiny("llama", layers=4)
    step, context = SLEB(first=1, last=2), context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.9])
    assert prepared.facts["order"] == [1]
    assert step.apply(model, prepared, 0.9, context).done[-1].obtained == 0.25
    assert step.removes(model, 0.9) == step.removes(model, 0.25) > 0
    assert "spares 2 and 2 blocks, and this model has 4: ask for fewer" in (SLEB(first=2, last=2).refuse(model) or "")
    with pytest.raises(ChainError, match="first and last must be numbers of blocks, got -1 and 0"):
        SLEB(first=-1)


def test_looking_copies_no_weights_and_changes_nothing():
    model = tiny("qwen2", layers=3, tied=True)
    before = weights_hash(model)
    seen = keep_blocks(model, [0, 2], share=True)
    held = {parameter.data_ptr() for parameter in model.hf.parameters()}
    assert {parameter.data_ptr() for parameter in seen.hf.parameters()} < held
    assert seen.head.weight is seen.embeddings.weight
    assert seen.shape.layers == 2
    assert (model.shape.layers, weights_hash(model)) == (3, before)
    assert [block.module.self_attn.layer_idx for block in model.blocks] == [0, 1, 2]
    assert torch.equal(
        seen.logits(random_tokens(2, 8)).detach(), keep_blocks(model, [0, 2]).logits(random_tokens(2, 8)).detach()
    )


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path):
    model = tiny("llama")
    with pytest.raises(DataError, match="sleb needs calibration rows of at least 2 tokens"):
        prepare_once(SLEB(), model, context_of(model, tmp_path, random_tokens(8, 1)), [0.5])
    with pytest.raises(ModelError, match="sleb found losses that are not finite in blocks 0, 1 of tiny-llama: check"):
        prepare_once(SLEB(), overflowing(model), context_of(model, tmp_path), [0.5])

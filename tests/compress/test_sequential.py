"""Walking block by block equals the model's own pass."""

from __future__ import annotations

import pytest
import torch

from mariotte import architectures
from mariotte.compress.calibration import Means, mean_squares, outer, second_moments, squares
from mariotte.compress.sequential import Walk
from mariotte.errors import DataError, ModelError
from mariotte.testing.methods import context_of
from mariotte.testing.tiny import random_tokens, tiny


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name, entry in architectures.FAMILIES.items() if entry.kind == "causal"])
@pytest.mark.parametrize("batch", [None, 3])
def test_a_walk_to_the_end_is_the_models_own_pass(family, batch, tmp_path):
    # In double precision: products of fewer rows at once sum float32 in another order, which alone came to 2.9e-5 of
    # logits of 22 on two threads, more than a walk may be wrong by.
    model = tiny(family, layers=3, dtype=torch.float64)
    if model.entry.experts:
        model.hf.set_experts_implementation("eager")  # the usual one has no double precision
    tokens = random_tokens(7, 11)
    walk = Walk(model, context_of(model, tmp_path, tokens), "test", batch=batch)
    # What enters the first block: the embeddings, with positions where the family adds them.
    torch.testing.assert_close(walk.stream_NTD, model.hf(tokens, output_hidden_states=True).hidden_states[0])
    for block in model.blocks:
        walk.advance(block.module)
    found = model.head(model.final_norm(walk.stream_NTD))
    # What the head gives, and not the logits: some families divide or cap them behind it.
    given: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda _module, _arguments, output: given.append(output))
    model.logits(tokens)
    torch.testing.assert_close(found, given[0])


@torch.no_grad()
def test_what_is_observed_on_the_way_is_what_one_pass_sees(tmp_path):
    model = tiny("llama")
    context = context_of(model, tmp_path)
    inputs = {str(i): [block.down] for i, block in enumerate(model.blocks)}
    expected = second_moments(model, context, "test", inputs)
    norms = mean_squares(model, context, "test", inputs)
    walk = Walk(model, context, "test", batch=5)
    for index, block in enumerate(model.blocks):
        moments, sums = Means(outer), Means(squares)
        walk.observe(block.module, {"down": [block.down]}, moments)
        walk.observe(block.module, {"down": [block.down]}, sums)
        torch.testing.assert_close(moments.result("test", model)["down"], expected[str(index)])
        torch.testing.assert_close(sums.result("test", model)["down"], expected[str(index)].diagonal())
        torch.testing.assert_close(norms[str(index)], expected[str(index)].diagonal())
        walk.advance(block.module)
    assert not any(module._forward_pre_hooks for module in model.hf.modules())


@torch.no_grad()
def test_later_blocks_see_what_earlier_ones_have_become(tmp_path):
    model = tiny("qwen2")
    context = context_of(model, tmp_path)
    walk = Walk(model, context, "test")
    first = model.blocks[0]
    for linear in (first.down, first.output):
        for parameter in linear.parameters():
            parameter.zero_()
    walk.advance(first.module)
    torch.testing.assert_close(walk.stream_NTD, model.embeddings(context.calibration))


def test_too_little_text_and_activations_that_are_not_finite_are_reported(tmp_path):
    model = tiny("llama")
    for tokens, words in ((random_tokens(0, 4), "needs calibration text"), (random_tokens(1, 1), "at least 2")):
        with pytest.raises(DataError, match=words):
            Walk(model, context_of(model, tmp_path, tokens), "test")
    with torch.no_grad():
        model.embeddings.weight.fill_(torch.inf)
    walk, gather = Walk(model, context_of(model, tmp_path), "test"), Means(squares)
    block = model.blocks[0]
    walk.observe(block.module, {"block-0": [block.down]}, gather)
    with pytest.raises(ModelError, match="test found activations that are not finite in block-0 of tiny-llama"):
        gather.result("test", model)

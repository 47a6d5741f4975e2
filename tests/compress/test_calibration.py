"""Second moments of what modules see."""

from __future__ import annotations

import pytest
import torch

from mariotte.compress.calibration import rms_normalised, second_moments
from mariotte.errors import DataError, ModelError
from mariotte.testing.methods import context_of
from mariotte.testing.tiny import random_tokens, tiny


@torch.no_grad()
def test_moments_are_the_mean_outer_product_of_inputs(tmp_path):
    model = tiny("llama")
    tokens = random_tokens(6, 8)
    moments = second_moments(
        model, context_of(model, tmp_path, tokens), "test", {"embeddings": [model.blocks[0].attention_norm]}, batch=4
    )
    x = model.embeddings.weight[tokens.flatten()].double()
    torch.testing.assert_close(moments["embeddings"], x.T @ x / len(x))


@torch.no_grad()
def test_groups_are_pooled_and_transformed(tmp_path):
    model = tiny("llama")
    norms = [block.attention_norm for block in model.blocks]
    context = context_of(model, tmp_path)

    def moments(groups):
        return second_moments(model, context, "test", groups, transform=lambda x: rms_normalised(x, 1e-6))

    alone = moments({"first": norms[:1], "second": norms[1:]})
    pooled = moments({"both": norms})["both"]
    torch.testing.assert_close(pooled, (alone["first"] + alone["second"]) / 2)
    assert pooled.trace() == pytest.approx(32, rel=1e-4)  # each token has mean square one
    assert pooled.dtype == torch.float64


def test_hooks_are_gone_afterwards_even_when_the_pass_fails(tmp_path):
    model = tiny("llama")
    down = model.blocks[0].down

    def broken(_):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        second_moments(model, context_of(model, tmp_path), "test", {"x": [down]}, transform=broken)
    assert not down._forward_pre_hooks


def test_activations_that_are_not_finite_are_reported(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.embeddings.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="test found activations that are not finite in block-0 of tiny-llama"):
        second_moments(model, context_of(model, tmp_path), "test", {"block-0": [model.blocks[0].down]})


def test_no_text_is_reported(tmp_path):
    model = tiny("llama")
    empty = context_of(model, tmp_path, torch.empty(0, 8, dtype=torch.long))
    with pytest.raises(DataError, match="test needs calibration text"):
        second_moments(model, empty, "test", {"x": [model.blocks[0].down]})

"""Block influence by hand, and models with fewer blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

from mariotte.compress.blocks import keep_blocks
from mariotte.compress.influence import block_influence, cosines
from mariotte.compress.methods.shortgpt import ShortGPT
from mariotte.compress.surgery import derive
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.step import Context, prepare_once
from mariotte.testing.methods import context_of, logits
from mariotte.testing.tiny import random_tokens, tiny


def test_cosines_by_hand():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    after = torch.tensor([[2.0, 0.0], [1.0, 1.0], [4.0, -3.0], [0.0, 0.0], [1.0, 1.0], [-1.0, -2.0]])
    expected = torch.tensor([1.0, 0.5**0.5, 0.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(cosines(before, after), expected)


@torch.no_grad()
def test_influence_of_a_hand_made_model(tmp_path):
    """Two dimensions, one token: a block adds a known vector to the stream."""
    model = tiny("llama", hidden=2, heads=1, kv_heads=1, ffn=1, layers=3, mlp_bias=True)
    for block in model.blocks:
        for parameter in (*block.output.parameters(), *block.down.parameters()):
            parameter.zero_()
    model.embeddings.weight[:] = torch.tensor([1.0, 0.0])
    # The stream is (1, 0), then (1, 1), then (1, 1) again, then (-1, 1).
    model.blocks[0].down.bias[:] = torch.tensor([0.0, 1.0])
    model.blocks[2].down.bias[:] = torch.tensor([-2.0, 0.0])
    found = block_influence(model, context_of(model, tmp_path), "shortgpt")
    torch.testing.assert_close(found, torch.tensor([1 - 0.5**0.5, 0.0, 1.0], dtype=torch.float64))
    step = ShortGPT()
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.5])
    assert prepared.facts["influence"] == [0.292893, 0.0, 1.0]
    for amount, gone in ((0.0, []), (0.3, [1]), (0.6, [0, 1]), (0.9, [0, 1])):
        done = step.apply(model, prepared, amount, context).done[-1]
        assert done.facts == {"layers": [3, 3 - len(gone)], "removed_blocks": gone}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_influence_equals_the_formula_on_hidden_states(family, tmp_path):
    model = tiny(family, layers=3)
    context = context_of(model, tmp_path)
    last: list[torch.Tensor] = []
    hook = model.final_norm.register_forward_pre_hook(lambda _m, x: last.append(x[0]))
    states = [*model.hf(input_ids=context.calibration, output_hidden_states=True).hidden_states[:-1], last[0]]
    hook.remove()
    expected = [
        1 - float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())
        for a, b in itertools.pairwise(states)
    ]
    found = block_influence(model, context, "shortgpt")
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert block_influence(model, context, "shortgpt", batch=3).tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_kept_blocks_run_one_after_the_other(family):
    model = tiny(family, layers=4, tied=True)
    tokens = random_tokens(3, 8)
    skipping = model.copy()
    for index in (0, 2):
        block = skipping.blocks[index]
        for linear in (block.output, block.down):
            linear.weight.zero_()
    expected = skipping.logits(tokens)
    cut = keep_blocks(model, [3, 1])
    torch.testing.assert_close(cut.logits(tokens), expected)
    assert cut.shape.layers == 2
    assert model.shape.layers == len(model.blocks) == 4
    assert cut.head.weight is cut.embeddings.weight
    assert cut.head.weight is not model.head.weight


def test_the_cache_finds_the_blocks_that_stay(tmp_path):
    model = tiny("qwen2", layers=4)
    cut = keep_blocks(model, [1, 3])
    prompt = random_tokens(2, 6)
    made = [
        cut.hf.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            use_cache=cached,
        )
        for cached in (True, False)
    ]
    assert torch.equal(*made)
    assert [block.module.self_attn.layer_idx for block in cut.blocks] == [0, 1]
    assert [block.module.self_attn.layer_idx for block in model.blocks] == [0, 1, 2, 3]


@torch.no_grad()
def test_each_block_keeps_the_kind_of_attention_it_had(tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = tiny("qwen2", layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    cut = keep_blocks(model, [0, 1, 3])
    assert cut.config["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert model.config["layer_types"] == kinds
    loaded = load(checkpoint.save(cut, tmp_path / "saved"))
    assert loaded.config["layer_types"] == cut.config["layer_types"]
    assert torch.allclose(logits(loaded), logits(cut), atol=1e-5)


def test_one_block_stays_and_all_cannot_be_asked_for(tmp_path):
    model = tiny("llama", layers=3)
    step = ShortGPT()
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.5])
    assert [step.apply(model, prepared, a, context).shape.layers for a in (0.0, 0.3, 0.5, 0.7, 0.99)] == [3, 2, 2, 1, 1]
    with pytest.raises(ChainError, match="the share of blocks to remove must be in"):
        step.check_amount("shortgpt", 1.0)


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path):
    model = tiny("llama")
    step = ShortGPT()
    with pytest.raises(DataError, match="shortgpt needs at least 2 calibration tokens"):
        step.prepare(model, Context(dense=model, scratch=tmp_path, calibration=random_tokens(1, 1)), [0.5])
    with torch.no_grad():
        model.blocks[0].down.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="shortgpt found activations that are not finite in the stream of tiny-llama"):
        step.prepare(model, context_of(model, tmp_path), [0.5])


@torch.no_grad()
def test_blocks_of_different_sizes_are_refused():
    model = tiny("llama")
    weights = {}
    for path in ("gate_proj", "up_proj"):
        name = f"model.layers.0.mlp.{path}.weight"
        weights[name] = model.hf.get_parameter(name)[:40]
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = model.hf.get_parameter(name)[:, :40]
    uneven = derive(model, weights, {"ffn_sizes": [40, 48]}, irregular=True)
    assert "remove blocks first" in (ShortGPT().refuse(uneven) or "")
    assert ShortGPT().refuse(model) is None

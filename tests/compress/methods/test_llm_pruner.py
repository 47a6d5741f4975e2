"""LLM-Pruner: importances against autograd and by hand, spared blocks, and groups that stay whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mariotte.compress.groups import keep_groups, ranked_heads
from mariotte.compress.methods.llm_pruner import LLMPruner, neuron_importance, salience, weight_gradients
from mariotte.cuts.groups import equal_shape, removed_share
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.nll import token_nll
from mariotte.models.step import prepare_once
from mariotte.testing.methods import context_of, logits, overflowing, run
from mariotte.testing.tiny import random_tokens, tiny


def test_saliences_by_hand():
    weight, gradient = torch.tensor([[2.0, -1.0]]), torch.tensor([[3.0, 4.0]])
    square = torch.tensor([[10.0, 20.0]])
    found = {t: salience(weight, gradient, square, t).tolist() for t in ("param_first", "param_second", "vectorize")}
    assert found == {"param_first": [[6.0, 4.0]], "param_second": [[40.0, 20.0]], "vectorize": [[6.0, -4.0]]}
    # |6 - 20|, |-4 - 10|
    assert salience(weight, gradient, square, "param_mix").tolist() == [[14.0, 14.0]]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradients_are_autograds_of_the_mean_loss(family, tmp_path):
    model, tokens = tiny(family), random_tokens(5, 12)
    matrices = {"up": model.blocks[0].up, "key": model.blocks[1].key}
    context = context_of(model, tmp_path, tokens)
    first, second = weight_gradients(model, context, "llm-pruner", matrices, squared=True)
    once, none = weight_gradients(model, context, "llm-pruner", matrices)
    rows = [model.hf(input_ids=row[None], labels=row[None]).loss for row in tokens]
    for name, matrix in matrices.items():
        of_rows = torch.stack([torch.autograd.grad(loss, matrix.weight, retain_graph=True)[0] for loss in rows])
        torch.testing.assert_close(first[name], of_rows.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(once[name], of_rows.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(second[name], of_rows.square().mean(0), rtol=1e-4, atol=1e-9)
    assert none == {}
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_frozen_weights_are_measured_too_and_stay_frozen(tmp_path):
    model = tiny("llama")
    model.hf.requires_grad_(False)
    assert run(LLMPruner(), model, 0.5, tmp_path).done
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())


@pytest.mark.parametrize("taylor", ["param_first", "vectorize"])
def test_the_importance_of_a_neuron_is_that_of_its_weights(taylor, tmp_path):
    """Weight times gradient, summed over what goes with the neuron, by plain autograd."""
    model, tokens = tiny("llama"), random_tokens()
    loss = token_loss(model, tokens)
    block = model.blocks[1]
    parts = [block.gate.weight, block.up.weight, block.down.weight]
    gate, up, down = (w * g for w, g in zip(parts, torch.autograd.grad(loss, parts), strict=True))
    if taylor == "param_first":
        expected = gate.abs().sum(1) + up.abs().sum(1) + down.abs().sum(0)
    else:
        expected = gate.sum(1).abs() + up.sum(1).abs() + down.sum(0).abs()
    context = context_of(model, tmp_path, tokens)
    prepared = prepare_once(LLMPruner(taylor=taylor), model, context, [0.5]).get("block-1")
    torch.testing.assert_close(prepared["ffn"], expected.detach(), rtol=1e-4, atol=1e-7)


def test_the_importance_of_a_head_is_that_of_its_weights(tmp_path):
    model, tokens = tiny("qwen2"), random_tokens()
    block = model.blocks[0]
    parts = [block.query.weight, block.key.weight, block.value.weight, block.output.weight]
    gradients = torch.autograd.grad(token_loss(model, tokens), parts)
    query, key, value, output = ((w * g).abs().detach() for w, g in zip(parts, gradients, strict=True))
    prepared = prepare_once(LLMPruner(), model, context_of(model, tmp_path, tokens), [0.5]).get("block-0")["attention"]
    for group in range(2):
        rows, shared = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
        whole = query[rows].sum() + output[:, rows].sum() + key[shared].sum() + value[shared].sum()
        torch.testing.assert_close(prepared[2 * group : 2 * group + 2].sum(), whole, rtol=1e-4, atol=1e-6)
    apart = query[:8].sum() + output[:, :8].sum() - query[8:16].sum() - output[:, 8:16].sum()
    torch.testing.assert_close(prepared[0] - prepared[1], apart, rtol=1e-3, atol=1e-5)


def token_loss(model, tokens):
    logits_BTV = model.logits(tokens)[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten())


def test_whole_groups_go_until_one_is_left():
    assert ranked_heads(torch.tensor([1.0, 9.0, 4.0, 5.0, 3.0, 2.0]), 3) == [1, 0, 3, 2, 4, 5]
    assert ranked_heads(torch.tensor([1.0, 9.0, 4.0]), 3) == [1, 2, 0]
    assert ranked_heads(torch.tensor([1.0, 9.0, 9.0]), 1) == [1, 2, 0]


@torch.no_grad()
def test_groups_that_go_are_groups_that_give_nothing(tmp_path):
    model = tiny("qwen2", hidden=24, heads=6, kv_heads=2, head_dim=6)
    step, context = LLMPruner(round_to=1), context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.5])
    for amount in (0.2, 0.5, 0.9):
        cut = step.apply(model, prepared, amount, context)
        heads, ffn = cut.shape.heads, cut.shape.ffn
        zeroed = model.copy()
        for index, block in enumerate(zeroed.blocks):
            tensors = prepared.get(f"block-{index}")
            for head in ranked_heads(tensors["attention"], 2)[heads:]:
                block.output.weight[:, 6 * head : 6 * head + 6] = 0
            block.down.weight[:, tensors["ffn"].argsort(descending=True, stable=True)[ffn:]] = 0
        torch.testing.assert_close(logits(cut), logits(zeroed), rtol=1e-4, atol=1e-4)
    assert step.apply(model, prepared, 0.5, context).done[-1].facts["heads"] == [6, 3]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_spared_blocks_keep_their_sizes(family, tmp_path):
    model = tiny(family, layers=4, tied=True)
    step = LLMPruner(first=1, last=1)
    cut = run(step, model, 0.5, tmp_path / "prepared")
    assert cut.shape.ffns == (48, 24, 24, 48)
    assert cut.shape.attentions == ((4, 2), (2, 1), (2, 1), (4, 2))
    assert cut.measured_params() == cut.counts.n_params == model.counts.n_params - step.removes(model, 0.5)
    (done,) = cut.done
    assert (done.obtained, done.facts["blocks"]) == (0.5, [1, 3])
    loaded = load(checkpoint.save(cut, tmp_path / "saved"))
    assert loaded.shape == cut.shape
    torch.testing.assert_close(logits(loaded), logits(cut), rtol=1e-4, atol=1e-4)
    prompt = random_tokens(2, 6)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(loaded.hf.generate(prompt, **given, use_cache=cached) for cached in (True, False)))
    assert not step.makes_plain(model)
    assert LLMPruner().makes_plain(model)
    assert float(token_nll(cut, random_tokens()).mean()) > 0


def test_an_eighth_and_a_sixteenth_are_spared(tmp_path):
    step = LLMPruner()
    assert [step._pruned(tiny("llama", layers=n, hidden=8, heads=1, kv_heads=1, ffn=8)) for n in (2, 7, 8, 16, 32)] == [
        range(2),
        range(7),
        range(1, 8),
        range(2, 15),
        range(4, 30),
    ]


@pytest.mark.parametrize("scope", ["attention", "ffn"])
def test_a_scope_leaves_the_rest_alone(scope, tmp_path):
    model = tiny("qwen2")
    cut = run(LLMPruner(scope=scope), model, 0.5, tmp_path)
    assert (cut.shape.heads, cut.shape.ffn) == ((2, 48) if scope == "attention" else (4, 24))
    other = "ffn" if scope == "attention" else "attention"
    for before, after in zip(model.blocks, cut.blocks, strict=True):
        for old, new in zip(getattr(before, other), getattr(after, other), strict=True):
            assert torch.equal(old.weight, new.weight)
    assert cut.done[-1].obtained == 0.5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"taylor": "third"}, "taylor must be one of param_first, param_second, param_mix, vectorize, got 'third'"),
        ({"first": -1}, "first must be a number of blocks, got -1"),
        ({"round_to": 0}, "round_to must be a positive number of neurons, got 0"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(ChainError, match=words):
        LLMPruner(**fields)


def test_what_it_cannot_do_is_said(tmp_path):
    assert "spares all 2 blocks of this model: ask for fewer" in (
        LLMPruner(first=1, last=1).refuse(tiny("llama")) or ""
    )
    other = tiny("gpt_neox", layers=3)
    other.entry = dataclasses.replace(other.entry, model_type="other", head_dim="head_dim")
    assert LLMPruner(first=1).refuse(other) == (
        "spares 1 blocks, so that it needs a class for blocks of different sizes, and other has none: ask for "
        "first=0 and last=0"
    )
    with pytest.raises(DataError, match="llm-pruner needs calibration rows of at least 2 tokens"):
        run(LLMPruner(), tiny("llama"), 0.5, tmp_path, random_tokens(8, 1))
    with pytest.raises(
        ModelError, match=r"llm-pruner found gradients that are not finite in block-0 .* of tiny-llama: "
    ):
        run(LLMPruner(), overflowing(tiny("llama")), 0.5, tmp_path)


def test_neurons_of_a_matrix_that_holds_gate_and_up():
    model = tiny("llama")
    block = model.blocks[0]
    saliences = [torch.rand(48, 32), torch.rand(48, 32), torch.rand(32, 48)]
    expected = saliences[0].sum(1) + saliences[1].sum(1) + saliences[2].sum(0)
    torch.testing.assert_close(neuron_importance(block, saliences), expected)


@torch.no_grad()
def test_added_biases_are_added(tmp_path):
    model = tiny("qwen2")
    added = [(torch.full((32,), 0.5), None), (None, torch.arange(32.0))]
    cut = keep_groups(model, None, None, irregular=True, biases=added)
    assert cut.measured_params() == cut.counts.n_params == model.counts.n_params + 4 * 32
    assert [float(block.output.bias.sum()) for block in cut.blocks] == [16.0, 0.0]
    assert [float(block.down.bias.sum()) for block in cut.blocks] == [0.0, 496.0]
    loaded = load(checkpoint.save(cut, tmp_path / "saved"))
    assert (loaded.shape, loaded.counts) == (cut.shape, cut.counts)
    torch.testing.assert_close(logits(loaded), logits(cut))


@pytest.mark.parametrize("sizes", [{}, {"hidden": 64, "heads": 8, "kv_heads": 8, "ffn": 128}, {"kv_heads": 1}])
@pytest.mark.parametrize("scope", ["all", "ffn", "attention"])
def test_of_equal_cuts_the_nearest_is_taken_and_more_is_never_less(sizes, scope):
    """Heads serve the amounts that they are nearest to, and neurons make up for what these leave."""
    model = tiny("qwen2", **sizes)
    before, removed = model.shape, []
    for amount in [place / 50 for place in range(50)]:
        after, off = equal_shape(model, amount, scope, None)
        removed.append(removed_share(before, after, scope))
        assert abs(removed[-1] - amount) <= off
        if scope == "ffn":
            widths = range(8, before.ffn + 1, 8)
            others = [removed_share(before, dataclasses.replace(before, ffn=ffn), scope) for ffn in widths]
            assert abs(removed[-1] - amount) == pytest.approx(min(abs(share - amount) for share in others))
        if scope == "all" and 0.2 < amount < 0.7:  # where there are neurons left to make up for heads
            multiple = removed_share(before, dataclasses.replace(before, ffn=before.ffn - 8), scope)
            assert abs(removed[-1] - amount) <= multiple / 2 + 1e-9
    assert removed == sorted(removed)
    assert removed[0] == 0


def test_it_is_said_when_the_nearest_is_far(tmp_path):
    model = tiny("qwen2")
    step = LLMPruner(scope="attention", first=0, last=0)
    near, far = (run(step, model, amount, tmp_path / str(amount)).done[-1] for amount in (0.5, 0.3))
    assert "warning" not in near.facts
    assert far.facts["warning"].startswith("50.0% went and not 30.0%: whole heads")

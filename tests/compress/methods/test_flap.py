"""FLAP: the metric and the biases by hand, what goes first, and sizes that differ by block."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mariotte.compress.methods.flap import FLAP, first_to_go, fluctuation, standardised
from mariotte.compress.scope import oriented
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.step import apply_at, prepare_once
from mariotte.testing.methods import MethodConformance, cases, context_of, logits, overflowing, run
from mariotte.testing.tiny import random_tokens, tiny


@pytest.mark.parametrize(
    ("step", "family"), cases([FLAP(uniform=True)], ["qwen2"]), ids=lambda v: v if isinstance(v, str) else str(v.link())
)
class TestUniform(MethodConformance):
    pass


OTHERS = ("gemma2", "gemma3_text", "phi", "phi3", "falcon", "gpt2", "opt", "gpt_neox")
"""Families with parts of their own; of olmo2 heads do not go exactly, whose queries are normalised all together."""


def test_the_metric_by_hand():
    # Two inputs over three tokens: (1, 2), (3, 2), (5, 2); the second never changes.
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 3.0], [-2.0, 1.0]])
    given = weight, x.mean(0), x.square().mean(0)
    torch.testing.assert_close(fluctuation(*given, "IFV"), torch.tensor([8 / 3, 0.0], dtype=torch.float64))
    torch.testing.assert_close(fluctuation(*given, "WIFV"), torch.tensor([8 / 3 * 5, 0.0], dtype=torch.float64))
    expected = torch.tensor([1.5 * (35 / 3) ** 0.5, 2.0 * 2.0], dtype=torch.float64)
    torch.testing.assert_close(fluctuation(*given, "WIFN"), expected)


def test_scores_are_standardised():
    found = standardised(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / 7**0.5)
    assert standardised(torch.full((3,), 2.0)).tolist() == [0.0, 0.0, 0.0]
    assert standardised(torch.ones(1)).tolist() == [0.0]


def test_what_goes_first():
    score, size = torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([5.0, 10.0, 4.0, 1.0])
    # In order: the second (10), the fourth (1), the third (4), the first (5).
    for target, gone in ((0, []), (4.9, []), (5.1, [1]), (10.6, [1, 3]), (13.1, [1, 2, 3]), (99, [0, 1, 2, 3])):
        assert first_to_go(score, size, target).nonzero().flatten().tolist() == gone


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_statistics_are_those_of_the_inputs(family, tmp_path):
    model, tokens = tiny(family), random_tokens()
    block = model.blocks[1]
    seen = {}
    handles = [
        matrix.register_forward_pre_hook(lambda _m, x, name=name: seen.update({name: x[0].double().flatten(0, 1)}))
        for name, matrix in (("attention", block.output), ("ffn", block.down))
    ]
    model.logits(tokens)
    for handle in handles:
        handle.remove()
    found = prepare_once(FLAP(), model, context_of(model, tmp_path, tokens), [0.5]).get("block-1")
    for name, matrix, power in (("attention", block.output, 2), ("ffn", block.down, 1)):
        x = seen[name]
        metric = (x.var(0, correction=0) * matrix.weight.double().square().sum(0)) ** power
        torch.testing.assert_close(found[name], metric, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found[f"mean {name}"], x.mean(0), rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", *OTHERS])
@pytest.mark.parametrize("compensate", [True, False])
def test_groups_that_go_give_their_mean(family, compensate, tmp_path):
    """The cut model is the uncut one whose matrices read the mean where they read a group that went."""
    model, tokens = tiny(family, layers=3), random_tokens()
    step, context = FLAP(compensate=compensate), context_of(model, tmp_path / "prepared", tokens)
    prepared = prepare_once(step, model, context, [0.4])
    cut = step.apply(model, prepared, 0.4, context)
    masked = model.copy()
    found = [prepared.get(f"block-{index}") for index in range(3)]
    heads, neurons = step._adaptive(model, found, 0.4)
    assert len({len(some) for some in (*heads, *neurons)}) > 2, "sizes do not differ by block"
    for block, tensors, some_heads, some_neurons in zip(masked.blocks, found, heads, neurons, strict=True):
        columns = [8 * head + i for head in some_heads for i in range(8)]
        for part, matrix, kept in (("attention", block.output, columns), ("ffn", block.down, some_neurons)):
            inputs = oriented(matrix).shape[1]
            mean = tensors[f"mean {part}"].float() if compensate else torch.zeros(inputs)
            stays = torch.zeros(inputs, dtype=torch.bool)
            stays[kept] = True
            matrix.register_forward_pre_hook(lambda _m, x, stays=stays, mean=mean: (torch.where(stays, x[0], mean),))
    torch.testing.assert_close(logits(cut), logits(masked), rtol=1e-4, atol=1e-4)
    assert cut.measured_params() == cut.counts.n_params
    per_group = model.shape.heads // model.shape.kv_heads if model.shape.kv_heads > 1 else 0
    assert cut.shape.attentions == tuple((len(some), len(some) // per_group if per_group else 1) for some in heads)
    assert cut.shape.ffns == tuple(len(some) for some in neurons)
    loaded = load(checkpoint.save(cut, tmp_path / "saved"))
    assert (loaded.shape, loaded.counts) == (cut.shape, cut.counts)
    prompt = random_tokens(2, 6)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(loaded.hf.generate(prompt, **given, use_cache=cached) for cached in (True, False)))


@torch.no_grad()
def test_biases_help_where_inputs_have_a_mean(tmp_path):
    model, tokens = tiny("llama", layers=3), random_tokens(64, 24)
    dense = model.logits(tokens)
    errors = [
        float((run(FLAP(compensate=given), model, 0.3, tmp_path / str(given), tokens).logits(tokens) - dense).norm())
        for given in (True, False)
    ]
    assert errors[0] < errors[1]


@torch.no_grad()
def test_uniform_biases_go_where_the_family_has_some(tmp_path):
    model = tiny("opt")
    step = FLAP(uniform=True, scope="ffn")
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.5])
    cut = step.apply(model, prepared, 0.5, context)
    assert cut.shape.ffn == 24
    found = [prepared.get(f"block-{index}") for index in range(2)]
    _, neurons = step._uniform(model, found, 0.5)
    for before, after, tensors, kept in zip(model.blocks, cut.blocks, found, neurons, strict=True):
        gone = [neuron for neuron in range(48) if neuron not in kept]
        expected = before.down.bias.double() + before.down.weight[:, gone].double() @ tensors["mean ffn"][gone]
        torch.testing.assert_close(after.down.bias.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(before.output.bias, after.output.bias)
    plain = run(FLAP(uniform=True), tiny("llama"), 0.5, tmp_path / "plain")
    assert not plain.entry.irregular
    assert all(block.down.bias is None for block in plain.blocks)


def test_a_share_of_the_models_parameters_is_had_to_within_a_part(tmp_path):
    model = tiny("qwen2", layers=4, hidden=48, heads=6, kv_heads=3, ffn=96)
    step = FLAP(of="model", round_to=1)
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.2])
    for share in (0.1, 0.2, 0.3):
        cut = apply_at(step, model, prepared, share, context)
        off = abs(model.measured_params() - cut.measured_params() - share * model.measured_params())
        assert off <= step.slack(model) < 0.1 * model.measured_params()
        assert cut.done[-1].obtained == pytest.approx(share, abs=step.slack(model) / model.measured_params())
    with pytest.raises(ChainError, match="flap can remove at most"):
        apply_at(step, model, prepared, 0.99, context)


def test_a_single_key_value_head_loses_query_heads(tmp_path):
    model = tiny("llama", layers=3, kv_heads=1)
    cut = run(FLAP(scope="attention"), model, 0.4, tmp_path)
    assert cut.shape.attentions is not None
    assert {groups for _, groups in cut.shape.attentions} == {1}
    assert sum(heads for heads, _ in cut.shape.attentions) < 12
    assert cut.shape.ffns is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"metric": "variance"}, "metric must be one of WIFV, IFV, WIFN, got 'variance'"),
        ({"round_to": 0}, "round_to must be a positive number of neurons, got 0"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(ChainError, match=words):
        FLAP(**fields)


def test_what_it_cannot_do_is_said(tmp_path):
    other = tiny("gpt_neox")
    other.entry = dataclasses.replace(other.entry, model_type="other")
    assert FLAP().refuse(other) == (
        "needs a class for blocks of different sizes, and other has none: ask for uniform=true"
    )
    assert FLAP(uniform=True, scope="ffn").refuse(tiny("gpt_neox")) is None
    assert "scores that do (ALiBi)" in str(FLAP().refuse(tiny("falcon", alibi=True)))
    assert FLAP(scope="ffn").refuse(tiny("falcon", alibi=True)) is None
    with pytest.raises(DataError, match="flap needs at least 2 calibration tokens"):
        run(FLAP(), tiny("llama"), 0.5, tmp_path, random_tokens(1, 1))
    with pytest.raises(ModelError, match=r"flap found activations that are not finite in .* of tiny-llama: check"):
        run(FLAP(), overflowing(tiny("llama")), 0.5, tmp_path)

"""Random neurons: exact counts, nested cuts, a uniform draw that depends on seed and block alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from mariotte.compress.methods.prunenet import PruneNet
from mariotte.compress.methods.prunenet_random import PruneNetRandom
from mariotte.compress.methods.slicegpt import SliceGPT
from mariotte.compress.surgery import derive, parameter_names
from mariotte.errors import ChainError
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.step import prepare_once
from mariotte.testing.methods import MethodConformance, cases, context_of, logits
from mariotte.testing.tiny import random_tokens, tiny

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


def cut(step, model, amount, folder, seed=0, calibration=None):
    context = replace(context_of(model, folder), seed=seed, calibration=calibration)
    return step.apply(model, prepare_once(step, model, context, [amount]), amount, context)


def kept_neurons(model, result):
    """Places of the kept rows in the model that they come from, block by block."""
    found = []
    for before, after in zip(model.blocks, result.blocks, strict=True):
        equal = (after.up.weight[:, None] == before.up.weight[None]).all(-1)
        assert (equal.sum(1) == 1).all()
        found.append(equal.int().argmax(1).tolist())
    return found


def test_rows_biases_and_columns_go_together(tmp_path):
    model = tiny("llama", mlp_bias=True)
    result = cut(PruneNetRandom(), model, 0.5, tmp_path)
    for before, after, kept in zip(model.blocks, result.blocks, kept_neurons(model, result), strict=True):
        assert kept == sorted(kept)
        assert len(kept) == 24
        assert torch.equal(after.gate.weight, before.gate.weight[kept])
        assert torch.equal(after.gate.bias, before.gate.bias[kept])
        assert torch.equal(after.up.bias, before.up.bias[kept])
        assert torch.equal(after.down.weight, before.down.weight[:, kept])
        assert torch.equal(after.down.bias, before.down.bias)
    assert result.shape.ffn == 24
    assert result.done[-1].facts == {"ffn": [48, 24], "rounding": 8}


@pytest.mark.parametrize(
    ("round_to", "widths"),
    [(None, [64, 48, 40, 24, 8]), (1, [65, 50, 36, 22, 7]), (32, [64, 64, 32, 32, 32])],
)
def test_counts_are_exact_and_rounding_is_recorded(round_to, widths, tmp_path):
    model = tiny("qwen2", ffn=72)
    for ratio, width in zip(RATIOS, widths, strict=True):
        result = cut(PruneNetRandom(round_to=round_to), model, ratio, tmp_path)
        assert {block.down.weight.shape[1] for block in result.blocks} == {width}
        assert result.done[-1].facts["rounding"] == (round_to or 8)
        assert result.done[-1].obtained == 1 - width / 72


def test_larger_cuts_are_subsets_of_smaller_ones(tmp_path):
    model = tiny("llama", ffn=80)
    results = [kept_neurons(model, cut(PruneNetRandom(), model, ratio, tmp_path)) for ratio in RATIOS]
    for milder, harder in itertools.pairwise(results):
        for block_milder, block_harder in zip(milder, harder, strict=True):
            assert set(block_harder) < set(block_milder)


def test_seed_and_block_alone_decide(tmp_path):
    model, other = tiny("llama", seed=0), tiny("qwen2", seed=1, hidden=16)
    first = kept_neurons(model, cut(PruneNetRandom(), model, 0.5, tmp_path / "a"))
    assert first == kept_neurons(other, cut(PruneNetRandom(round_to=8), other, 0.5, tmp_path / "b"))
    assert first[0] != first[1]
    assert first != kept_neurons(model, cut(PruneNetRandom(), model, 0.5, tmp_path / "c", seed=1))


def test_every_neuron_is_as_likely_to_stay(tmp_path):
    model = tiny("llama", layers=50)
    draws = torch.zeros(48)
    for seed in range(4):
        context = replace(context_of(model, tmp_path / str(seed)), seed=seed)
        prepared = prepare_once(PruneNetRandom(), model, context, RATIOS)
        for index in range(50):
            draws[prepared.get(f"block-{index}")["order"][:24]] += 1
    # 200 draws of one half: mean 100, standard deviation 7.
    assert 65 < draws.min() <= draws.max() < 135
    chi_squared = float(((draws - 100).square() / 50).sum() * 47 / 48)
    assert chi_squared < 80  # 47 degrees of freedom: 0.2 % lie above


def test_it_works_on_a_model_with_shortcuts(tmp_path):
    sliced = cut(SliceGPT(), tiny("llama", mlp_bias=True), 0.25, tmp_path / "sliced", calibration=random_tokens())
    result = cut(PruneNetRandom(), sliced, 0.5, tmp_path / "cut")
    assert result.shape == replace(sliced.shape, ffn=24)
    assert result.measured_params() == result.counts.n_params
    assert result.measured_params() == sliced.measured_params() - PruneNetRandom().removes(sliced, 0.5)
    loaded = load(checkpoint.save(result, tmp_path / "saved"))
    assert torch.allclose(logits(loaded), logits(result), atol=1e-4)


def test_blocks_of_unequal_width_are_refused():
    model = tiny("llama")
    names, kept = parameter_names(model), {0: 40, 1: 48}
    weights = {names[block.down.weight]: block.down.weight[:, : kept[i]] for i, block in enumerate(model.blocks)}
    for i, block in enumerate(model.blocks):
        weights |= {names[linear.weight]: linear.weight[: kept[i]] for linear in block.ffn[:-1]}
    unequal = derive(model, weights, {"ffn_sizes": [40, 48]}, irregular=True)
    assert unequal.shape.ffns == (40, 48)
    for step in (PruneNetRandom(), PruneNet()):
        assert "the blocks of this model differ in width" in step.refuse(unequal)
        assert step.refuse(model) is None


def test_round_to_must_be_positive():
    with pytest.raises(ChainError, match="round_to must be a positive number of neurons, got 0"):
        PruneNetRandom(round_to=0)


@pytest.mark.parametrize(("step", "family"), cases([PruneNetRandom(round_to=1)], ["qwen2"]))
class TestPublishedWidths(MethodConformance):
    pass

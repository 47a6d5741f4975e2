"""LaCo: the formula by hand, thresholds that are found, and amounts that are reached."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mariotte.compress.methods.laco import LaCo, collapses, merged
from mariotte.compress.methods.svd_llm import SVDLLM
from mariotte.cuts.blocks import refuse_merging
from mariotte.errors import ChainError, ModelError
from mariotte.models.step import prepare_once
from mariotte.testing.methods import context_of, logits, overflowing, run
from mariotte.testing.tiny import random_tokens, tiny, weights_hash


def test_the_formula_by_hand():
    # θ + (θ1 - θ) + (θ2 - θ) = θ1 + θ2 - θ
    assert merged(4, [(1, 2)], "difference") == {0: {0: 1}, 1: {1: -1, 2: 1, 3: 1}}
    # Two blocks: θ + (θ1 - θ) = θ1, whatever the rule.
    assert merged(2, [(0, 1)], "difference") == merged(2, [(0, 1)], "last") == {0: {1: 1}}
    # A block that was merged counts as what it is now.
    assert merged(5, [(2, 2), (0, 2)], "difference") == {0: {0: -1, 1: 1, 2: -1, 3: 1, 4: 1}}
    assert merged(5, [(2, 2), (0, 2)], "last") == {0: {4: 1}}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_parameters_are_the_sum_of_differences(family, tmp_path):
    model = tiny(family, layers=4)
    cut = run(LaCo(together=3, threshold=-1.0), model, 0.5, tmp_path)
    (done,) = cut.done
    assert done.facts["merged"] == {"0": {"0": -1, "1": 1, "2": 1}}
    first, second, third, fourth = (dict(block.module.named_parameters()) for block in model.blocks)
    for name, found in cut.blocks[0].module.named_parameters():
        start = first[name].double()
        if "norm" in name:
            assert torch.equal(found.double(), start)
            continue
        expected = start + (second[name].double() - start) + (third[name].double() - start)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(found, fourth[name]) for name, found in cut.blocks[1].module.named_parameters())


def test_the_walk_by_hand():
    """Runs of two, seven blocks: which merges are tried, and kept, over a threshold."""
    tried = []

    def similarity(merges):
        tried.append(tuple(merges))
        return {((4, 1),): 0.9, ((4, 1), (2, 1)): 0.4, ((4, 1), (1, 1)): 0.8}.get(tuple(merges), 0.3)

    assert collapses(similarity, 7, 2, 0.5, 2, 2) == [(4, 1), (1, 1)]
    assert tried == [((4, 1),), ((4, 1), (2, 1)), ((4, 1), (1, 1))]
    # Nothing is merged over a threshold that nothing reaches, and a run is cut short where it would remove too much.
    assert collapses(similarity, 7, 2, 0.95, 2, 2) == []
    assert collapses(lambda merges: 1.0, 7, 2, 0.5, 4, 2) == [(2, 2)]


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 12, 33])
@pytest.mark.parametrize(("together", "apart"), [(2, 1), (4, 2), (7, 1), (3, 9)])
def test_any_number_of_blocks_can_go(layers, together, apart):
    for gone in range(layers):
        merges = collapses(lambda merges: -1.0, layers, gone, -1.001, together, apart)
        runs = merged(layers, merges, "difference")
        assert len(runs) == layers - gone
        assert all(sum(shares.values()) == 1 for shares in runs.values())  # it is an affine combination
        # Only the run that reaches the amount may be cut short, and those that start near the end.
        assert all(1 <= behind < together for _, behind in merges)


def test_the_threshold_is_the_highest_that_reaches_the_amount(tmp_path):
    model = tiny("llama", layers=6)
    step, context = LaCo(together=2, apart=1), context_of(model, tmp_path / "found")
    prepared = prepare_once(step, model, context, [0.5])
    found = step.apply(model, prepared, 0.5, context)
    threshold = found.done[-1].facts["threshold"]
    assert found.shape.layers == 3
    given = LaCo(together=2, apart=1, threshold=threshold - 1e-6)
    same = run(given, model, 0.5, tmp_path / "given")
    assert weights_hash(same) == weights_hash(found)
    assert found.done[-1].facts["similarity"] > threshold
    above = LaCo(together=2, apart=1, threshold=threshold + 2**-9)
    with pytest.raises(ChainError, match=r"laco merges away \d of 6 blocks over a threshold of .*: ask for at most"):
        run(above, model, 0.5, tmp_path / "above")


@torch.no_grad()
def test_the_similarity_is_that_of_the_streams_behind_the_norm(tmp_path):
    model, tokens = tiny("qwen2", layers=4), random_tokens(6, 10)
    cut = run(LaCo(), model, 0.25, tmp_path, tokens)
    finals = [m.hf.model(input_ids=tokens)[0].double().flatten(1) for m in (model, cut)]
    expected = float(torch.nn.functional.cosine_similarity(*finals).mean())
    assert cut.done[-1].facts["similarity"] == pytest.approx(expected, abs=1e-6)


def test_merges_of_other_amounts_are_kept(tmp_path):
    model, step = tiny("llama", layers=4), LaCo()
    context = context_of(model, tmp_path)
    first = dict(prepare_once(step, model, context, [0.25]).facts["merges"])
    both = prepare_once(step, model, context, [0.25, 0.5]).facts["merges"]
    assert context.counters.preparations == 2
    assert set(first) < set(both)
    assert [list(merge) for merge in both["1"]["merges"]] == [list(merge) for merge in first["1"]["merges"]]


@torch.no_grad()
def test_a_merged_model_generates_with_a_cache(tmp_path):
    cut = run(LaCo(rule="last"), tiny("qwen2", layers=4), 0.5, tmp_path)
    prompt = random_tokens(2, 6)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    made = [cut.hf.generate(prompt, **given, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made)
    assert bool(logits(cut).isfinite().all())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"threshold": 1.0}, r"threshold must be a cosine in \[-1, 1\), such as 0.65, got 1.0"),
        ({"together": 1}, "together must be at least 2 blocks, got 1"),
        ({"apart": 0}, "apart must be at least 1 block, got 0"),
        ({"rule": "mean"}, "rule must be difference or last, got 'mean'"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(ChainError, match=words):
        LaCo(**fields)


def test_blocks_of_other_parameters_and_numbers_that_are_not_finite(tmp_path):
    model = tiny("llama")
    with pytest.raises(ModelError, match="laco found activations that are not finite in the uncut stream of tiny-llam"):
        run(LaCo(), overflowing(tiny("llama")), 0.5, tmp_path)
    model.blocks[1].module.mlp.extra = torch.nn.Linear(2, 2)
    assert "needs blocks with equal parameters to merge" in (LaCo().refuse(model) or "")


def test_of_products_blocks_are_taken_as_they_are_and_not_added(tmp_path):
    factored = run(SVDLLM(), tiny("llama", layers=4), 0.5, tmp_path / "factored")
    assert len(set(factored.shape.ranks or ())) == 1
    assert "the factors' sums make another product than the sum: do it before svd-llm" in str(LaCo().refuse(factored))
    cut = run(LaCo(rule="last"), factored, 0.25, tmp_path / "cut")
    ((first, shares),) = cut.done[-1].facts["merged"].items()
    (last,) = shares
    merged, taken = (
        dict(block.module.named_parameters()) for block in (cut.blocks[int(first)], factored.blocks[int(last)])
    )
    assert all(torch.equal(merged[name], taken[name]) for name in taken if "norm" not in name)
    assert cut.measured_params() == cut.counts.n_params
    model = tiny("llama", layers=3)
    narrow = SimpleNamespace(entry=model.entry, shape=dataclasses.replace(model.shape, widths=((4, 8),) * 3))
    assert "the dimensions of each block's heads are its own" in str(refuse_merging(narrow, "last"))

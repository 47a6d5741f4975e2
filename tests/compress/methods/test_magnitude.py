"""Magnitude pruning: exact counts, stable ties, one threshold or one a matrix."""

from __future__ import annotations

import itertools

import pytest
import torch

from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.sparsity import smallest
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models.step import Context, prepare_once
from mariotte.testing.methods import MethodConformance, cases, context_of, overflowing
from mariotte.testing.tiny import random_tokens, tiny, weights_hash


def test_smallest_by_hand():
    first, second = smallest([torch.tensor([[3.0, -1.0], [0.5, 2.0]]), torch.tensor([-0.25, 4.0])], 3)
    assert first.tolist() == [[False, True], [True, False]]
    assert second.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_smallest_equals_a_stable_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that there are many ties; one tensor with zeros of both signs.
    weights = [(torch.randn(n, 7, generator=generator) * 4).round().div(4).to(dtype) for n in (5, 1, 9)]
    weights[1][0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    flat = torch.cat([weight.flatten() for weight in weights]).double().abs()
    order = flat.argsort(stable=True)
    for count in range(len(flat) + 1):
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[order[:count]] = True
        found = torch.cat([mask.flatten() for mask in smallest(weights, count)])
        assert torch.equal(found, expected), count


def cut(step, model, amount, folder, tokens=None):
    context = context_of(model, folder, tokens)
    return step.apply(model, prepare_once(step, model, context, [amount]), amount, context)


@pytest.mark.parametrize("scope", ["all", "attention", "ffn"])
def test_only_the_scope_is_touched_and_the_count_is_exact(scope, tmp_path):
    model = tiny("qwen2", tied=True)
    result = cut(Magnitude(scope=scope), model, 0.37, tmp_path)
    (done,) = result.done
    in_scope = {"attention": 2 * 32 * (2 * 32 + 2 * 16), "ffn": 2 * 3 * 32 * 48}
    assert done.in_scope == (sum(in_scope.values()) if scope == "all" else in_scope[scope])
    assert done.zeros == round(0.37 * done.in_scope) == result.zeros()
    for block in result.blocks:
        assert all(bool((m.weight == 0).any()) == (scope in ("all", "attention")) for m in block.attention)
        assert all(bool((m.weight == 0).any()) == (scope in ("all", "ffn")) for m in block.ffn)
    assert torch.equal(result.embeddings.weight, model.embeddings.weight)
    assert result.head.weight is result.embeddings.weight


def test_one_threshold_for_the_model_or_the_same_share_of_each_matrix(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.blocks[1].up.weight *= 0.01
    together = cut(Magnitude(), model, 0.2, tmp_path / "a")
    assert (together.blocks[1].up.weight == 0).all()
    each = cut(Magnitude(per="layer"), model, 0.2, tmp_path / "b")
    for block in each.blocks:
        for matrix in (*block.attention, *block.ffn):
            assert int((matrix.weight == 0).sum()) == round(0.2 * matrix.weight.numel())


def test_zeros_are_nested_across_amounts(tmp_path):
    model = tiny("llama")
    masks = [
        [m.weight == 0 for b in cut(Magnitude(), model, a, tmp_path).blocks for m in (*b.attention, *b.ffn)]
        for a in (0.2, 0.5, 0.8)
    ]
    for fewer, more in itertools.pairwise(masks):
        assert all(bool((m | ~f).all()) for f, m in zip(fewer, more, strict=True))


def test_what_is_zero_already_counts(tmp_path):
    once = cut(Magnitude(), tiny("llama"), 0.3, tmp_path)
    twice = cut(Magnitude(), once, 0.5, tmp_path)
    assert twice.zeros() == round(0.5 * twice.done[-1].in_scope)


def test_links_name_scope_and_fields_only_when_they_are_not_the_defaults():
    assert str(Magnitude().link(0.5)) == "magnitude@0.5"
    assert str(Magnitude(scope="attention", per="layer").link(0.5)) == "magnitude@0.5:attention(per=layer)"
    assert Magnitude(scope="all") == Magnitude()


def test_fields_are_checked():
    with pytest.raises(ChainError, match="magnitude: per must be one of model, layer, got 'row'"):
        Magnitude(per="row")
    with pytest.raises(ChainError, match="magnitude has no scope 'embeddings'; it has all, attention, ffn, head"):
        Magnitude(scope="embeddings")


@pytest.mark.parametrize("allocation", ["influence", "greedy"])
def test_blocks_lose_different_shares_and_the_whole_is_exact(allocation, tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        for matrix in (model.blocks[1].output, model.blocks[1].down):
            matrix.weight.mul_(0.01)  # what it writes hardly matters, so that it can lose more
    step = Magnitude(per="layer", allocation=allocation)
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.2, 0.5])
    for amount in (0.2, 0.37, 0.5):
        result = step.apply(model, prepared, amount, context)
        (done,) = result.done
        assert done.zeros == result.zeros() == round(amount * done.in_scope) == step.removes(model, amount)
        first, second = done.facts["shares"]
        assert first < second
        for share, block in zip((first, second), result.blocks, strict=True):
            for matrix in (*block.attention, *block.ffn):
                assert abs(int((matrix.weight == 0).sum()) - share * matrix.weight.numel()) <= 1.01


def test_a_greedy_preparation_serves_smaller_amounts_and_is_made_anew_for_larger(tmp_path):
    model, step = tiny("llama"), Magnitude(per="layer", allocation="greedy")
    context = context_of(model, tmp_path)
    small = step.apply(model, prepare_once(step, model, context, [0.2]), 0.2, context)
    prepare_once(step, model, context, [0.1])
    assert context.counters.preparations == 1
    again = step.apply(model, prepare_once(step, model, context, [0.4]), 0.2, context)
    assert context.counters.preparations == 2
    assert weights_hash(small) == weights_hash(again)


def test_allocations_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ChainError, match="allocation=influence needs per=layer"):
        Magnitude(allocation="influence")
    with pytest.raises(ChainError, match="allocation must be one of uniform, influence, greedy"):
        Magnitude(per="layer", allocation="best")
    model = tiny("llama")
    for allocation in ("influence", "greedy"):
        step = Magnitude(per="layer", allocation=allocation)
        with pytest.raises(DataError, match="magnitude needs calibration text"):
            step.prepare(model, Context(dense=model, scratch=tmp_path), [0.5])


def test_a_loss_that_cannot_be_measured_is_refused(tmp_path):
    step = Magnitude(per="layer", allocation="greedy")
    with pytest.raises(DataError, match="magnitude needs calibration rows of at least 2 tokens, got 1: take longer"):
        cut(step, tiny("llama"), 0.5, tmp_path / "a", random_tokens(8, 1))
    with pytest.raises(ModelError, match=r"magnitude on tiny-llama: the calibration loss .* must be finite, got nan:"):
        cut(step, overflowing(tiny("llama")), 0.5, tmp_path / "b")


@pytest.mark.parametrize(
    ("step", "family"),
    cases([Magnitude(per="layer", allocation=allocation) for allocation in ("influence", "greedy")], ["qwen2"]),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestAllocated(MethodConformance):
    pass

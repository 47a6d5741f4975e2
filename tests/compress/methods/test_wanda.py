"""Wanda: masks against the formula written naively, patterns, scopes, and the order of the published code."""

from __future__ import annotations

import math

import pytest
import torch

from mariotte import chain
from mariotte.compress.methods.wanda import Wanda, wanda
from mariotte.compress.sparsity import Pattern
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.experiments import identity
from mariotte.models.step import prepare_once
from mariotte.testing.methods import MethodConformance, cases, context_of, overflowing
from mariotte.testing.tiny import random_tokens, tiny


@pytest.mark.parametrize(
    ("step", "family"),
    cases([Wanda(sequential=False), Wanda(allocation="greedy")], ["qwen2"]),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestVariants(MethodConformance):
    pass


def cut(step, model, amount, folder, tokens=None):
    context = context_of(model, folder, tokens)
    return step.apply(model, prepare_once(step, model, context, [amount]), amount, context)


def naive(weight, inputs, amount):
    """Row by row and weight by weight: |w| times the l2 norm of its input."""
    found = weight.clone()
    norms = [math.sqrt(sum(float(x) ** 2 for x in inputs[:, i])) for i in range(weight.shape[1])]
    for o in range(weight.shape[0]):
        scores = [(abs(float(weight[o, i])) * norms[i], i) for i in range(weight.shape[1])]
        for _, i in sorted(scores)[: int(weight.shape[1] * amount)]:
            found[o, i] = 0
    return found


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.9])
def test_the_mask_is_the_papers_formula_written_naively(amount):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    inputs = torch.randn(30, 12, generator=generator, dtype=torch.float64) * torch.arange(12)
    found = wanda(weight, inputs.square().mean(0), [int(12 * amount)] * 5)
    assert torch.equal(found, naive(weight, inputs, amount))


def test_a_pattern_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0, 5.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    scale = torch.tensor([9.0, 1.0, 1.0, 0.0, 1.0, 1.0, 4.0, 9.0], dtype=torch.float64)
    found = wanda(weight, scale.square(), [4], Pattern(2, 4))
    assert found.tolist() == [[1.0, 0.0, 3.0, 0.0, 5.0, 0.0, 0.0, -1.0]] or found.tolist() == [
        [1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 1.0, -1.0]
    ]
    assert (found.view(-1, 4) == 0).sum(1).tolist() == [2, 2]
    assert found[0, 0] == 1
    assert found[0, 7] == -1


@torch.no_grad()
def test_later_blocks_are_measured_behind_pruned_ones(tmp_path):
    """The last down projection: its inputs are those of the model whose other matrices are pruned, as published."""
    model, tokens = tiny("llama"), random_tokens(6, 10)
    found = cut(Wanda(), model, 0.5, tmp_path, tokens)
    # The block before is pruned; the matrices of a block itself are pruned together, seeing one another dense.
    half = model.copy()
    for theirs, ours in zip(
        found.blocks[0].attention + found.blocks[0].ffn, half.blocks[0].attention + half.blocks[0].ffn, strict=True
    ):
        ours.weight.copy_(theirs.weight)
    seen = []
    hook = half.blocks[1].down.register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, 1).double()))
    half.logits(tokens)
    hook.remove()
    expected = naive(model.blocks[1].down.weight.double(), seen[0], 0.5)
    assert torch.equal(found.blocks[1].down.weight == 0, expected == 0)
    once = cut(Wanda(sequential=False), model, 0.5, tmp_path / "once", tokens)
    assert torch.equal(once.blocks[0].down.weight, found.blocks[0].down.weight)
    assert not torch.equal(once.blocks[1].down.weight, found.blocks[1].down.weight)


@pytest.mark.parametrize("scope", ["all", "attention", "ffn"])
def test_only_the_scope_is_touched_each_row_alike_and_kept_weights_stay(scope, tmp_path):
    model = tiny("qwen2", tied=True)
    result = cut(Wanda(scope=scope), model, 0.4, tmp_path)
    (done,) = result.done
    assert done.zeros == result.zeros() == Wanda(scope=scope).removes(model, 0.4)
    for block, before in zip(result.blocks, model.blocks, strict=True):
        for part in ("attention", "ffn"):
            for matrix, old in zip(getattr(block, part), getattr(before, part), strict=True):
                expected = math.floor(0.4 * matrix.in_features) if scope in ("all", part) else 0
                assert ((matrix.weight == 0).sum(1) == expected).all()
                assert torch.equal(matrix.weight[matrix.weight != 0], old.weight[matrix.weight != 0])
    assert result.head.weight is result.embeddings.weight


@pytest.mark.parametrize("sequential", [True, False])
def test_every_group_of_a_pattern_has_its_zeros(sequential, tmp_path):
    model = tiny("llama")
    result = cut(Wanda(nm="2:4", sequential=sequential), model, 0.5, tmp_path)
    for matrix in result.matrices("all"):
        assert ((matrix.weight.view(-1, 4) == 0).sum(1) == 2).all()
    assert result.done[-1].zeros == result.zeros() == result.done[-1].in_scope // 2
    assert result.done[-1].step == f"wanda@0.5(nm=2:4{'' if sequential else ', sequential=false'})"
    assert cut(Wanda(nm="2:4"), model, 0.0, tmp_path / "0").zeros() == 0


@pytest.mark.parametrize("scope", ["all", "ffn"])
def test_blocks_of_little_influence_lose_more_and_the_sum_is_exact(scope, tmp_path):
    model = tiny("llama", layers=3)
    with torch.no_grad():
        for matrix in (model.blocks[1].down, model.blocks[1].output):
            matrix.weight *= 0.01
    result = cut(Wanda(allocation="influence", scope=scope), model, 0.37, tmp_path)
    (done,) = result.done
    assert done.zeros == result.zeros() == round(0.37 * done.in_scope)
    shares = done.facts["shares"]
    assert max(shares) == shares[1] > 0.37 > min(shares)
    for block, share in zip(result.blocks, shares, strict=True):
        for matrix in block.ffn:
            zeros = (matrix.weight == 0).sum(1)
            assert zeros.max() - zeros.min() <= 1
            assert abs(float(zeros.double().mean()) - share * matrix.in_features) <= 1


def test_links_with_a_pattern_are_read_back():
    (part,) = identity.resolve(chain.parse("wanda@0.5:ffn(nm=2:4)"))
    assert part.step == Wanda(nm="2:4", scope="ffn")


@pytest.mark.parametrize("text", ["wanda@0.3(nm=2:4)", "wanda@0.5(nm=1:4)", "lora@1k | sparsegpt@0.75(nm=2:4)"])
def test_an_amount_that_contradicts_the_pattern_is_refused_when_the_chain_is_read(text):
    with pytest.raises(ChainError, match=r"(wanda|sparsegpt): nm=.:4 sets 0\.\d+ of the weights to zero, got 0\.\d+:"):
        identity.resolve(chain.parse(text))


@pytest.mark.parametrize("nm", ["1:3", "2:3", "1:6", "5:6", "1:7", "3:7", "1:9", "10:11", "1:128"])
def test_the_amount_that_is_advised_is_accepted(nm):
    with pytest.raises(ChainError) as raised:
        Wanda(nm=nm).accepted(0.4321)
    advised = str(raised.value).partition("write ")[2].partition(", or ")[0]
    assert identity.resolve(chain.parse(advised))[0].step == Wanda(nm=nm)


def test_patterns_that_do_not_fit_are_refused(tmp_path):
    model = tiny("llama", ffn=45)
    assert Wanda(nm="2:4").refuse(tiny("llama")) is None
    reason = Wanda(nm="2:4").refuse(model) or ""
    assert reason.startswith("needs input widths that 4 divides for nm=2:4, and a matrix has 45: leave nm out")
    assert Wanda(nm="2:4", scope="attention").refuse(model) is None
    with pytest.raises(ChainError, match=r"wanda: nm=2:4 sets 0.5 of the weights to zero, got 0.3: write wanda@0.5"):
        cut(Wanda(nm="2:4"), tiny("llama"), 0.3, tmp_path)
    assert Wanda(nm="2:4").accepted(0.5) == 0.5
    assert Wanda(nm="2:4").accepted(0) == 0.0
    with pytest.raises(ChainError, match="wanda: nm must be N:M"):
        Wanda(nm="half")
    with pytest.raises(ChainError, match="wanda: nm=2:4 fixes the share"):
        Wanda(nm="2:4", of="model")
    with pytest.raises(ChainError, match="wanda: nm=2:4 fixes the share of each block"):
        Wanda(nm="2:4", allocation="influence")
    with pytest.raises(ChainError, match="wanda: allocation must be one of"):
        Wanda(allocation="best")


@pytest.mark.parametrize("nm", [None, "2:4"])
@pytest.mark.parametrize("sequential", [True, False])
def test_activations_that_are_not_finite_and_single_tokens_are_refused(sequential, nm, tmp_path):
    step = Wanda(sequential=sequential, nm=nm)
    with pytest.raises(ModelError, match="wanda found activations that are not finite in block-0 mlp of tiny"):
        cut(step, overflowing(tiny("llama")), 0.5, tmp_path / "a")
    with pytest.raises(DataError, match="wanda needs at least 2 calibration tokens, got 1"):
        cut(step, tiny("llama"), 0.5, tmp_path / "o", random_tokens(1, 1))


def test_a_greedy_allocation_takes_rows_of_two_tokens(tmp_path):
    step = Wanda(allocation="greedy")
    with pytest.raises(DataError, match="wanda needs calibration rows of at least 2 tokens, got 1: take longer blocks"):
        cut(step, tiny("llama"), 0.5, tmp_path, random_tokens(8, 1))

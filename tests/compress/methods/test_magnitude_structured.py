"""Rows of the smallest norm: by hand, beside torch's pruning, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import prune

from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.magnitude_structured import MagnitudeStructured
from mariotte.errors import ChainError
from mariotte.testing.methods import MethodConformance, cases, run
from mariotte.testing.tiny import tiny


def test_by_hand(tmp_path):
    model = tiny("llama", hidden=8, heads=2, kv_heads=1, vocab=4)
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(4, 8) * torch.tensor([[2.0], [-1.0], [3.0], [1.0]]))
    weight = run(MagnitudeStructured(scope="head"), model, 0.5, tmp_path).head.weight
    assert weight.any(1).tolist() == [True, False, True, False]
    assert weight[2, 2] == 3


def test_norms_may_disagree(tmp_path):
    model = tiny("llama", hidden=8, heads=2, kv_heads=1, vocab=2)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[0, :4] = 1.0  # 4 by magnitudes, 2 by squares
        model.head.weight[1, 0] = 3.0
    for norm, kept in ((1, [True, False]), (2, [False, True])):
        step = MagnitudeStructured(scope="head", norm=norm)
        assert run(step, model, 0.5, tmp_path / str(norm)).head.weight.any(1).tolist() == kept


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("amount", [0.1, 0.37, 0.9])
def test_it_is_the_pruning_of_torch(norm, amount, tmp_path):
    model = tiny("qwen2", tied=True)
    theirs = copy.deepcopy(model.head)
    prune.ln_structured(theirs, "weight", amount, n=norm, dim=0)
    ours = run(MagnitudeStructured(scope="head", norm=norm), model, amount, tmp_path)
    assert torch.equal(ours.head.weight, theirs.weight)
    assert torch.equal(ours.embeddings.weight, model.embeddings.weight)  # also theirs: their mask is the layer's own


@pytest.mark.parametrize("amount", [0.1, 0.37, 0.9])
def test_single_weights_of_the_head_are_those_of_torch(amount, tmp_path):
    model = tiny("qwen2", tied=True)
    theirs = copy.deepcopy(model.head)
    prune.l1_unstructured(theirs, "weight", amount)
    ours = run(Magnitude(scope="head"), model, amount, tmp_path)
    assert torch.equal(ours.head.weight, theirs.weight)
    assert torch.equal(ours.embeddings.weight, model.embeddings.weight)


def test_zeroed_rows_leave_constant_logits(tmp_path):
    model = tiny("llama")
    result = run(MagnitudeStructured(scope="head"), model, 0.25, tmp_path)
    found = result.logits(torch.arange(6)[None])[0]
    assert int((found == 0).all(0).sum()) == 16
    assert result.zeros("head") == result.done[-1].zeros == 16 * 32


def test_impossible_requests_are_refused():
    with pytest.raises(ChainError, match="magnitude-structured: norm must be 1 or 2, got 3: leave it out for 2"):
        MagnitudeStructured(norm=3)
    with pytest.raises(ChainError, match="magnitude-structured has no scope 'embeddings'; it has all, attention, ffn"):
        MagnitudeStructured(scope="embeddings")
    with pytest.raises(
        ChainError, match="magnitude: allocation=influence spreads an amount over blocks, and the scope"
    ):
        Magnitude(scope="head", per="layer", allocation="influence")


@pytest.mark.parametrize(
    ("step", "family"),
    cases([MagnitudeStructured(norm=1)], ["qwen2"]),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestSums(MethodConformance):
    pass

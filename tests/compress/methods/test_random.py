"""Random pruning: exact counts, every weight alike, nested across amounts, and the same numbers as torch's pruning."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mariotte.compress.methods.random import Random
from mariotte.models.step import Context
from mariotte.testing.methods import MethodConformance, cases, run
from mariotte.testing.tiny import tiny


@pytest.mark.parametrize("scope", Random.scopes)
@pytest.mark.parametrize("tied", [True, False])
def test_only_the_scope_is_touched_and_counts_are_exact(scope, tied, tmp_path):
    model = tiny("qwen2", tied=tied)
    step = Random(scope=scope)
    result = run(step, model, 0.37, tmp_path)
    (done,) = result.done
    for part, matrices in {"attention": result.matrices("attention"), "ffn": result.matrices("ffn")}.items():
        for matrix in matrices:
            expected = round(0.37 * matrix.weight.numel()) if scope in ("all", part) else 0
            assert int((matrix.weight == 0).sum()) == expected
    assert int((result.head.weight == 0).sum()) == (round(0.37 * 32 * 64) if scope == "head" else 0)
    assert torch.equal(result.embeddings.weight, model.embeddings.weight)
    assert done.zeros == result.zeros(scope)
    more = 32 * 64 if scope == "head" and tied else 0
    assert result.measured_params() == result.counts.n_params == model.counts.n_params + more
    assert step.removes(model, 0.37) == done.zeros - more


@pytest.mark.parametrize("rows", [True, False])
def test_zeros_are_nested_differ_from_seed_to_seed_and_come_to_every_place(rows, tmp_path):
    model, step = tiny("llama"), Random(rows=rows, scope="head")

    def zeros(amount, seed=0):
        context = Context(dense=model, scratch=tmp_path, seed=seed)
        return step.apply(model, step.prepare(model, context, [amount]), amount, context).head.weight == 0

    assert (zeros(0.6) | ~zeros(0.3)).all()
    assert torch.equal(zeros(0.3), zeros(0.3))
    many = torch.stack([zeros(0.5, seed) for seed in range(64)]).double().mean(0)
    assert many.mean() == 0.5
    assert 0.1 < many.min() < many.max() < 0.9


def test_rows_go_whole(tmp_path):
    for matrix in run(Random(rows=True), tiny("llama"), 0.3, tmp_path).matrices("all"):
        zero = matrix.weight == 0
        assert torch.equal(zero.all(1), zero.any(1))
        assert int(zero.all(1).sum()) == round(0.3 * len(zero))


def test_applied_again_it_draws_the_same_first(tmp_path):
    once = run(Random(), tiny("llama"), 0.3, tmp_path / "a")
    twice = run(Random(), once, 0.5, tmp_path / "b")
    assert twice.zeros() == twice.done[-1].zeros


@pytest.mark.parametrize("rows", [True, False])
def test_as_many_go_as_in_the_pruning_of_torch(rows, tmp_path):
    model = tiny("llama")
    for amount in (0.1, 0.25, 0.37, 0.9):
        theirs = nn.Linear(32, 64, bias=False)
        if rows:
            prune.random_structured(theirs, "weight", amount, dim=0)
        else:
            prune.random_unstructured(theirs, "weight", amount)
        ours = run(Random(rows=rows, scope="head"), model, amount, tmp_path).head.weight
        assert int((ours == 0).sum()) == int((theirs.weight == 0).sum())


@pytest.mark.parametrize(
    ("step", "family"),
    cases([Random(rows=True), Random(rows=True, scope="head")], ["qwen2"]),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestRows(MethodConformance):
    pass

"""Feed-forward width: orders against brute force, compensation against least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mariotte.compress.methods.ffn import FFN, obs_order
from mariotte.errors import ChainError, DataError
from mariotte.models.step import prepare_once
from mariotte.testing.methods import context_of, logits
from mariotte.testing.tiny import tiny


def layer(columns: int, *, outputs: int = 4, tokens: int = 50, seed: int = 0):
    """A down projection (D, F) and its correlated inputs (M, F)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, columns, generator=generator, dtype=torch.float64), inputs


def squared_error(down, inputs, kept, replacement) -> float:
    return float((inputs @ down.T - inputs[:, kept] @ replacement.T).square().mean(0).sum())


def best_error(down, inputs, kept) -> float:
    """The least squared error of any projection of the kept columns, by numpy's own least squares."""
    solution, *_ = np.linalg.lstsq(inputs[:, kept].numpy(), (inputs @ down.T).numpy(), rcond=None)
    return squared_error(down, inputs, kept, torch.from_numpy(solution.T.copy()))


@pytest.mark.parametrize("seed", range(5))
def test_obs_order_equals_brute_force(seed):
    down, inputs = layer(6, seed=seed)
    order = obs_order(down, inputs.T @ inputs / len(inputs)).tolist()
    left, expected = set(range(6)), []
    while len(left) > 1:
        costs = {j: best_error(down, inputs, sorted(left - {j})) for j in left}
        gone = min(costs, key=costs.__getitem__)
        expected.append(gone)
        left.remove(gone)
    assert order == [*expected, *left]


def test_obs_order_of_many_columns_survives_compaction():
    down, inputs = layer(40, tokens=400, seed=1)
    moment = inputs.T @ inputs / len(inputs)
    order = obs_order(down, moment).tolist()
    assert sorted(order) == list(range(40))
    # The same greedy order, recomputed from scratch for each removal.
    weight, left = down.clone(), list(range(40))
    for removed in order[:30]:
        inverse = torch.linalg.inv(moment[left][:, left])
        weight = torch.linalg.solve(moment[left][:, left], (down @ moment[:, left]).T).T
        costs = weight.square().sum(0) / inverse.diagonal()
        assert left[int(costs.argmin())] == removed
        left.remove(removed)


def test_of_equal_columns_the_first_goes_first():
    assert obs_order(torch.ones(2, 5).double(), torch.eye(5).double()).tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["obs", "activation", "norm"])
def test_compensation_lowers_the_error_of_each_block(criterion, tmp_path):
    model = tiny("llama")
    inputs: dict[int, torch.Tensor] = {}
    hooks = [
        block.down.register_forward_pre_hook(lambda _m, x, i=i: inputs.__setitem__(i, x[0].flatten(0, 1).double()))
        for i, block in enumerate(model.blocks)
    ]
    context = context_of(model, tmp_path / "a")
    model.logits(context.calibration)
    for hook in hooks:
        hook.remove()
    errors = {}
    for compensate in (True, False):
        step = FFN(criterion=criterion, compensate=compensate)
        context = context_of(model, tmp_path / str(compensate))
        prepared = prepare_once(step, model, context, [0.5])
        cut = step.apply(model, prepared, 0.5, context)
        for i, (block, full) in enumerate(zip(cut.blocks, model.blocks, strict=True)):
            kept = prepared.get(f"block-{i}")["order"][:24].sort().values
            # The rows of gate and up are those of the kept neurons.
            assert torch.equal(block.up.weight, full.up.weight[kept])
            assert torch.equal(block.gate.weight, full.gate.weight[kept])
            errors[compensate, i] = squared_error(
                full.down.weight.double(), inputs[i], kept, block.down.weight.double()
            )
    for i in range(2):
        assert errors[True, i] < errors[False, i]


def test_kept_sets_are_nested(tmp_path):
    model = tiny("qwen2")
    step = FFN(round_to=1, compensate=False)
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.5])
    rows = [
        [{tuple(row.tolist()) for row in block.up.weight} for block in step.apply(model, prepared, a, context).blocks]
        for a in (0.1, 0.4, 0.7, 0.9)
    ]
    for larger, smaller in itertools.pairwise(rows):
        assert all(b < a for a, b in zip(larger, smaller, strict=True))


def test_norm_without_compensation_needs_no_text(tmp_path):
    model = tiny("llama")
    for step, needs in ((FFN(criterion="norm", compensate=False), False), (FFN(criterion="norm"), True), (FFN(), True)):
        context = context_of(model, tmp_path / str(step.link()), torch.empty(0, 4, dtype=torch.long))
        if needs:
            with pytest.raises(DataError, match="ffn needs calibration text"):
                prepare_once(step, model, context, [0.5])
        else:
            assert step.apply(model, prepare_once(step, model, context, [0.5]), 0.5, context).shape.ffn == 24


def test_norm_keeps_the_neurons_of_the_largest_weights(tmp_path):
    model = tiny("llama", layers=1, ffn=16)
    with torch.no_grad():
        model.blocks[0].up.weight[[1, 4, 6, 9, 10, 12, 13, 15]] *= 100
    step = FFN(criterion="norm", compensate=False)
    context = context_of(model, tmp_path)
    cut = step.apply(model, prepare_once(step, model, context, [0.5]), 0.5, context)
    assert torch.equal(cut.blocks[0].up.weight, model.blocks[0].up.weight[[1, 4, 6, 9, 10, 12, 13, 15]])


def test_dead_neurons_go_first_and_cost_nothing(tmp_path):
    model = tiny("llama", **{"mlp_bias": True})
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.up.parameters():
                parameter[::2] = 0
    step = FFN()
    context = context_of(model, tmp_path)
    cut = step.apply(model, prepare_once(step, model, context, [0.5]), 0.5, context)
    torch.testing.assert_close(logits(cut), logits(model), rtol=1e-3, atol=1e-3)


def test_a_block_of_dead_neurons_is_cut_too(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.blocks[0].up.weight.zero_()
    step = FFN()
    context = context_of(model, tmp_path)
    cut = step.apply(model, prepare_once(step, model, context, [0.5]), 0.5, context)
    assert cut.blocks[0].down.weight.shape == (32, 24)
    assert cut.blocks[0].down.weight.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"criterion": "taylor"}, "criterion must be one of obs, activation, norm, got 'taylor'"),
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"round_to": 0}, "round_to must be a positive"),
        ({"scope": "attention"}, "ffn has no scope 'attention'; it has all"),
    ],
)
def test_fields_are_checked(fields, words):
    with pytest.raises(ChainError, match=words):
        FFN(**fields)

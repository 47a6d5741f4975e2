"""Feed-forward width: orders against brute force, compensation against least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mariotte.compress.calibration import taylor
from mariotte.compress.methods.ffn import FFN, obs_order
from mariotte.compress.surgery import derive
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models.step import prepare_once
from mariotte.testing.methods import MethodConformance, cases, context_of, logits, overflowing
from mariotte.testing.tiny import random_tokens, tiny, weights_hash

VARIANTS = [FFN(criterion="wanda"), FFN(criterion="taylor"), FFN(sequential=True), FFN(sequential=True, correct=0.0)]


@pytest.mark.parametrize(
    ("step", "family"), cases(VARIANTS, ["qwen2"]), ids=lambda v: v if isinstance(v, str) else str(v.link())
)
class TestVariants(MethodConformance):
    pass


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
@pytest.mark.parametrize("criterion", ["obs", "activation", "wanda", "taylor", "norm"])
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


def order_of(step, model, folder, tokens=None):
    context = context_of(model, folder, tokens)
    return prepare_once(step, model, context, [0.5]).get("block-0")["order"].tolist()


@torch.no_grad()
def test_wanda_sums_the_score_of_each_weight_over_the_rows(tmp_path):
    model = tiny("llama", layers=1)
    tokens = random_tokens(3, 8)
    seen = []
    hook = model.blocks[0].down.register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, 1).double()))
    model.logits(tokens)
    hook.remove()
    scores = (model.blocks[0].down.weight.double().abs() * seen[0].norm(dim=0)).sum(0)
    expected = scores.argsort(descending=True).tolist()
    assert order_of(FFN(criterion="wanda", compensate=False), model, tmp_path, tokens) == expected


def test_taylor_is_what_the_loss_changes_by_to_first_order(tmp_path):
    """Against autograd at a scale on the neuron's output, which is one: the loss changes by its gradient."""
    model = tiny("qwen2", layers=2)
    tokens = random_tokens(3, 6)
    found = taylor(model, context_of(model, tmp_path, tokens), "test", {"0": model.blocks[0].down}, batch=2)["0"]
    expected = torch.zeros(48, dtype=torch.float64)
    for row in tokens:
        scale = torch.ones(48, requires_grad=True)
        hook = model.blocks[0].down.register_forward_pre_hook(lambda _m, x, scale=scale: (x[0] * scale,))
        logits_TV = model.logits(row[None])[0, :-1].float()
        hook.remove()
        torch.nn.functional.cross_entropy(logits_TV, row[1:]).backward()
        expected += scale.grad.double().abs() / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    order = order_of(FFN(criterion="taylor"), model, tmp_path / "order", tokens)
    assert order == expected.argsort(descending=True).tolist()


def test_taylor_works_on_frozen_models_and_leaves_no_gradients(tmp_path):
    model = tiny("llama")
    context = context_of(model, tmp_path)
    inputs = {str(i): block.down for i, block in enumerate(model.blocks)}
    expected = taylor(model, context, "test", inputs)
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    model.hf.requires_grad_(False)
    found = taylor(model, context, "test", inputs)
    for name in inputs:
        torch.testing.assert_close(found[name], expected[name])
    with pytest.raises(DataError, match="test needs calibration rows of at least 2 tokens, got 1"):
        taylor(model, context_of(model, tmp_path, random_tokens(4, 1)), "test", inputs)


def cut(step, model, amount, folder, tokens=None):
    context = context_of(model, folder, tokens)
    return step.apply(model, prepare_once(step, model, context, [amount]), amount, context)


def test_the_first_block_is_cut_alike_sequentially_or_not_and_later_ones_are_not(tmp_path):
    model = tiny("llama", layers=3)
    once = cut(FFN(), model, 0.5, tmp_path / "a")
    again = cut(FFN(sequential=True, correct=0.0), model, 0.5, tmp_path / "b")
    torch.testing.assert_close(again.blocks[0].down.weight, once.blocks[0].down.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.blocks[0].up.weight, once.blocks[0].up.weight)
    assert not torch.allclose(again.blocks[2].down.weight, once.blocks[2].down.weight)


@torch.no_grad()
@pytest.mark.parametrize("correct", [0.0, 0.5, 1.0])
def test_sequential_columns_equal_numpys_least_squares_behind_the_cut_blocks(correct, tmp_path):
    """The last block: its inputs come from the cut model, and its target is its own output plus the stream's lack."""
    model, tokens = tiny("llama", layers=2, ffn=16), random_tokens(20, 10)
    step = FFN(sequential=True, correct=correct, criterion="norm", ridge=1e-9, round_to=1)
    found = cut(step, model, 0.5, tmp_path, tokens)
    half = model.copy()
    kept = {tuple(row.tolist()) for row in found.blocks[0].up.weight}
    columns = [i for i, row in enumerate(model.blocks[0].up.weight) if tuple(row.tolist()) in kept]
    half.blocks[0].down.weight.zero_()
    half.blocks[0].down.weight[:, columns] = found.blocks[0].down.weight
    seen = {}
    for name, some in (("dense", model), ("half", half)):

        def keep(_m, x, y, name=name):
            seen[name] = (x[0].flatten(0, 1).double(), y)

        def behind(_m, _x, y, name=name):
            seen[name + " stream"] = (y[0] if isinstance(y, tuple) else y).flatten(0, 1).double()

        hooks = [some.blocks[1].down.register_forward_hook(keep), some.blocks[1].module.register_forward_hook(behind)]
        some.logits(tokens)
        for hook in hooks:
            hook.remove()
    inputs = seen["half"][0]
    target = inputs @ model.blocks[1].down.weight.double().T + correct * (seen["dense stream"] - seen["half stream"])
    kept = {tuple(row.tolist()) for row in found.blocks[1].up.weight}
    columns = [i for i, row in enumerate(model.blocks[1].up.weight) if tuple(row.tolist()) in kept]
    expected, *_ = np.linalg.lstsq(inputs[:, columns].numpy(), target.numpy(), rcond=None)
    np.testing.assert_allclose(found.blocks[1].down.weight.double().numpy(), expected.T, atol=1e-4)


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
@pytest.mark.parametrize("compensate", [True, False])
def test_sequential_serves_every_criterion(criterion, compensate, tmp_path):
    if criterion == "taylor" and not compensate:
        pytest.skip("refused: nothing in it looks at the cut model")
    model = tiny("qwen2", layers=2)
    before = weights_hash(model)
    found = cut(FFN(criterion=criterion, compensate=compensate, sequential=True), model, 0.5, tmp_path)
    assert found.measured_params() == found.counts.n_params < model.measured_params()
    assert bool(logits(found).isfinite().all())
    assert weights_hash(model) == before


@pytest.mark.parametrize("step", [FFN(), FFN(criterion="activation"), FFN(criterion="taylor"), FFN(sequential=True)])
def test_activations_that_are_not_finite_and_single_tokens_are_refused(step, tmp_path):
    with pytest.raises(ModelError, match=r"ffn found activations.* that are not finite in block-0 of tiny-llama"):
        cut(step, overflowing(tiny("llama")), 0.5, tmp_path / "activations")
    with pytest.raises(DataError, match="ffn needs at least 2 calibration tokens, got 1"):
        cut(step, tiny("llama"), 0.5, tmp_path / "one", random_tokens(1, 1))


@torch.no_grad()
def test_blocks_of_unequal_width_are_refused():
    model = tiny("llama")
    weights = {"model.layers.0.mlp.down_proj.weight": model.blocks[0].down.weight[:, :40]}
    for name in ("gate", "up"):
        weights[f"model.layers.0.mlp.{name}_proj.weight"] = getattr(model.blocks[0], name).weight[:40]
    uneven = derive(model, weights, {"ffn_sizes": [40, 48]}, irregular=True)
    assert "the blocks of this model differ in width" in (FFN().refuse(uneven) or "")
    assert FFN().refuse(model) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"criterion": "size"}, "criterion must be one of obs, activation, wanda, taylor, norm, got 'size'"),
        ({"correct": 1.5}, "correct must be a share in"),
        ({"sequential": True, "criterion": "norm", "compensate": False}, "sequential=true needs compensation or"),
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"ridge": float("inf")}, "ridge must be positive"),
        ({"round_to": 0}, "round_to must be a positive"),
        ({"scope": "attention"}, "ffn has no scope 'attention'; it has all"),
    ],
)
def test_fields_are_checked(fields, words):
    with pytest.raises(ChainError, match=words):
        FFN(**fields)

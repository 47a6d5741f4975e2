"""Attention heads: orders against brute force, cuts against zeroed heads, gradients against differences."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from mariotte.compress.attention import columns_of
from mariotte.compress.methods.flap import FLAP
from mariotte.compress.methods.heads import Heads, Norm, Surgeon, Taylor, mask_gradients, removal_order
from mariotte.compress.surgery import derive
from mariotte.cuts.heads import kept_counts
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, prepare_once
from mariotte.testing.methods import MethodConformance, cases, context_of, logits, overflowing, run
from mariotte.testing.tiny import random_tokens, tiny


def projection(heads: int, width: int, *, outputs: int = 5, tokens: int = 80, seed: int = 0):
    """An output projection (D, I) and its correlated inputs (M, I)."""
    generator = torch.Generator().manual_seed(seed)
    columns = heads * width
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, columns, generator=generator, dtype=torch.float64), inputs


def best_error(output, inputs, kept: list[int]) -> float:
    """The least squared error of any projection of the kept columns."""
    wanted = inputs @ output.T
    if not kept:
        return float(wanted.square().mean(0).sum())
    solution = torch.linalg.lstsq(inputs[:, kept], wanted).solution
    return float((inputs[:, kept] @ solution - wanted).square().mean(0).sum())


@pytest.mark.parametrize("seed", range(3))
def test_obs_order_of_heads_equals_brute_force(seed):
    output, inputs = projection(5, 3, seed=seed)
    order = removal_order(5, 1, "groups", Surgeon(output, inputs.T @ inputs / len(inputs), 3))
    left, expected = list(range(5)), []
    while left:
        costs = {h: best_error(output, inputs, columns_of([k for k in left if k != h], 3)) for h in left}
        left.remove(min(costs, key=costs.__getitem__))
        expected.append(next(h for h in range(5) if h not in left and h not in expected))
    assert order == expected


def test_a_surgeons_costs_add_up_to_the_least_squares_error():
    output, inputs = projection(4, 2)
    judge, gone, total = Surgeon(output, inputs.T @ inputs / len(inputs), 2), [], 0.0
    for heads in ([1, 2], [0]):
        total += judge.cost(heads)
        judge.remove(heads)
        gone += heads
        kept = columns_of([h for h in range(4) if h not in gone], 2)
        assert total == pytest.approx(best_error(output, inputs, kept))


def test_norm_is_the_mean_squared_norm_of_what_heads_add():
    output, inputs = projection(3, 4)
    judge = Norm(output, inputs.T @ inputs / len(inputs), 4)
    for heads in ([1], [0, 2]):
        columns = columns_of(heads, 4)
        added = inputs[:, columns] @ output[:, columns].T
        assert judge.cost(heads) == pytest.approx(float(added.square().sum(1).mean()))


def test_taylor_adds_the_derivatives_of_heads_that_go_together_row_by_row():
    judge = Taylor(torch.tensor([[1.0, -1.0, 3.0], [2.0, -2.0, -1.0]]))
    assert judge.cost([0]) == 1.5
    assert judge.cost([0, 1]) == 0.0
    assert judge.cost([0, 2]) == 2.5


@pytest.mark.parametrize("by", ["groups", "queries"])
def test_every_count_of_the_order_leaves_equal_groups(by):
    output, inputs = projection(6, 2)
    order = removal_order(2, 3, by, Surgeon(output, inputs.T @ inputs / len(inputs), 2))
    assert sorted(order) == list(range(6))
    shape = replace(tiny("llama").shape, heads=6, kv_heads=2)
    counts = kept_counts(shape, by)
    assert counts == ([(6, 2), (3, 1), (2, 1), (1, 1)] if by == "groups" else [(6, 2), (4, 2), (2, 2), (1, 1)])
    for heads, groups in counts:
        kept = [order[-i] // 3 for i in range(1, heads + 1)]
        assert {kept.count(group) for group in kept} == {heads // groups}
        assert len(set(kept)) == groups


def test_of_equal_heads_the_first_goes_first():
    judge = Norm(torch.ones(2, 4).double(), torch.eye(4).double(), 1)
    assert removal_order(4, 1, "groups", judge) == [0, 1, 2, 3]
    assert removal_order(2, 2, "queries", judge) == [0, 2, 1, 3]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("by", ["groups", "queries"])
@pytest.mark.parametrize("criterion", ["obs", "norm", "taylor"])
@torch.no_grad()
def test_removed_heads_are_zeroed_heads(family, by, criterion, tmp_path):
    # Llama asks that heads divide the hidden size; 24 leaves 6, 4, 3, 2, 1 heads of 6.
    model = tiny(family, hidden=24, heads=6, kv_heads=2, head_dim=6)
    step = Heads(criterion=criterion, by=by, compensate=False)
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.5])
    sizes = []
    for amount in (0.3, 0.5, 0.7, 0.9):
        cut = step.apply(model, prepared, amount, context)
        heads, groups = cut.shape.heads, cut.shape.kv_heads
        assert cut.done[-1].facts["heads"] == [6, heads]
        assert cut.done[-1].facts["kv_heads"] == [2, groups]
        sizes.append((heads, groups))
        zeroed = model.copy()
        for index, block in enumerate(zeroed.blocks):
            gone = prepared.get(f"block-{index}")["order"][heads:].tolist()
            block.output.weight[:, columns_of(gone, 6)] = 0
        torch.testing.assert_close(logits(cut), logits(zeroed), rtol=1e-4, atol=1e-4)
    assert (
        sizes
        == {
            "groups": [(3, 1), (3, 1), (2, 1), (1, 1)],
            "queries": [(4, 2), (4, 2), (2, 2), (1, 1)],
        }[by]
    )


@pytest.mark.parametrize(
    ("sizes", "by", "heads"),
    [
        ({"heads": 6, "kv_heads": 2}, "queries", 4),
        ({"heads": 4, "kv_heads": 2}, "queries", 2),
        ({"heads": 8, "kv_heads": 4}, "groups", 6),
        ({"heads": 4, "kv_heads": 4}, "queries", 3),
        ({"heads": 4, "kv_heads": 1}, "queries", 3),
    ],
)
def test_the_finer_choice_is_taken(sizes, by, heads, tmp_path):
    model = tiny("qwen2", hidden=48, **sizes)
    step = Heads()
    context = context_of(model, tmp_path)
    done = step.apply(model, prepare_once(step, model, context, [0.3]), 0.3, context).done[-1]
    assert done.facts["by"] == by
    assert done.facts["heads"] == [sizes["heads"], heads]


def test_counts_that_a_config_refuses_are_left_out(tmp_path):
    # 5 heads of 80 dimensions: 3 do not divide 80, and would not load again.
    model = tiny("llama", hidden=80, heads=5, kv_heads=5, head_dim=16)
    step = Heads()
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.4])
    kept = [step.apply(model, prepared, amount, context).shape.heads for amount in (0.0, 0.2, 0.39, 0.41, 0.99)]
    assert kept == [5, 4, 4, 2, 1]


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["obs", "norm", "taylor"])
def test_compensation_lowers_the_error_of_each_block(criterion, tmp_path):
    model = tiny("qwen2")
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        block.output.register_forward_pre_hook(lambda _m, x, i=i: seen.__setitem__(i, x[0].flatten(0, 1).double()))
        for i, block in enumerate(model.blocks)
    ]
    model.logits(context_of(model, tmp_path).calibration)
    for hook in hooks:
        hook.remove()
    errors = {}
    for compensate in (True, False):
        step = Heads(criterion=criterion, compensate=compensate)
        context = context_of(model, tmp_path / str(compensate))
        prepared = prepare_once(step, model, context, [0.5])
        cut = step.apply(model, prepared, 0.5, context)
        for i, (block, full) in enumerate(zip(cut.blocks, model.blocks, strict=True)):
            kept = columns_of(sorted(prepared.get(f"block-{i}")["order"][:2].tolist()), 8)
            found = seen[i][:, kept] @ block.output.weight.double().T
            errors[compensate, i] = float((found - seen[i] @ full.output.weight.double().T).square().mean())
    for i in range(2):
        assert errors[True, i] < errors[False, i]


def test_kept_sets_are_nested(tmp_path):
    model = tiny("qwen2", hidden=48, heads=6, kv_heads=3)
    for by in ("groups", "queries"):
        step = Heads(by=by, compensate=False)
        context = context_of(model, tmp_path / by)
        prepared = prepare_once(step, model, context, [0.5])
        cuts = [step.apply(model, prepared, amount, context) for amount in (0.1, 0.4, 0.7, 0.9)]
        rows = [[{tuple(row.tolist()) for row in block.query.weight} for block in cut.blocks] for cut in cuts]
        for larger, smaller in itertools.pairwise(rows):
            assert all(b <= a for a, b in zip(larger, smaller, strict=True))


def test_the_gradient_of_a_mask_is_what_scaling_a_head_does(tmp_path):
    model = tiny("llama", dtype=torch.float64)
    context = replace(context_of(model, tmp_path), calibration=random_tokens(3, 9))
    gradients = mask_gradients(model, context, "heads")
    step = 1e-3

    def losses(scale: float) -> torch.Tensor:
        scaled = model.copy()
        with torch.no_grad():
            scaled.blocks[1].output.weight[:, 8:16] *= scale
        return token_nll(scaled, context.calibration).double().mean(1)

    measured = (losses(1 + step) - losses(1 - step)) / (2 * step)
    torch.testing.assert_close(gradients[1][:, 1], measured, rtol=1e-2, atol=1e-3)


def test_a_head_that_adds_nothing_goes_first_and_costs_nothing(tmp_path):
    model = tiny("qwen2", heads=4, kv_heads=4)
    with torch.no_grad():
        for block in model.blocks:
            block.output.weight[:, 16:24] = 0
    for criterion in ("obs", "norm", "taylor"):
        step = Heads(criterion=criterion, compensate=False)
        context = context_of(model, tmp_path / criterion)
        cut = step.apply(model, prepare_once(step, model, context, [0.25]), 0.25, context)
        assert cut.shape.heads == 3
        torch.testing.assert_close(logits(cut), logits(model), rtol=1e-4, atol=1e-4)


def test_generation_with_the_cache_equals_generation_without(tmp_path):
    model = tiny("llama")
    for by in ("groups", "queries"):
        step = Heads(by=by)
        context = context_of(model, tmp_path / by)
        cut = step.apply(model, prepare_once(step, model, context, [0.5]), 0.5, context)
        prompt = random_tokens(2, 5)
        made = [
            cut.hf.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
                use_cache=cached,
            )
            for cached in (True, False)
        ]
        assert torch.equal(*made)


def test_a_single_head_stays(tmp_path):
    model = tiny("llama", heads=1, kv_heads=1)
    step = Heads()
    context = context_of(model, tmp_path)
    cut = step.apply(model, prepare_once(step, model, context, [0.9]), 0.9, context)
    assert cut.shape.heads == 1
    assert cut.done[-1].obtained == 0
    assert step.removes(model, 0.9) == 0


def test_impossible_requests_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(ChainError, match="heads: criterion must be one of obs, norm, taylor, got 'best'"):
        Heads(criterion="best")
    with pytest.raises(ChainError, match="heads: by must be one of queries, groups, or left out, got 'rows'"):
        Heads(by="rows")
    with pytest.raises(ChainError, match="heads: ridge must be positive"):
        Heads(ridge=0.0)
    with pytest.raises(ChainError, match="the share of heads to remove must be in"):
        Heads.check_amount("heads", 1.0)
    model = tiny("llama")
    short = Context(dense=model, scratch=tmp_path / "short", calibration=random_tokens(4, 1))
    with pytest.raises(DataError, match="rows of at least 2 tokens, got 1"):
        Heads(criterion="taylor").prepare(model, short, [0.5])
    single = Context(dense=model, scratch=tmp_path / "single", calibration=random_tokens(1, 1))
    for criterion in ("obs", "norm", "taylor"):
        with pytest.raises(DataError, match="heads needs at least 2 calibration tokens"):
            Heads(criterion=criterion).prepare(model, single, [0.5])
    stretched = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0] * 4,
        "original_max_position_embeddings": 32,
    }
    phi3 = tiny("phi3", rope_parameters=stretched, original_max_position_embeddings=32)
    for step in (Heads(), FLAP(uniform=True)):  # whose config would refuse as many factors for fewer heads
        assert "this phi3 counts the factors of its rotation" in str(step.refuse(phi3))
    assert FLAP().refuse(phi3) is None


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Heads(), "activations that are not finite in block-1"),
        (Heads(criterion="norm", compensate=False), "activations that are not finite in block-1"),
        (Heads(criterion="taylor"), "gradients that are not finite in block-0"),
    ],
)
def test_activations_and_gradients_that_are_not_finite_are_refused(step, words, tmp_path):
    with pytest.raises(ModelError, match=rf"heads found {words} of tiny-llama: check the checkpoint"):
        run(step, overflowing(tiny("llama")), 0.5, tmp_path)


@torch.no_grad()
def test_feed_forward_widths_of_their_own_stay(tmp_path):
    model = tiny("qwen2")
    weights = {}
    for path in ("gate_proj", "up_proj"):
        name = f"model.layers.0.mlp.{path}.weight"
        weights[name] = model.hf.get_parameter(name)[:40]
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = model.hf.get_parameter(name)[:, :40]
    uneven = derive(model, weights, {"ffn_sizes": [40, 48]}, irregular=True)
    step = Heads()
    context = context_of(uneven, tmp_path)
    cut = step.apply(uneven, prepare_once(step, uneven, context, [0.5]), 0.5, context)
    assert cut.shape.ffns == (40, 48)
    assert cut.shape.heads == 2
    assert uneven.measured_params() - cut.measured_params() == step.removes(uneven, 0.5)
    assert cut.measured_params() == cut.counts.n_params
    assert bool(logits(cut).isfinite().all())


VARIANTS = [
    Heads(criterion="norm"),
    Heads(criterion="taylor", by="groups"),
    Heads(by="groups", compensate=False),
]


@pytest.mark.parametrize(
    ("step", "family"), cases(VARIANTS, ["qwen2"]), ids=lambda v: v if isinstance(v, str) else str(v.link())
)
class TestVariants(MethodConformance):
    pass

"""SparseGPT: mask and update against optimal brain surgeon written naively, patterns, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mariotte.compress.methods.sparsegpt import SparseGPT, count, sparsegpt
from mariotte.compress.sparsity import Pattern
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models.step import prepare_once
from mariotte.testing.methods import MethodConformance, cases, context_of, overflowing
from mariotte.testing.tiny import random_tokens, tiny


@pytest.mark.parametrize(
    ("step", "family"),
    cases([SparseGPT(sequential=False)], ["qwen2"]),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestVariants(MethodConformance):
    pass


def cut(step, model, amount, folder, tokens=None):
    context = context_of(model, folder, tokens)
    return step.apply(model, prepare_once(step, model, context, [amount]), amount, context)


def layer(outputs=6, inputs=16, tokens=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x


def run(weight, x, amount, pattern=None, *, columns=128):
    sizes = SparseGPT(columns=columns).parts(*weight.shape)
    return sparsegpt(weight, x.T @ x / len(x), [count(size, amount) for size in sizes], pattern, columns=columns)


def naive(weight, x, amount, *, columns, damp, pattern=None):
    """Optimal brain surgeon, a weight at a time, inverting the moment of the columns that are left anew for each."""
    weight = weight.numpy().copy()
    moment = (x.T @ x / len(x)).numpy()
    moment = moment + damp * np.diag(moment).mean() * np.eye(len(moment))
    outputs, inputs = weight.shape
    gone = np.zeros(weight.shape, dtype=bool)
    inverses = [np.linalg.inv(moment[j:, j:]) for j in range(inputs)]
    cost = lambda o, j: weight[o, j] ** 2 / inverses[j][0, 0]  # noqa: E731
    for j in range(inputs):
        if pattern is None and j % columns == 0:
            block = range(j, min(j + columns, inputs))
            order = sorted((cost(o, i), o, i) for o in range(outputs) for i in block)
            for _, o, i in order[: int(len(order) * amount) + 1]:
                gone[o, i] = True
        if pattern is not None and j % pattern.of == 0:
            for o in range(outputs):
                for _, i in sorted((cost(o, i), i) for i in range(j, j + pattern.of))[: pattern.zeros]:
                    gone[o, i] = True
        for o in range(outputs):
            if gone[o, j]:
                # The others make up for it by least squares: their best answer to the output that it drew.
                weight[o, j:] -= weight[o, j] / inverses[j][0, 0] * inverses[j][0]
                weight[o, j] = 0
    return weight, gone


@pytest.mark.parametrize("columns", [4, 8, 128])
@pytest.mark.parametrize("amount", [0.25, 0.5, 0.8])
def test_mask_and_update_equal_naive_optimal_brain_surgeon(columns, amount):
    weight, x = layer()
    found = run(weight, x, amount, columns=columns)
    expected, gone = naive(weight, x, amount, columns=columns, damp=0.01)
    assert torch.equal(found == 0, torch.from_numpy(gone))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("columns", [8, 128])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 2), Pattern(4, 8), Pattern(1, 4)])
def test_patterns_equal_naive_optimal_brain_surgeon(columns, pattern):
    weight, x = layer(seed=1)
    found = run(weight, x, pattern.share, pattern, columns=columns)
    expected, gone = naive(weight, x, pattern.share, columns=columns, damp=0.01, pattern=pattern)
    assert torch.equal(found == 0, torch.from_numpy(gone))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_the_update_lowers_the_error_of_the_output():
    weight, x = layer(outputs=10, inputs=40, tokens=400)
    found = run(weight, x, 0.5)
    plain = weight.masked_fill(found == 0, 0.0)
    error = {name: float((x @ (weight - w).T).square().mean()) for name, w in (("found", found), ("plain", plain))}
    assert error["found"] < 0.8 * error["plain"]


def test_inputs_that_are_always_zero_go_first_and_move_no_others():
    weight, x = layer()
    x[:, 5] = 0
    found = run(weight, x, 5 / 96)
    assert (found[:, 5] == 0).all()
    rest = [i for i in range(16) if i != 5]
    torch.testing.assert_close(found[:, rest], weight[:, rest])
    assert sparsegpt(weight, torch.zeros(16, 16).double(), [48]).isfinite().all()


@pytest.mark.parametrize("scope", ["all", "attention", "ffn"])
def test_zeros_are_counted_exactly_and_only_in_scope(scope, tmp_path):
    model = tiny("qwen2", tied=True, ffn=150)
    result = cut(SparseGPT(scope=scope), model, 0.37, tmp_path)
    (done,) = result.done
    assert done.zeros == result.zeros() == SparseGPT(scope=scope).removes(model, 0.37)
    for block, before in zip(result.blocks, model.blocks, strict=True):
        for part in ("attention", "ffn"):
            for matrix, old in zip(getattr(block, part), getattr(before, part), strict=True):
                assert torch.equal(matrix.weight, old.weight) == (scope not in ("all", part))
    assert result.head.weight is result.embeddings.weight


@pytest.mark.parametrize("allocation", ["influence", "greedy"])
def test_blocks_may_share_the_amount_otherwise(allocation, tmp_path):
    result = cut(SparseGPT(allocation=allocation), tiny("llama"), 0.37, tmp_path)
    (done,) = result.done
    assert done.zeros == result.zeros() == round(0.37 * done.in_scope)
    assert len(set(done.facts["shares"])) == 2
    assert sum(done.facts["shares"]) / 2 == pytest.approx(0.37)


@pytest.mark.parametrize("sequential", [True, False])
def test_every_group_of_a_pattern_has_its_zeros(sequential, tmp_path):
    result = cut(SparseGPT(nm="2:4", sequential=sequential), tiny("llama"), 0.5, tmp_path)
    for matrix in result.matrices("all"):
        assert ((matrix.weight.view(-1, 4) == 0).sum(1) == 2).all()
    assert result.done[-1].zeros == result.zeros() == result.done[-1].in_scope // 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"columns": 0}, "columns must be a positive number"),
        ({"damp": 0.0}, "damp must be positive"),
        ({"nm": "2:4", "columns": 6}, "columns must be a multiple of 4 for nm=2:4, got 6"),
        ({"nm": "2:4", "of": "model"}, "nm=2:4 fixes the share"),
        ({"nm": "4:2"}, "nm must be N:M"),
    ],
)
def test_fields_are_checked(fields, words):
    with pytest.raises(ChainError, match=words):
        SparseGPT(**fields)


@pytest.mark.parametrize("sequential", [True, False])
def test_activations_that_are_not_finite_and_single_tokens_are_refused(sequential, tmp_path):
    step = SparseGPT(sequential=sequential)
    with pytest.raises(ModelError, match="sparsegpt found activations that are not finite in block-0 mlp of tiny"):
        cut(step, overflowing(tiny("llama")), 0.5, tmp_path / "a")
    with pytest.raises(DataError, match="sparsegpt needs at least 2 calibration tokens, got 1"):
        cut(step, tiny("llama"), 0.5, tmp_path / "o", random_tokens(1, 1))

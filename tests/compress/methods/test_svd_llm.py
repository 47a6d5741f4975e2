"""SVD-LLM: what the decomposition is, the ranks that are kept, and what works on factors.

That stock transformers reads its checkpoints is tested in ``test_modegpt.py``: such a process starts slowly.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mariotte import accounting
from mariotte.compress.calibration import Means, outer, second_moments
from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.heads import Heads
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.rtn import RTN
from mariotte.compress.methods.shortgpt import ShortGPT
from mariotte.compress.methods.slicegpt import SliceGPT
from mariotte.compress.methods.svd_llm import SVDLLM, output_directions
from mariotte.compress.methods.wanda import Wanda
from mariotte.compress.walk import Walk
from mariotte.cuts.ranks import rank_left
from mariotte.errors import DataError, ModelError
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.modeling_mariotte import LowRank
from mariotte.recover.methods.lora import LoRA
from mariotte.testing import recoveries
from mariotte.testing.methods import context_of, logits, run
from mariotte.testing.tiny import random_tokens, tiny


def seen(seed: int, outputs: int = 7, inputs: int = 5, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A random matrix, and inputs that correlate, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x_MI = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x_MI


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (5, 7), (6, 6)])
def test_the_error_is_the_sum_of_the_squares_of_the_singular_values_dropped(outputs, inputs):
    weight_OI, x_MI = seen(0, outputs, inputs)
    moment_II = x_MI.T @ x_MI / len(x_MI)
    left, sigma = output_directions(weight_OI, moment_II)
    by_cholesky = torch.linalg.svdvals(weight_OI @ torch.linalg.cholesky(moment_II))
    torch.testing.assert_close(sigma, by_cholesky)
    for rank in range(1, min(outputs, inputs) + 1):
        kept_OI = left[:, :rank] @ left[:, :rank].T @ weight_OI
        error = (x_MI @ (weight_OI - kept_OI).T).square().sum(1).mean()
        torch.testing.assert_close(error, sigma[rank:].square().sum(), atol=1e-9, rtol=1e-9)


def test_no_matrix_of_that_rank_is_nearer():
    weight_OI, x_MI = seen(1)
    left, sigma = output_directions(weight_OI, x_MI.T @ x_MI / len(x_MI))
    plain, size, right = torch.linalg.svd(weight_OI)
    unwhitened_OI = plain[:, :2] * size[:2] @ right[:2]
    least = sigma[2:].square().sum()
    assert least < 0.999 * (x_MI @ (weight_OI - unwhitened_OI).T).square().sum(1).mean()
    generator = torch.Generator().manual_seed(2)
    best_OI = left[:, :2] @ left[:, :2].T @ weight_OI
    for _ in range(20):
        away = 0.05 * torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
        other_OI = (left[:, :2] + away[0]) @ (left[:, :2].T @ best_OI + away[1, :5].T)
        assert (x_MI @ (weight_OI - other_OI).T).square().sum(1).mean() >= least


def test_a_singular_moment_is_no_obstacle():
    weight_OI, x_MI = seen(3, tokens=2)
    left, sigma = output_directions(weight_OI, x_MI.T @ x_MI / 2)
    assert (sigma[2:] < 1e-6 * sigma[0]).all()
    torch.testing.assert_close(left.T @ left, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(x_MI @ weight_OI.T, x_MI @ (left[:, :2] @ left[:, :2].T @ weight_OI).T)


@pytest.mark.parametrize(
    ("size", "rank", "amount", "left"),
    [
        ((32, 32), 0, 0.0, 0),
        ((32, 32), 0, 0.125, 14),
        ((32, 32), 0, 0.5, 8),
        ((48, 32), 0, 0.25, 14),
        ((32, 32), 0, 0.99, 1),
        ((32, 32), 8, 0.5, 4),
        ((32, 32), 8, 0.0, 8),
        ((1, 32), 0, 0.5, 0),  # two factors of rank 1 would be larger
        ((80, 80), 0, 0.1, 36),
    ],
)
def test_ranks_are_those_of_the_published_code(size, rank, amount, left):
    assert rank_left(*size, rank, amount) == left


@pytest.mark.parametrize("scope", ["all", "attention", "ffn"])
def test_the_scope_says_what_becomes_a_product(scope, tmp_path):
    model = tiny("qwen2")
    step = SVDLLM(scope=scope)
    cut = run(step, model, 0.25, tmp_path)
    products = {name.rpartition(".")[2] for name, module in cut.hf.named_modules() if isinstance(module, LowRank)}
    attention, ffn = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert products == {"all": attention | ffn, "attention": attention, "ffn": ffn}[scope]
    assert cut.measured_params() == cut.counts.n_params == accounting.count(cut.config).n_params
    assert cut.measured_params() == model.counts.n_params - step.removes(model, 0.25)
    weights = sum(matrix.weight.numel() for matrix in model.matrices(scope))
    assert cut.done[-1].obtained == pytest.approx(step.removes(model, 0.25) / weights)
    assert cut.done[-1].obtained >= 0.25
    # Biases stay, at the end.
    if scope != "ffn":
        assert torch.equal(cut.blocks[1].query.bias, model.blocks[1].query.bias)


@torch.no_grad()
def test_the_first_matrices_are_the_best_on_the_text(tmp_path):
    model = tiny("llama")
    context = context_of(model, tmp_path)
    cut = run(SVDLLM(), model, 0.5, tmp_path / "a")
    block, before = cut.blocks[0], model.blocks[0]
    (moment_II,) = second_moments(model, context, "test", {"x": [before.query]}).values()
    for path, linear in (("self_attn.q_proj", before.query), ("self_attn.v_proj", before.value)):
        (_, first), (_, second) = block.factors(path)
        assert second.weight.shape[1] == first.weight.shape[0] == rank_left(*linear.weight.shape, 0, 0.5)
        _, sigma = output_directions(linear.weight.double(), moment_II)
        rank = len(first.weight)
        missing_OI = linear.weight.double() - (second.weight @ first.weight).double()
        error = ((missing_OI @ moment_II) * missing_OI).sum()
        torch.testing.assert_close(error, sigma[rank:].square().sum(), rtol=1e-4, atol=0.0)


def test_sequentially_a_block_sees_the_factored_ones_before_it(tmp_path):
    model = tiny("llama", layers=3)
    tokens = random_tokens(64, 24)
    found = [
        run(SVDLLM(sequential=sequential), model, 0.4, tmp_path / str(sequential), tokens)
        for sequential in (True, False)
    ]
    context = context_of(model, tmp_path, tokens)
    for cut, same in zip(found, (True, False), strict=True):
        walk, means = Walk(cut, context, "test"), Means(outer)
        for block in cut.blocks[:2]:
            walk.advance(block.module)
        (_, first), (_, second) = cut.blocks[2].factors("self_attn.q_proj")
        walk.observe(cut.blocks[2].module, {"x": [first]}, means)
        directions, _ = output_directions(model.blocks[2].query.weight.double(), means.result("test", model)["x"])
        best = directions[:, : len(first.weight)]
        kept = second.weight.double()
        assert torch.allclose(best @ best.T, kept @ kept.T, atol=1e-4) == same


def test_flops_equal_torchs_own_count(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    cut = run(SVDLLM(), tiny("llama"), 0.5, tmp_path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cut.logits(torch.zeros(1, 1, dtype=torch.long))
    assert counter.get_total_flops() == pytest.approx(accounting.count(cut.config, context=1).flops_per_token, rel=0.02)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_matrix_methods_work_on_the_factors_and_width_methods_are_refused(family, tmp_path):
    cut = run(SVDLLM(), tiny(family), 0.3, tmp_path / "a")
    assert len(cut.matrices("all")) == 2 * len(tiny(family).matrices("all"))
    assert all(isinstance(matrix, nn.Linear) for matrix in cut.matrices("all"))
    for step, amount in ((Magnitude(), 0.5), (Wanda(), 0.5), (RTN(), 4), (SVDLLM(), 0.3), (ShortGPT(), 0.5)):
        after = run(step, cut, amount, tmp_path / step.name())
        assert after.measured_params() == after.counts.n_params
        loaded = load(checkpoint.save(after, tmp_path / f"saved {step.name()}"))
        torch.testing.assert_close(logits(loaded), logits(after))
        assert loaded.shape == after.shape
    sparse = run(Wanda(), cut, 0.5, tmp_path / "sparse")
    assert sparse.zeros() == sum(len(m.weight) * (m.weight.shape[1] // 2) for m in cut.matrices("all"))
    for step in (FFN(), Heads(), SliceGPT()):
        assert step.refuse(cut) == (
            "needs whole matrices, and this model holds some as products of two: do it before svd-llm"
        )
    for step in (FFN(), SliceGPT()):
        both = run(
            SVDLLM(), run(step, tiny(family), 0.3, tmp_path / f"b{step.name()}"), 0.3, tmp_path / step.name() / "c"
        )
        assert both.measured_params() == both.counts.n_params
        assert logits(load(checkpoint.save(both, tmp_path / f"both {step.name()}"))).isfinite().all()


def test_lora_trains_beside_the_factors_and_is_merged_into_them(tmp_path):
    corpus = recoveries.counting_corpus(tmp_path)
    cut = run(SVDLLM(), recoveries.tiny_reader("llama", layers=2), 0.5, tmp_path / "cut")
    context = recoveries.context_of(cut, tmp_path / "lora", corpus)
    healed = recoveries.recovered(LoRA(rank=4, lr=2e-2), cut, context, [1_600])[1_600]
    assert healed.done[-1].facts["loss_end"] < healed.done[-1].facts["loss_begin"]
    assert healed.measured_params() == cut.measured_params()
    assert not torch.equal(healed.blocks[0].attention[1].weight, cut.blocks[0].attention[1].weight)
    checkpoint.save(healed, tmp_path / "saved")


def test_bad_requests_are_one_sentence(tmp_path):
    model = tiny("llama")
    with pytest.raises(DataError, match=r"^svd-llm needs at least 2 calibration tokens, got 1"):
        run(SVDLLM(sequential=True), model, 0.5, tmp_path, random_tokens(1, 1))
    model.entry = dataclasses.replace(model.entry, model_type="other")
    assert str(SVDLLM().refuse(model)).startswith("needs a class for models of factors, and other has none; llama, ")
    config = {**tiny("llama").config, "model_type": "mariotte_llama"}
    with pytest.raises(ModelError, match="ranks must name matrices of the block for each of the 2 layers"):
        accounting.count({**config, "ranks": [{"self_attn.x_proj": 3}, {}]})

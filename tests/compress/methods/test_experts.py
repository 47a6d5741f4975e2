"""Fewer experts: the criterion by hand, and what is left of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn import functional

from mariotte.compress.methods.experts import Experts
from mariotte.compress.mixture import keep_expert_neurons, keep_experts
from mariotte.compress.scope import oriented
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.experiments.pipeline import compress_model
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, prepare_once
from mariotte.testing.tiny import random_tokens, tiny

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


def prepared(step: Experts, model: Model, folder: Path) -> tuple[Prepared, Context]:
    context = Context(dense=model, scratch=folder, calibration=random_tokens())
    return prepare_once(step, model, context, [0.5]), context


@torch.no_grad()
def test_reap_is_the_mean_share_times_norm_of_what_is_given(tmp_path: Path) -> None:
    """Equation by equation on mixtral's first block, whose input needs no other part of the model."""
    model = tiny("mixtral", layers=1)
    found, _ = prepared(Experts(), model, tmp_path / "reap")
    counted, _ = prepared(Experts(criterion="frequency"), model, tmp_path / "frequency")
    seen: list[torch.Tensor] = []
    mlp = cast(Any, model.blocks[0].module).mlp
    mlp.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    model.logits(random_tokens())
    x_MD = torch.cat(seen).flatten(0, 1).double()
    share_ME = (x_MD @ mlp.gate.weight.double().T).softmax(-1)
    best_M2, taken_M2 = share_ME.topk(2)
    best_M2 = best_M2 / best_M2.sum(-1, keepdim=True)
    for expert in range(4):
        gate_FD, up_FD = mlp.experts.gate_up_proj[expert].double().chunk(2)
        given_MD = (functional.silu(x_MD @ gate_FD.T) * (x_MD @ up_FD.T)) @ mlp.experts.down_proj[expert].double().T
        share_M = (best_M2 * (taken_M2 == expert)).sum(-1)
        takes = share_M > 0
        expected = (share_M * given_MD.norm(dim=1))[takes].mean()
        assert float(found.get("block-0")["score"][expert]) == pytest.approx(float(expected), rel=1e-4)
        assert float(counted.get("block-0")["score"][expert]) == pytest.approx(float(takes.double().mean()))


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_that_goes_is_one_that_is_never_chosen(family: str) -> None:
    model, tokens_BT = tiny(family), random_tokens(3, 20, seed=4)
    cut = keep_experts(model, [[0, 2, 3], [1, 2, 3]])
    assert (cut.shape.experts, cut.shape.active) == (3, 2)
    assert cut.measured_params() == cut.counts.n_params
    with torch.no_grad():
        for block, gone in zip(model.blocks, (1, 0), strict=True):
            router = block.module.get_submodule(block.entry.router)

            def never(_module: object, arguments: tuple[Any, ...], found: Any, gone: int = gone) -> Any:
                # The router's own rule, on logits in which the expert that goes has no chance.
                logits_ME = found[0].clone()
                logits_ME[:, gone] = -1e9
                if family == "gpt_oss":
                    best, taken = logits_ME.topk(2, dim=-1)
                    return logits_ME, best.softmax(1), taken
                best, taken = logits_ME.softmax(-1).topk(2, dim=-1)
                if family == "mixtral":
                    best = best / best.sum(-1, keepdim=True)
                return logits_ME, best, taken

            router.register_forward_hook(never)
        expected = model.logits(tokens_BT)
        assert torch.allclose(cut.logits(tokens_BT), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_neuron_of_an_expert_that_goes_is_one_that_gives_nothing(family: str, tmp_path: Path) -> None:
    model, tokens_BT = tiny(family), random_tokens(3, 20, seed=4)
    generator = torch.Generator().manual_seed(0)
    kept = [[torch.randperm(48, generator=generator)[:24].sort().values for _ in range(4)] for _ in model.blocks]
    cut = keep_expert_neurons(model, [(some, None) for some in kept])
    assert cut.measured_params() == cut.counts.n_params < model.counts.n_params
    with torch.no_grad():
        for block, some in zip(model.blocks, kept, strict=True):
            down = block.ffn[-1]
            held = down.weight.transpose(1, 2) if block.entry.experts_transposed else down.weight
            for expert, kept_K in enumerate(some):
                gone = torch.ones(48, dtype=torch.bool)
                gone[kept_K] = False
                held[expert][:, gone] = 0
        expected = model.logits(tokens_BT)
        loaded = load(checkpoint.save(cut, tmp_path / "saved"))
        for found in (cut, loaded):
            assert torch.allclose(found.logits(tokens_BT), expected, atol=1e-4 * float(expected.abs().max()))
    assert oriented(cut.blocks[0].ffn[-1]).shape == (4 * 32, 24)


def test_where_fewer_are_left_than_a_token_takes_it_takes_all(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    found, context = prepared(Experts(), model, tmp_path)
    cut = Experts().apply(model, found, 0.75, context)
    assert (cut.shape.experts, cut.shape.active) == (1, 1)
    assert cut.done[-1].facts["active"] == [2, 1]
    assert cut.counts.flops_per_token < model.counts.flops_per_token


def test_what_it_cannot_do_is_said_before_any_work() -> None:
    with pytest.raises(ModelError, match=r"needs a mixture of experts, and llama has one MLP a block: take ffn"):
        compress_model(tiny("llama"), "experts@0.5")
    with pytest.raises(ModelError, match=r"needs one MLP a block, and mixtral is a mixture of experts: take experts"):
        compress_model(tiny("mixtral"), "prunenet-random@0.5")
    with pytest.raises(ChainError, match="criterion must be one of reap, frequency"):
        Experts(criterion="best")
    with pytest.raises(DataError, match="needs calibration text"):
        compress_model(tiny("mixtral"), "experts@0.5")

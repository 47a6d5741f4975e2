"""Matrices that are held the other way round, and those of experts: each by what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mariotte.compress.methods.gptq import GPTQ
from mariotte.compress.methods.rtn import RTN
from mariotte.compress.methods.sparsegpt import SparseGPT
from mariotte.compress.methods.wanda import Wanda
from mariotte.compress.scope import in_scope, oriented
from mariotte.compress.sparsity import readers
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.model import Model, OfExpert
from mariotte.models.step import Step
from mariotte.testing.methods import context_of, run
from mariotte.testing.tiny import random_tokens, tiny

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
METHODS: Mapping[str, Any] = {"wanda": Wanda, "sparsegpt": SparseGPT, "gptq": GPTQ}
AMOUNTS = {"wanda": 0.5, "sparsegpt": 0.5, "gptq": 4}


def weights(model: Model, scope: str = "all") -> dict[str, Tensor]:
    return {name: oriented(matrix).detach() for name, matrix in in_scope(model, scope).items()}


def test_conv1d_is_cut_by_what_it_reads_as_if_it_were_a_linear_layer(tmp_path: Path) -> None:
    """Wanda's formula in numpy, on the inputs of GPT-2's matrices."""
    model, tokens = tiny("gpt2"), random_tokens()
    seen: dict[str, Tensor] = {}
    block = model.blocks[0]
    paths = (*block.entry.attention_paths, *block.entry.ffn_paths)
    for name, matrix in zip(paths, block.attention + block.ffn, strict=True):

        def keep(_module: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = arguments[0].detach().flatten(0, -2)

        matrix.register_forward_pre_hook(keep)
    with torch.no_grad():
        model.logits(tokens)
    for matrix in (*block.attention, *block.ffn):
        matrix._forward_pre_hooks.clear()
    cut = run(Wanda(), model, 0.5, tmp_path, tokens).blocks[0]
    for name, old, new in zip(seen, block.attention + block.ffn, cut.attention + cut.ffn, strict=True):
        weight_IO, x_MI = old.weight.detach().double().numpy(), seen[name].double().numpy()
        score_IO = np.abs(weight_IO) * np.linalg.norm(x_MI, axis=0)[:, None]
        order_IO = score_IO.argsort(0, kind="stable")
        expected = weight_IO.copy()
        np.put_along_axis(expected, order_IO[: len(weight_IO) // 2], 0.0, axis=0)
        np.testing.assert_array_equal(new.weight.detach().double().numpy(), expected)


@torch.no_grad()
def of_one_expert() -> tuple[Model, Model]:
    """A mixture whose only expert every token takes, and the dense model that computes the same."""
    same = {
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    mixture, dense = tiny("mixtral", experts=1, active=1, **same), tiny("mistral", **same)
    held = dict(mixture.hf.named_parameters())
    for name, parameter in dense.hf.named_parameters():
        if ".mlp." not in name:
            parameter.copy_(held[name])
    for one, other in zip(mixture.blocks, dense.blocks, strict=True):
        both, down = (matrix.weight[0] for matrix in one.ffn)
        for matrix, value in zip(other.ffn, (*both.chunk(2), down), strict=True):
            matrix.weight.copy_(value)
    tokens = random_tokens()
    torch.testing.assert_close(mixture.logits(tokens), dense.logits(tokens))
    return mixture, dense


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", ["wanda", "gptq"])
def test_a_mixture_of_one_expert_is_the_dense_model(name: str, sequential: bool, tmp_path: Path) -> None:
    mixture, dense = of_one_expert()
    step = cast(Step, METHODS[name](sequential=sequential))
    one, other = (run(step, model, AMOUNTS[name], tmp_path / model.name) for model in (mixture, dense))
    for a, b in zip(one.blocks, other.blocks, strict=True):
        both, down = (matrix.weight[0] for matrix in a.ffn)
        for value, matrix in zip((*both.chunk(2), down), b.ffn, strict=True):
            assert float((value != matrix.weight).double().mean()) < 0.01  # sums of two orders, next to a half
            torch.testing.assert_close(value, matrix.weight, rtol=0.02, atol=0.02)
    assert one.zeros("ffn") == other.zeros("ffn")


def routed(model: Model, tokens: Tensor) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """What each expert's two matrices read in each block, found by running experts one by one."""
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for index, block in enumerate(model.blocks):
        held = cast(Any, block.module.get_submodule(block.entry.experts))

        def keep(module: Any, arguments: tuple[Tensor, ...], index: int = index) -> None:
            x_MD, taken_Mk = arguments[:2]
            for expert in range(module.num_experts):
                x_SD = torch.stack([x for x, taken in zip(x_MD, taken_Mk, strict=True) if expert in taken.tolist()])
                weight = module.gate_up_proj[expert]
                if module.gate_up_proj.shape[1] == x_SD.shape[1] and hasattr(module, "gate_up_proj_bias"):
                    gate_up = x_SD @ weight + module.gate_up_proj_bias[expert]
                    gate, up = gate_up[:, ::2], gate_up[:, 1::2]
                    gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
                    hidden = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
                else:
                    gate, up = (x_SD @ weight.T).chunk(2, dim=1)
                    hidden = nn.functional.silu(gate) * up
                found[index, expert] = x_SD, hidden

        held.register_forward_pre_hook(keep)
    with torch.no_grad():
        model.logits(tokens)
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_each_expert_is_cut_by_the_tokens_that_take_it(family: str, tmp_path: Path) -> None:
    model, tokens = tiny(family), random_tokens()
    prepared = Wanda(sequential=False).prepare(model, context_of(model, tmp_path, tokens), [0.5])
    for (index, expert), read in routed(tiny(family), tokens).items():
        stored = prepared.get(f"block-{index}")
        for part, x_SI in zip((f"expert-{expert}", f"expert-{expert}-down"), read, strict=True):
            torch.testing.assert_close(stored[part], x_SI.double().square().mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_that_no_token_takes_goes_by_its_weights_alone(family: str, name: str, tmp_path: Path) -> None:
    model = tiny(family, experts=8, active=1, layers=1)
    tokens = random_tokens(1, 2)
    reading: set[int] = set()
    held = model.blocks[0].module.get_submodule(model.entry.experts)
    handle = held.register_forward_pre_hook(lambda _, arguments: reading.update(arguments[1].flatten().tolist()))
    with torch.no_grad():
        model.logits(tokens)
    handle.remove()
    assert 1 <= len(reading) <= 2
    step = cast(Step, METHODS[name](scope="ffn"))
    cut = run(step, model, AMOUNTS[name], tmp_path, tokens)
    rounded = run(RTN(scope="ffn"), model, 4, tmp_path / "rtn")
    for old, new, nearest in zip(model.blocks[0].ffn, cut.blocks[0].ffn, rounded.blocks[0].ffn, strict=True):
        before, after, rtn = (
            oriented(cast(nn.Module, m)).detach().view(8, -1, m.in_features) for m in (old, new, nearest)
        )
        for expert in sorted({*range(8)} - reading):
            if name == "gptq":
                torch.testing.assert_close(after[expert], rtn[expert])
                continue
            gone = after[expert] == 0
            torch.testing.assert_close(after[expert][~gone], before[expert][~gone])
            size = before[expert].abs()
            if name == "wanda":
                assert (gone.sum(1) == size.shape[1] // 2).all()
                assert (size.masked_fill(~gone, 0).amax(1) <= size.masked_fill(gone, torch.inf).amin(1)).all()
            else:
                assert gone.sum() == size.numel() // 2 + 1
                assert size[gone].max() <= size[~gone].min()


def test_readers_of_a_mixture_are_its_experts_one_by_one() -> None:
    block = tiny("gpt_oss").blocks[0]
    found = readers(block, "all")
    assert [*found] == [
        "attention",
        "output",
        *(f"expert-{number}{part}" for number in range(4) for part in ("", "-down")),
    ]
    assert all(isinstance(found[part][0], OfExpert) for part in found if part.startswith("expert"))
    sizes = {part: oriented(some[0]).shape for part, some in found.items()}
    assert sizes["expert-3"] == (96, 32)
    assert sizes["expert-3-down"] == (32, 48)
    assert [*readers(block, "attention")] == ["attention", "output"]


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "qwen3_moe"])
def test_a_streamed_model_is_cut_as_a_loaded_one(family: str, name: str, sequential: bool, tmp_path: Path) -> None:
    """What is written through views of one expert, or the other way round, reaches the scratch files."""
    folder = checkpoint.save(tiny(family), tmp_path / "model")
    step = cast(Step, METHODS[name](sequential=sequential))
    whole = run(step, load(folder), AMOUNTS[name], tmp_path / "whole")
    streamed = run(step, load(folder, stream=tmp_path / "scratch"), AMOUNTS[name], tmp_path / "streamed")
    assert streamed.streamed
    assert streamed.done == whole.done
    expected = weights(whole)
    assert all(torch.equal(found, expected[path]) for path, found in weights(streamed).items())

"""Every recovery beside the same training written out plainly in float64: model, losses, optimizer, rates, rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mariotte.compress.blocks import keep_blocks
from mariotte.models.model import Done, Model
from mariotte.recover.learner import matrices
from mariotte.recover.methods.block import BlockLocal
from mariotte.recover.methods.distill import Distill
from mariotte.recover.methods.full import Full
from mariotte.recover.methods.lora import LoRA
from mariotte.recover.trunk import Recovery
from mariotte.testing.recoveries import BLOCK, context_of, counting_corpus, recovered, tiny_reader

Weights = Mapping[str, Tensor]

ROWS, BATCH, WARMUP = 61, 5, 3
STEPS, LEAVE = 13, 10  # 12 batches of five rows and one of one; ten whole batches lie within 54.9 rows


# -- the model --------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@dataclass(frozen=True)
class Llama:
    """A Llama by its equations."""

    layers: int
    heads: int
    kv_heads: int
    eps: float
    theta: float

    @classmethod
    def like(cls, model: Model) -> Llama:
        config = model.hf.config
        return cls(
            len(model.blocks),
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rms_norm_eps,
            config.rope_parameters["rope_theta"],
        )

    def turn(self, x_BNTH: Tensor) -> Tensor:
        n_tokens, size = x_BNTH.shape[-2:]
        exponents = torch.arange(size // 2, dtype=torch.float64) * 2 / size
        angle = torch.arange(n_tokens)[:, None] / self.theta**exponents
        first, second = x_BNTH.chunk(2, -1)
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    def block(self, w: Weights, i: int, x_BTD: Tensor) -> Tensor:
        def weight(name: str) -> Tensor:
            return w[f"model.layers.{i}.{name}.weight"]

        h = norm(x_BTD, weight("input_layernorm"), self.eps)
        q, k, v = (
            (h @ weight(f"self_attn.{name}_proj").T).unflatten(-1, (n, -1)).transpose(1, 2)
            for name, n in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        each = self.heads // self.kv_heads
        k, v = self.turn(k).repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        scores = self.turn(q) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        mixed = scores.masked_fill(~past, -math.inf).softmax(-1) @ v
        x_BTD = x_BTD + mixed.transpose(1, 2).flatten(2) @ weight("self_attn.o_proj").T
        h = norm(x_BTD, weight("post_attention_layernorm"), self.eps)
        gate = h @ weight("mlp.gate_proj").T
        return x_BTD + (gate * gate.sigmoid() * (h @ weight("mlp.up_proj").T)) @ weight("mlp.down_proj").T

    def streams(self, w: Weights, tokens_BT: Tensor) -> list[Tensor]:
        """What enters each block, and what leaves the last."""
        found = [w["model.embed_tokens.weight"][tokens_BT]]
        for i in range(self.layers):
            found.append(self.block(w, i, found[-1]))
        return found

    def predictions(self, w: Weights, tokens_BT: Tensor) -> Tensor:
        """Log probabilities of the next token, of each position but the last."""
        last = norm(self.streams(w, tokens_BT)[-1], w["model.norm.weight"], self.eps)
        return (last @ w["lm_head.weight"].T).log_softmax(-1)[:, :-1]

    def text(self, w: Weights, tokens_BT: Tensor) -> Tensor:
        return -self.predictions(w, tokens_BT).gather(-1, tokens_BT[:, 1:, None]).mean()


def weights_of(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in model.hf.named_parameters()}


# -- training ---------------------------------------------------------------------------------------------------------


def factor(step: int, leave: int) -> float:
    rise = min(1.0, (step + 1) / WARMUP)
    return rise if step < leave else min(rise, (STEPS - step) / (STEPS - leave + 1))


def descend(
    start: Mapping[str, Tensor], loss: Callable[[Weights, Tensor], Tensor], rows: Tensor, rate: float, leave: int
) -> tuple[dict[str, Tensor], list[float]]:
    """Adam with its gradient cut to length one, and the loss of each batch before it was learned."""
    values = {name: value.double().clone() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    losses: list[float] = []
    for step, batch in enumerate(rows.split(BATCH)):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        value = loss(leaves, batch)
        losses.append(value.item())
        slopes = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        length = math.sqrt(sum(float(slope.square().sum()) for slope in slopes.values()))
        for name, slope in slopes.items():
            slope = slope * min(1.0, 1 / (length + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.999 * second[name] + 0.001 * slope.square()
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            values[name] = values[name] - rate * factor(step, leave) * mean / (square.sqrt() + 1e-8)
    assert len(losses) == STEPS
    return values, losses


def expected(step: Recovery, model: Model, dense: Model, rows: Tensor, scratch: Path) -> tuple[Weights, list[float]]:
    """The weights that a recovery should give, and the losses of its batches."""
    given, taught = weights_of(model), weights_of(dense)
    student, teacher = Llama.like(model), Llama.like(dense)
    ends = [3, 4] if isinstance(step, BlockLocal) and len(dense.blocks) == 4 else range(1, len(model.blocks) + 1)

    def loss(w: Weights, tokens_BT: Tensor) -> Tensor:
        if isinstance(step, Distill):
            log_p = (teacher.predictions(taught, tokens_BT) / step.temperature).log_softmax(-1)
            log_q = (student.predictions(w, tokens_BT) / step.temperature).log_softmax(-1)
            apart = step.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            return (1 - step.mix) * apart + step.mix * student.text(w, tokens_BT)
        if isinstance(step, BlockLocal):
            wanted = teacher.streams(taught, tokens_BT)
            own = [stream.detach() for stream in student.streams(w, tokens_BT)]
            total, begin = torch.zeros((), dtype=torch.float64), 0
            for i, end in enumerate(ends):
                found = student.block(w, i, own[i] if step.inputs == "stream" else wanted[begin])
                error = (found - wanted[end]).square().sum() / (wanted[end] - wanted[begin]).square().sum()
                total, begin = total + error / len(own[1:]), end
            return total
        return student.text(w, tokens_BT)

    leave = 0 if step.trunk is False else LEAVE
    if isinstance(step, LoRA) or getattr(step, "adapters", False):
        rank, alpha = step.rank, step.alpha  # pyright: ignore[reportAttributeAccessIssue]
        context = context_of(dense, scratch, None)
        module = step.learner(model, context).module
        start: dict[str, Tensor] = {}
        for path, matrix in matrices(model).items():
            start[f"{path}.a"] = a_RI = module.get_submodule(path).a_RI.detach()
            assert a_RI.abs().max() <= 1 / math.sqrt(matrix.in_features)
            start[f"{path}.b"] = torch.zeros(matrix.out_features, rank)

        def whole(values: Weights) -> dict[str, Tensor]:
            changed = {
                f"{path}.weight": given[f"{path}.weight"] + alpha / rank * values[f"{path}.b"] @ values[f"{path}.a"]
                for path in matrices(model)
            }
            return {**given, **changed}

        values, losses = descend(start, lambda values, batch: loss(whole(values), batch), rows, step.lr or 0, leave)
        return whole(values), losses
    start = {name: w for name, w in given.items() if not isinstance(step, BlockLocal) or ".layers." in name}
    values, losses = descend(start, lambda values, batch: loss({**given, **values}, batch), rows, step.lr or 0, leave)
    return {**given, **values}, losses


def damaged(model: Model) -> Model:
    result = model.copy()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for matrix in result.matrices("ffn"):
            matrix.weight.add_(0.05 * torch.randn(matrix.weight.shape, generator=generator))
    return result


def shortened(model: Model) -> Model:
    """The model without its second and third block, as a history tells it."""
    gone = Done(
        step="shortgpt@0.5",
        name="shortgpt",
        unit="blocks",
        family="depth",
        amount=0.5,
        obtained=0.5,
        facts={"removed_blocks": [1, 2]},
    )
    return keep_blocks(model, [0, 3]).after(gone)


SETTINGS = {"batch": BATCH, "warmup": WARMUP}
CASES: dict[str, Recovery] = {
    "lora": LoRA(lr=1e-2, rank=4, alpha=6.0, **SETTINGS),
    "lora alone": LoRA(lr=1e-2, rank=4, trunk=False, **SETTINGS),
    "full": Full(lr=3e-3, **SETTINGS),
    "distill": Distill(lr=1e-2, rank=4, temperature=2.0, **SETTINGS),
    "distill whole, mixed": Distill(lr=3e-3, adapters=False, mix=0.25, temperature=1.5, **SETTINGS),
    "block": BlockLocal(lr=3e-3, **SETTINGS),
    "block, dense inputs": BlockLocal(lr=3e-3, inputs="dense", **SETTINGS),
    "block, adapters": BlockLocal(lr=1e-2, adapters=True, rank=4, **SETTINGS),
}


@pytest.mark.parametrize(
    ("case", "cut"),
    # Only block asks which blocks went.
    [*((case, damaged) for case in CASES), *((case, shortened) for case in CASES if case.startswith("block"))],
)
def test_it_is_the_training_written_out(case: str, cut: Callable[[Model], Model], tmp_path: Path) -> None:
    step = CASES[case]
    corpus = counting_corpus(tmp_path)
    dense = tiny_reader("llama", layers=2 if cut is damaged else 4)
    model, context = cut(dense), context_of(dense, tmp_path / "scratch", corpus)
    amount = ROWS * BLOCK + 7  # rounded down to rows
    result = recovered(step, model, context, [amount, 3 * amount])[amount]
    rows = step._stream(model, context, ROWS).rows(0, ROWS)
    wanted, losses = expected(step, model, dense, rows, tmp_path / "naive")
    facts = result.done[-1].facts
    leave = 0 if step.trunk is False else LEAVE
    assert (facts["rows"], facts["steps"], result.done[-1].tokens) == (ROWS, STEPS, ROWS * BLOCK)
    assert facts["decay_tokens"] == (ROWS - leave * BATCH) * BLOCK
    assert facts["loss_begin"] == pytest.approx(losses[0], rel=1e-4)
    assert facts["loss_end"] == pytest.approx(sum(losses[leave:]) / len(losses[leave:]), rel=1e-3)
    before, after = weights_of(model), weights_of(result)
    apart = sum(float((after[name] - wanted[name]).square().sum()) for name in wanted)
    moved = sum(float((wanted[name] - before[name]).square().sum()) for name in wanted)
    assert moved > 0
    assert math.sqrt(apart / moved) < 1e-3  # found: at most 8e-5

"""Mixtures of experts: what each expert reads and gives on calibration text, and fewer of them.

Shapes: E experts of a block, S tokens that take an expert, M tokens at once, D model width, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mariotte.compress.calibration import observe
from mariotte.compress.scope import oriented, turned
from mariotte.compress.surgery import derive, parameter_names
from mariotte.models.model import Block, Model, Stacked
from mariotte.models.step import Context


@dataclass(frozen=True)
class Routed:
    """The tokens that took one expert, in one pass of some rows.

    Parameters
    ----------
    expert : which one
    share_S : with which its output is multiplied before it is added to the others'
    hidden_SF : what its down projection reads
    output_SD : what it gives
    """

    expert: int
    share_S: Tensor
    hidden_SF: Tensor
    output_SD: Tensor


@torch.no_grad()
def watch_experts(
    model: Model, context: Context, step: str, gather: Callable[[int, Routed], None], tokens: Callable[[int], None]
) -> None:
    """Run the calibration tokens, and hand on what each expert of each block read and gave.

    Parameters
    ----------
    gather : called with the number of the block and what one of its experts did
    tokens : called with the number of tokens of each pass through the first block

    Raises
    ------
    DataError
        When the run has no calibration text.

    Notes
    -----
    Cost: a forward pass in which every expert is computed twice.
    """

    def watch(index: int, block: Block) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        ins, downs = (cast(Stacked, matrix) for matrix in block.ffn)

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_MD, taken_Mk, shares_Mk = cast("tuple[Tensor, Tensor, Tensor]", arguments[:3])
            if index == 0:
                tokens(len(x_MD))
            for expert in range(ins.experts):
                token_S, place_S = (taken_Mk == expert).nonzero(as_tuple=True)
                if len(token_S):
                    hidden_SF = cast(Any, module)._apply_gate(_applied(ins, expert, x_MD[token_S]))
                    output_SD = _applied(downs, expert, hidden_SF)
                    gather(index, Routed(expert, shares_Mk[token_S, place_S], hidden_SF, output_SD))

        return hook

    handles = [
        block.module.get_submodule(block.entry.experts).register_forward_pre_hook(watch(index, block))
        for index, block in enumerate(model.blocks)
    ]
    try:
        observe(model, context, step, {}, lambda group, x_MD: None)
    finally:
        for handle in handles:
            handle.remove()


def _applied(matrix: Stacked, expert: int, x_SI: Tensor) -> Tensor:
    """What the matrix of one expert makes of its inputs."""
    weight = matrix.weight[expert]
    bias_O = None if matrix.bias is None else matrix.bias[expert]
    return functional.linear(x_SI, weight.T if matrix.transposed else weight, bias_O)


@torch.no_grad()
def keep_experts(model: Model, kept: Sequence[Sequence[int]]) -> Model:
    """A model with some experts of each block, in their old order; the given one stays as it is.

    Parameters
    ----------
    kept : experts that stay, as many in each block, at least one

    Notes
    -----
    What chooses among them loses their rows. A token takes as many as before, or all where fewer are left.
    """
    (count,) = {len(some) for some in kept}
    names = parameter_names(model)
    weights: dict[str, Tensor] = {}
    for block, some in zip(model.blocks, kept, strict=True):
        router = block.module.get_submodule(block.entry.router)
        held: list[nn.Parameter] = [*router.parameters()]
        for matrix in block.ffn:
            held += list(matrix.parameters())
        weights |= {names[parameter]: parameter[sorted(some)] for parameter in held}
    entry, shape = model.entry, model.shape
    active = min(shape.active, count)
    cut = derive(model, weights, {entry.expert_count: count, entry.active_experts: active})
    _restate(cut, {"num_experts": count, "num_experts_per_tok": active, "top_k": active})
    return cut


def keep_expert_neurons(
    model: Model, kept: Sequence[Sequence[Tensor]], downs: Sequence[Sequence[Tensor]] | None = None
) -> Model:
    """A model with some neurons of each expert; the given one stays as it is.

    Parameters
    ----------
    kept : (K,) int64 for each expert of each block, the same K: the neurons that stay, in the order of `downs`
    downs : (D, K) for each: their down projection; None takes their columns as they are
    """
    names = parameter_names(model)
    weights: dict[str, Tensor] = {}
    (width,) = {len(kept_K) for some in kept for kept_K in some}
    for index, block in enumerate(model.blocks):
        ins, down = (cast(Stacked, matrix) for matrix in block.ffn)
        rows = [expert_rows(block, kept_K.to(model.device)) for kept_K in kept[index]]
        each_EOI = oriented(cast(nn.Module, ins)).view(ins.experts, -1, ins.in_features)
        cut_OI = torch.cat([each_EOI[expert, some] for expert, some in enumerate(rows)])
        weights[names[ins.weight]] = turned(cast(nn.Module, ins), cut_OI)
        if ins.bias is not None:
            weights[names[ins.bias]] = torch.stack([ins.bias[expert, some] for expert, some in enumerate(rows)])
        old_EDF = expert_downs(block)
        new = [
            old_EDF[expert][:, kept_K.to(model.device)] if downs is None else downs[index][expert].to(old_EDF)
            for expert, kept_K in enumerate(kept[index])
        ]
        weights[names[down.weight]] = turned(cast(nn.Module, down), torch.cat(new))
    cut = derive(model, weights, {model.entry.ffn: width})
    _restate(cut, {"intermediate_dim": width, "intermediate_size": width})
    return cut


def expert_downs(block: Block) -> Tensor:
    """(E, D, F) the down projections of a block's experts."""
    down = cast(Stacked, block.ffn[-1])
    return oriented(cast(nn.Module, down)).view(down.experts, -1, down.in_features)


def expert_rows(block: Block, kept_K: Tensor) -> Tensor:
    """Rows of gate and up of some neurons of an expert: in turn, or all gates above all ups, as the family has them."""
    if block.entry.experts_transposed:
        return torch.stack([2 * kept_K, 2 * kept_K + 1], dim=1).flatten()
    return torch.cat([kept_K, kept_K + cast(Stacked, block.ffn[0]).out_features // 2])


def _restate(model: Model, sizes: Mapping[str, int]) -> None:
    """Make what modules say of experts agree with the config: forward passes read it."""
    within = {id(module) for block in model.blocks for module in block.module.modules()}
    for module in model.hf.modules():
        for name, value in sizes.items():
            known = id(module) in within or name in ("num_experts", "num_experts_per_tok")
            if known and isinstance(getattr(module, name, None), int):
                setattr(module, name, value)

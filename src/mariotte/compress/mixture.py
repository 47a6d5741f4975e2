"""Mixtures of experts: what each expert reads and gives on calibration text, and fewer of them.

Shapes: E experts of a block, S tokens that take an expert, M tokens at once, D model width, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mariotte.compress.calibration import observe
from mariotte.compress.scope import oriented, turned
from mariotte.compress.surgery import derive, gathered, parameter_names
from mariotte.compress.walk import hooked
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
    model: Model,
    context: Context,
    step: str,
    gather: Callable[[int, Routed], None],
    tokens: Callable[[int], None],
    passed: Callable[[int], None] = lambda index: None,
) -> None:
    """Run the calibration tokens, and hand on what each expert of each block read and gave.

    Parameters
    ----------
    gather : called with the number of the block and what one of its experts did
    tokens : called with the number of tokens of each pass through the first block
    passed : called with the number of each block whose experts are not run any more: of a streamed model one after
        another, of one in memory at the end

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
                    hidden_SF = cast(Any, module)._apply_gate(ins.applied(expert, x_MD[token_S]))
                    output_SD = downs.applied(expert, hidden_SF)
                    gather(index, Routed(expert, shares_Mk[token_S, place_S], hidden_SF, output_SD))

        return hook

    held = [block.module.get_submodule(block.entry.experts) for block in model.blocks]
    handles = [
        experts.register_forward_pre_hook(watch(index, block))
        for index, (experts, block) in enumerate(zip(held, model.blocks, strict=True))
    ]
    groups = {str(index): [experts] for index, experts in enumerate(held)}
    with hooked(handles):
        observe(model, context, step, groups, lambda group, x_MD: None, passed=lambda group: passed(int(group)))


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
    weights = gathered(model)
    for block, some in zip(model.blocks, kept, strict=True):
        router = block.module.get_submodule(block.entry.router)
        held: list[nn.Parameter] = [*router.parameters()]
        for matrix in block.ffn:
            held += list(matrix.parameters())
        for parameter in held:
            weights[names[parameter]] = parameter[sorted(some)]
    entry, shape = model.entry, model.shape
    active = min(shape.active, count)
    cut = derive(model, weights, {entry.expert_count: count, entry.active_experts: active})
    _restate(cut, {"num_experts": count, "num_experts_per_tok": active, "top_k": active})
    return cut


def keep_expert_neurons(model: Model, kept: Iterable[tuple[Sequence[Tensor], Sequence[Tensor] | None]]) -> Model:
    """A model with some neurons of each expert; the given one stays as it is.

    Parameters
    ----------
    kept : for each block, asked for one after another: of each expert (K,) int64, the same K everywhere, the neurons
        that stay; and (D, K), their down projection in that order, or None for all to take their columns as they are
    """
    names = parameter_names(model)
    weights = gathered(model)
    widths: set[int] = set()
    for block, (stay, downs) in zip(model.blocks, kept, strict=True):
        widths |= {len(kept_K) for kept_K in stay}
        ins, down = (cast(Stacked, matrix) for matrix in block.ffn)
        rows = [expert_rows(block, kept_K.to(model.device)) for kept_K in stay]
        each_EOI = oriented(cast(nn.Module, ins)).view(ins.experts, -1, ins.in_features)
        cut_OI = torch.cat([each_EOI[expert, some] for expert, some in enumerate(rows)])
        weights[names[ins.weight]] = turned(cast(nn.Module, ins), cut_OI)
        if ins.bias is not None:
            weights[names[ins.bias]] = torch.stack([ins.bias[expert, some] for expert, some in enumerate(rows)])
        old_EDF = expert_downs(block)
        new = [
            old_EDF[expert][:, kept_K.to(model.device)] if downs is None else downs[expert].to(old_EDF)
            for expert, kept_K in enumerate(stay)
        ]
        weights[names[down.weight]] = turned(cast(nn.Module, down), torch.cat(new))
    (width,) = widths
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

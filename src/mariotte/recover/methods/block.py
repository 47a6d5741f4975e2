"""Block-local reconstruction: every block learns what the dense model's block gives, by itself.

Shapes: B rows of a batch, T tokens of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte.errors import ChainError, ModelError
from mariotte.models.model import Done, Model
from mariotte.models.step import Context
from mariotte.recover.learner import Adapters, Learner, Weights, cannot_adapt, cannot_train, check_adapters
from mariotte.recover.losses import Loss
from mariotte.recover.trunk import Recovery

__all__ = ["BlockLocal"]


def _taken(done: Sequence[Done]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Name, family and facts of each step of a history; a search over methods is the steps that it took."""
    found: list[tuple[str, str, Mapping[str, Any]]] = []
    for each in done:
        if each.family == "mixed":
            found += [(step["name"], step["family"], step["facts"]) for step in each.facts["steps"]]
        else:
            found.append((each.name, each.family, each.facts))
    return found


def spans(model: Model, layers: int, *, before: int = 0) -> list[tuple[int, int]]:
    """For each block, the dense blocks from the first up to the last, excluded, whose work it does.

    Where blocks went, the one before them bridges the gap; blocks that went in front of the first are the first one's.

    Parameters
    ----------
    model : its history says which blocks went, at their place in the model of that moment
    layers : blocks of the dense model
    before : entries of the history that are the dense model's own

    Raises
    ------
    ModelError
        When the history does not say which blocks went.
    """
    kept = list(range(layers))
    for _, _, facts in _taken(model.done[before:]):
        gone = set(cast("Sequence[int]", facts.get("removed_blocks", ())))
        kept = [index for place, index in enumerate(kept) if place not in gone]
    if len(kept) != len(model.blocks):
        raise ModelError(
            f"block compares each block with the dense model's, and which of its {layers} blocks the "
            f"{len(model.blocks)} of {model.name} were is not known: recover it with lora, full or distill"
        )
    starts = [0, *kept[1:]]
    return list(zip(starts, [*starts[1:], layers], strict=True))


def relative_error(found_BTD: Tensor, wanted_BTD: Tensor, entered_BTD: Tensor) -> Tensor:
    """Squared error of what a block gives, as a share of what the dense one adds to its input, float32."""
    error = (found_BTD.float() - wanted_BTD.float()).square().sum()
    return error / (wanted_BTD.float() - entered_BTD.float()).square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def _output(found: Any) -> Tensor:
    return cast(Tensor, found[0] if isinstance(found, tuple) else found)


@dataclass(frozen=True, kw_only=True)
class BlockLocal(Recovery):
    """Recover block by block: no gradient leaves a block.

    Parameters
    ----------
    inputs : what a block is given while it learns, dense (what enters the dense block) or stream (what the compressed
        model brings there)
    adapters : true trains low-rank adapters as lora does, false all weights of the blocks
    rank, alpha : of the adapters
    lr : learning rate of the trunk; None takes 2e-3 for adapters, 1e-3 for weights, less beyond a hidden size of 128
    batch, block, warmup, corpus, trunk, keep_best, repeats, gain, most : see `Recovery`

    Notes
    -----
    The loss is the mean over blocks of the squared error of the block's output, relative to what the dense block adds
    to its input. The input of every block is cut off from the blocks before it, so that there is no backward pass
    through the model, and all blocks learn from the same rows at once. After blocks were removed, the one before the
    gap learns to give what the dense model has after it. ``loss_begin`` and ``loss_end`` are of this loss,
    ``valid_before`` and ``valid_after`` cross entropies. Nothing outside the blocks trains.

    A model whose residual stream was cut or turned (`slice`, `slicegpt`) is refused: its outputs do not live in the
    dense model's space.

    The defaults are ours, from a testbed model of width 128 (dense test loss 1.3371) and 16k tokens: after ``ffn@0.5``
    (1.3629) whole weights gave 1.3465, adapters 1.3491 and with dense inputs 1.3529; lora gave 1.3486. After
    ``shortgpt@0.2`` (1.4001) adapters gave 1.3832, with dense inputs 1.3938, whole weights at a rate of 3e-4 1.3683;
    lora gave 1.3571, which lowers the loss of the text itself: prefer it where blocks went.

    Costs: those of lora or full, and one forward pass of the dense model a step.

    References
    ----------
    Block-wise reconstruction for pruned models: [guo2024ebft]_ section 3. Ours differs: all blocks at once, and one
    trunk for every D: [hagele2024scaling]_.
    """

    reference: ClassVar[str] = "guo2024ebft"

    inputs: str = "stream"
    adapters: bool = False
    rank: int = 16
    alpha: float = 32.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapters(self.name(), self.rank, self.alpha)
        if self.inputs not in ("dense", "stream"):
            raise ChainError(f"block: inputs must be dense or stream, got {self.inputs!r}")

    @override
    def refuse(self, model: Model) -> str | None:
        return (cannot_adapt if self.adapters else cannot_train)(self.name(), model)

    @override
    def rate(self, model: Model) -> float:
        return (2e-3 if self.adapters else 1e-3) * min(1.0, (128 / model.shape.hidden) ** (2 / 3))

    @override
    def learner(self, model: Model, context: Context) -> Learner:
        if self.adapters:
            return Adapters.beside(model, context, self.name(), rank=self.rank, alpha=self.alpha)
        return Weights.of(model, within=model.entry.blocks)

    @override
    def loss(self, model: Model, context: Context) -> Loss:
        dense = context.dense
        before = len(dense.done)  # a checkpoint that was compressed before is dense here
        turned = [name for name, family, _ in _taken(model.done[before:]) if family == "slice"]
        if turned:
            raise ModelError(
                f"block compares the outputs of blocks with the dense model's, and after {turned[0]} those of "
                f"{model.name} do not live in the same space: recover it with lora, full or distill"
            )
        if dense.shape.hidden != model.shape.hidden:
            raise ModelError(
                f"block compares the outputs of blocks with the dense model's, and those of {model.name} have "
                f"{model.shape.hidden} values where the dense model's have {dense.shape.hidden}: recover it with lora, "
                "full or distill"
            )
        between = spans(model, len(dense.blocks), before=before)
        path = model.entry.blocks

        def local(module: nn.Module, tokens_BT: Tensor) -> Tensor:
            streams = _dense_streams(dense, tokens_BT)
            found: list[Tensor] = []

            def cut(place: int) -> Callable[..., tuple[Any, ...]]:
                def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
                    own = cast(Tensor, arguments[0]).detach()
                    given = streams[between[place][0]].to(own) if self.inputs == "dense" else own
                    return (given, *arguments[1:])

                return hook

            def keep(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
                found.append(_output(output))

            # Under several processes what comes in is accelerate's wrapping, with the model inside.
            inner = cast(nn.Module, getattr(module, "module", module))
            with ExitStack() as stack:
                for place, block in enumerate(cast(nn.ModuleList, inner.get_submodule(path))):
                    stack.callback(block.register_forward_pre_hook(cut(place)).remove)
                    stack.callback(block.register_forward_hook(keep).remove)
                module(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), use_cache=False)
            errors = [
                relative_error(output, streams[end].to(output.device), streams[start].to(output.device))
                for output, (start, end) in zip(found, between, strict=True)
            ]
            return torch.stack(errors).mean()

        return local

    @override
    def settings(self) -> Mapping[str, Any]:
        used = {"rank": self.rank, "alpha": self.alpha} if self.adapters else {}
        return {"inputs": self.inputs, "adapters": self.adapters, **used}


@torch.no_grad()
def _dense_streams(dense: Model, tokens_BT: Tensor) -> list[Tensor]:
    """What enters each block of the dense model, and what leaves the last, (B, T, D) each."""
    streams: list[Tensor] = []

    def enter(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        streams.append(cast(Tensor, arguments[0]))

    def leave(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        streams.append(_output(output))

    blocks = [block.module for block in dense.blocks]
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter).remove)
        stack.callback(blocks[-1].register_forward_hook(leave).remove)
        dense.hf.base_model(
            input_ids=tokens_BT.to(dense.device), attention_mask=torch.ones_like(tokens_BT), use_cache=False
        )
    return streams

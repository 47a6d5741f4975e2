"""Fewer blocks: those that change the stream least go.

Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from typing_extensions import override

from mariotte.architectures import Need
from mariotte.compress.blocks import keep_blocks, removed_with_blocks
from mariotte.compress.influence import block_influence
from mariotte.cuts.blocks import kept_blocks, refuse_unlike_blocks
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["ShortGPT"]


@dataclass(frozen=True, kw_only=True)
class ShortGPT(Step):
    """Remove the blocks whose output points where their input does.

    Notes
    -----
    Block Influence is one minus the mean cosine of a block's input and output over calibration tokens. The blocks with
    the least go, all by their influence in the uncut model; of equal ones the first goes first. At least one stays.

    When to use it: each block removed makes prefill and decode faster by its share, on any hardware, and no width
    becomes odd. In models of few blocks none is redundant: one of five removed cost 0.06 to 0.18 nats on two testbed
    models, two cost 0.56 to 0.78.

    Cost: one forward pass over the calibration tokens; an amount costs a copy of what stays.

    References
    ----------
    [men2024shortgpt]_ section 3.
    """

    unit: ClassVar[str] = "blocks"
    family: ClassVar[str] = "depth"
    reference: ClassVar[str] = "men2024shortgpt"
    streams: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("causal",)
    mixtures: ClassVar[bool] = True

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_unlike_blocks(model)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        return removed_with_blocks(model, kept_blocks(model, amount))

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        influence_L = block_influence(model, context, self.name())
        prepared = Prepared(context.scratch)
        prepared.put("influence", {"influence": influence_L, "order": influence_L.argsort(stable=True)})
        return prepared.finish(influence=[round(float(value), 6) for value in influence_L])

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        layers, left = model.shape.layers, kept_blocks(model, amount)
        order = cast("list[int]", prepared.get("influence")["order"].tolist())
        gone = sorted(order[: layers - left])
        done = self.done(amount, 1 - left / layers, layers=[layers, left], removed_blocks=gone)
        return keep_blocks(model, order[layers - left :]).after(done)

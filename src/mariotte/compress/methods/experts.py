"""Fewer experts in each block of a mixture: those whose answers weigh least go.

Shapes: E experts of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mariotte import accounting
from mariotte.architectures import Need
from mariotte.compress.calibration import check_finite, tokens_for
from mariotte.compress.mixture import Routed, keep_experts, watch_experts
from mariotte.compress.surgery import cut_width
from mariotte.cuts.neurons import refuse_dense
from mariotte.errors import ChainError
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["Experts"]

CRITERIA = ("reap", "frequency")


@dataclass(frozen=True, kw_only=True)
class Experts(Step):
    """Remove the same number of experts from each block.

    Parameters
    ----------
    criterion : which experts matter. reap: the mean, over the calibration tokens that take the expert, of its share
        times the norm of what it gives; frequency: how many tokens take it

    Raises
    ------
    ChainError
        When the criterion is neither.

    Notes
    -----
    An expert that no calibration token takes scores nothing and goes first; of equal ones the first goes first. At
    least one stays. Rows of what chooses among the experts go with them, so that a token takes the best of those that
    are left, as many as before or all where fewer are left.

    The frequency of an expert says nothing of how much it adds; reap leaves experts that are taken seldom and then
    decide. Merging experts instead of dropping them ties what should be chosen apart, which is why the source drops.

    When to use it: in models of many experts, which hold most of the parameters. The work a token costs stays the
    same, since as many experts are taken; memory falls by the share removed.

    Cost: one forward pass in which the experts are computed twice; an amount costs a copy of what stays.

    References
    ----------
    [lasby2025reap]_ for reap, its saliency score; [lu2024experts]_ for dropping experts by what calibration text says
    of them, with frequency as a baseline there.
    """

    unit: ClassVar[str] = "experts"
    family: ClassVar[str] = "width"
    streams: ClassVar[bool] = True
    reference: ClassVar[str] = "lasby2025reap"
    needs: ClassVar[tuple[Need, ...]] = ("causal",)
    mixtures: ClassVar[bool] = True

    criterion: str = "reap"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ChainError(f"experts: criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}")

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_dense(model)

    def _kept(self, model: Model, amount: int | float) -> int:
        return cut_width(model.shape.experts, amount, 1)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        kept = self._kept(model, amount)
        after = replace(model.shape, experts=kept, active=min(model.shape.active, kept))
        return model.counts.n_params - accounting.count_shape(after).n_params

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        tokens_for(context, self.name())
        blocks, experts = len(model.blocks), model.shape.experts
        taken_LE, given_LE = (torch.zeros(blocks, experts, dtype=torch.float64) for _ in range(2))
        seen = 0

        def gather(index: int, found: Routed) -> None:
            taken_LE[index, found.expert] += len(found.share_S)
            norms_S = found.output_SD.double().square().sum(1).sqrt()
            given_LE[index, found.expert] += float((found.share_S.double() * norms_S).sum())

        def count(tokens: int) -> None:
            nonlocal seen
            seen += tokens

        watch_experts(model, context, self.name(), gather, count)
        score_LE = taken_LE / seen if self.criterion == "frequency" else given_LE / taken_LE.clamp(min=1)
        check_finite(score_LE, self.name(), "what experts give", model)
        prepared = Prepared(context.scratch)
        for index, score_E in enumerate(score_LE):
            prepared.put(f"block-{index}", {"order": _ranked(score_E), "score": score_E})
        return prepared.finish(
            experts=experts, frequency=[[round(float(n) / seen, 4) for n in row] for row in taken_LE]
        )

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape = model.shape
        left = self._kept(model, amount)
        done = self.done(
            amount,
            1 - left / shape.experts,
            experts=[shape.experts, left],
            active=[shape.active, min(shape.active, left)],
        )
        if left == shape.experts:
            return model.copy().after(done)
        orders = (prepared.get(f"block-{index}")["order"] for index in range(len(model.blocks)))
        return keep_experts(model, [cast("list[int]", order_E[:left].tolist()) for order_E in orders]).after(done)


def _ranked(score_E: Tensor) -> Tensor:
    """Experts, the most important first; of equal ones the last."""
    return score_E.argsort(stable=True).flip(0)

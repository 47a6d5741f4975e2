"""Narrower experts: each loses the same number of neurons, whose work its kept ones take over by least squares.

Shapes: E experts of a block, D model width, F neurons of an expert, K neurons kept, S tokens that take an expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.accounting import check_round_to
from mariotte.architectures import Need, Shape
from mariotte.compress.calibration import check_finite, tokens_for
from mariotte.compress.compensation import check_ridge, compensated, least_squares_factors, obs_order, with_ridge
from mariotte.compress.mixture import Routed, expert_downs, keep_expert_neurons, watch_experts
from mariotte.compress.neurons import removed_with_neurons
from mariotte.cuts.neurons import neuron_width, refuse_dense
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["ExpertFFN"]


@dataclass(frozen=True, kw_only=True)
class ExpertFFN(Step):
    """Remove the same number of feed-forward neurons from each expert.

    Parameters
    ----------
    compensate : fold what the removed neurons did into the kept ones, by least squares on the tokens of each expert
    ridge : added to the diagonal of the second moment, as a share of its mean; see ``ffn``
    round_to : multiple to which the width is rounded; None takes 128 in models at least 1024 wide, 8 in smaller ones

    Raises
    ------
    ChainError
        When the ridge is not positive, or `round_to` is not.

    Notes
    -----
    As ``ffn`` with the order of optimal brain surgeon, expert by expert. Tokens count by the square of the share with
    which the expert's answer is added, since that is how its error reaches the stream. An expert that no calibration
    token takes has no second moment: its neurons go by the norms of their columns, and nothing is folded.

    When to use it: in mixtures whose experts are few and wide, of which ``experts`` would have to drop too much at
    once. A token costs less, too.

    Cost: one forward pass in which the experts are computed twice, with F² more multiplications a token and expert;
    F³ an expert for the order and one factorisation; an amount then costs D K² an expert. Memory: F² float64 for every
    expert of the model while text is read, or of one block when it is streamed. Stored: F² + D F float64 an expert.

    References
    ----------
    [hassibi1993optimal]_ for the order, as in ``ffn``; that tokens count by their share is ours.
    """

    unit: ClassVar[str] = "neurons"
    family: ClassVar[str] = "width"
    streams: ClassVar[bool] = True
    reference: ClassVar[str] = "hassibi1993optimal"
    needs: ClassVar[tuple[Need, ...]] = ("causal",)
    mixtures: ClassVar[bool] = True

    compensate: bool = True
    ridge: float = 1e-2
    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_ridge(self.name(), self.ridge)
        check_round_to(self.name(), self.round_to, of="neurons")

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_dense(model)

    @override
    def moment(self, shape: Shape) -> int:
        # One a expert, all of a block at once: as many numbers as one of this size has.
        return math.ceil(shape.experts**0.5 * shape.ffn)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        width, _ = neuron_width(model, amount, self.round_to)
        return removed_with_neurons(model, width)

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        tokens_for(context, self.name())
        shape, blocks = model.shape, model.blocks
        moments: dict[int, Tensor] = {}
        prepared = Prepared(context.scratch)
        seen = 0

        def gather(index: int, found: Routed) -> None:
            if index not in moments:
                sizes = (shape.experts, shape.ffn, shape.ffn)
                moments[index] = torch.zeros(sizes, dtype=torch.float64, device=model.device)
            weighed_SF = found.hidden_SF.double() * found.share_S.double()[:, None]
            moments[index][found.expert] += weighed_SF.T @ weighed_SF

        def count(tokens: int) -> None:
            nonlocal seen
            seen += tokens

        def order(index: int) -> None:
            moment_EFF = moments.pop(index)
            check_finite(moment_EFF, self.name(), "what neurons of experts give", model)
            tensors: dict[str, list[Tensor]] = {"order": [], "factor": [], "product": []}
            for down_DF, moment_FF in zip(expert_downs(blocks[index]).double(), moment_EFF / seen, strict=True):
                damped_FF = with_ridge(moment_FF, self.ridge)
                order_F = obs_order(down_DF, damped_FF).flip(0)
                tensors["order"].append(order_F)
                if self.compensate:
                    factor_FF, product_DF = least_squares_factors(down_DF, damped_FF, order_F.to(down_DF.device))
                    tensors["factor"].append(factor_FF)
                    tensors["product"].append(product_DF)
            prepared.put(f"block-{index}", {key: torch.stack(each) for key, each in tensors.items() if each})
            context.progress("order", (index + 1) / len(blocks))

        watch_experts(model, context, self.name(), gather, count, order)
        return prepared.finish(ffn=shape.ffn, experts=shape.experts)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape = model.shape
        width, multiple = neuron_width(model, amount, self.round_to)
        done = self.done(amount, 1 - width / shape.ffn, ffn=[shape.ffn, width], rounding=multiple)
        if width == shape.ffn:
            return model.copy().after(done)
        kept = (self._kept(model, prepared.get(f"block-{index}"), width) for index in range(len(model.blocks)))
        return keep_expert_neurons(model, kept).after(done)

    def _kept(
        self, model: Model, tensors: Mapping[str, Tensor], width: int
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Of each expert of a block the neurons that stay, and the columns that they get; None for their own."""
        tensors = {key: tensor.to(model.device) for key, tensor in tensors.items()}
        # In their old order: a kept neuron is then found at the same place whatever ranked it.
        sorted_EK, position_EK = cast("tuple[Tensor, Tensor]", tensors["order"][:, :width].sort(dim=1))
        if not self.compensate:
            return list(sorted_EK), None
        parts = zip(tensors["factor"], tensors["product"], position_EK, strict=True)
        return list(sorted_EK), [compensated(factor, product, width)[:, place_K] for factor, product, place_K in parts]

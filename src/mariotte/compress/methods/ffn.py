"""Fewer feed-forward neurons, whose work the kept ones take over by least squares.

Shapes: D model width, F neurons of a block (the down projection's inputs), K neurons kept, M tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mariotte import accounting
from mariotte.compress.calibration import second_moments
from mariotte.compress.compensation import compensated, least_squares_factors, with_ridge
from mariotte.compress.surgery import cut_width, derive, parameter_names, rounding
from mariotte.errors import ChainError
from mariotte.models.model import Block, Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["FFN"]

CRITERIA = ("obs", "activation", "norm")


def obs_order(down_DF: Tensor, moment_FF: Tensor) -> Tensor:
    """Columns in the order in which optimal brain surgeon removes them.

    Parameters
    ----------
    down_DF : (D, F) float64, the down projection
    moment_FF : (F, F) float64, positive definite: mean of x xᵀ over its inputs, with a ridge

    Returns
    -------
    (F,) int64: the first is removed first

    Notes
    -----
    Removing column j and letting the others make up for it by least squares raises the squared output error by
    |w_j|² / (G⁻¹)_jj. The smallest goes, W and G⁻¹ are updated as if it had never been, and again: one greedy nested
    order, so all amounts come from one pass. Of equal ones the first goes first.

    Cost: F steps of one rank-one update each of G⁻¹ and W, so F³ + D F² operations and 2 F² float64.

    References
    ----------
    [hassibi1993optimal]_ equation 5, for columns instead of single weights.
    """
    inverse_KK = torch.cholesky_inverse(cast(Tensor, torch.linalg.cholesky(moment_FF)))
    weight_DK = down_DF.clone()
    left_K = torch.arange(down_DF.shape[1], device=down_DF.device)
    order: list[int] = []
    while len(left_K):
        # The removed stay in the matrices, at infinite cost, until an eighth of them has gone: compacting every time
        # would copy F² numbers a step, never would update three times as many as needed.
        gone_K = torch.zeros(len(left_K), dtype=torch.bool, device=down_DF.device)
        for _ in range(max(1, len(left_K) // 8)):
            error_K = weight_DK.square().sum(0) / inverse_KK.diagonal()
            j = int(error_K.masked_fill(gone_K, torch.inf).argmin())
            order.append(int(left_K[j]))
            column_K, pivot = inverse_KK[:, j].clone(), float(inverse_KK[j, j])
            weight_DK.addmm_(weight_DK[:, j : j + 1].clone(), column_K[None], alpha=-1 / pivot)
            inverse_KK.addmm_(column_K[:, None], column_K[None], alpha=-1 / pivot)
            # Exactly zero by algebra, a rounding error away from it in floats: the removed must not come back.
            inverse_KK[j], inverse_KK[:, j], inverse_KK[j, j] = 0.0, 0.0, 1.0
            gone_K[j] = True
        kept = (~gone_K).nonzero().flatten()
        left_K, weight_DK, inverse_KK = left_K[kept], weight_DK[:, kept], inverse_KK[kept][:, kept]
    return torch.tensor(order)


@dataclass(frozen=True, kw_only=True)
class FFN(Step):
    """Remove the same number of feed-forward neurons from each block.

    Parameters
    ----------
    criterion : which neurons matter. obs: the greedy optimal-brain-surgeon order; activation: root mean square of the
        neuron's output on calibration text, times the norm of its column of the down projection; norm: the product of
        the norms of its rows and its column, without calibration
    compensate : fold what the removed neurons did into the kept ones, by least squares on calibration activations
    ridge : added to the diagonal of the activations' second moment, as a share of its mean; pulls the compensated
        columns towards the uncompensated ones. 0.01 is the usual damping of optimal-brain-surgeon methods
        ([frantar2023sparsegpt]_); on stories260K it lost least with little calibration text and no more than 0.02
        nats with plenty
    round_to : multiple to which the width is rounded; None takes 128 in models at least 1024 wide, 8 in smaller ones

    Raises
    ------
    ChainError
        When the criterion is none of these, the ridge is not positive, or `round_to` is not.

    Notes
    -----
    Compensation minimises the squared error of the MLP's output on calibration text over all down projections that use
    the kept neurons; it is never above that of plain removal. Orders are nested, so that one preparation serves all
    amounts. All moments are of the uncut model.

    Cost: a forward pass with F² more multiplications a token and block; F³ a block for the order and one factorisation;
    an amount then costs D K² a block. Stored: F² + D F float64 a block.

    References
    ----------
    [hassibi1993optimal]_ for the order; least-squares compensation as in [he2017channel]_.
    """

    unit: ClassVar[str] = "neurons"
    family: ClassVar[str] = "width"
    reference: ClassVar[str] = "hassibi1993optimal"

    criterion: str = "obs"
    compensate: bool = True
    ridge: float = 1e-2
    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ChainError(f"ffn: criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        if not self.ridge > 0:
            raise ChainError(f"ffn: ridge must be positive, such as 0.01, got {self.ridge}")
        if self.round_to is not None and self.round_to < 1:
            raise ChainError(f"ffn: round_to must be a positive number of neurons, got {self.round_to}")

    def _width(self, model: Model, amount: int | float) -> tuple[int, int]:
        """The width that is kept, and the multiple to which it is rounded."""
        shape = model.shape
        multiple = rounding(shape.ffn, self.round_to, at=shape.hidden)
        return cut_width(shape.ffn, amount, multiple), multiple

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        width, _ = self._width(model, amount)
        return model.counts.n_params - accounting.count_shape(replace(model.shape, ffn=width)).n_params

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        blocks = model.blocks
        moments: dict[str, Tensor] = {}
        if self.compensate or self.criterion != "norm":
            inputs = {f"block-{index}": [block.down] for index, block in enumerate(blocks)}
            moments = second_moments(model, context, self.name(), inputs)
        prepared = Prepared(context.scratch)
        for index, block in enumerate(blocks):
            key = f"block-{index}"
            down_DF = block.down.weight.double()
            moment_FF = with_ridge(moments.pop(key), self.ridge) if key in moments else None
            order_F = self._order(block, down_DF, moment_FF)
            tensors = {"order": order_F}
            if self.compensate:
                assert moment_FF is not None
                tensors["factor"], tensors["product"] = least_squares_factors(down_DF, moment_FF, order_F)
            prepared.put(key, tensors)
            context.progress("order", (index + 1) / len(blocks))
        return prepared.finish(ffn=model.shape.ffn)

    def _order(self, block: Block, down_DF: Tensor, moment_FF: Tensor | None) -> Tensor:
        """Neurons, the most important first."""
        if self.criterion == "obs":
            assert moment_FF is not None
            return obs_order(down_DF, moment_FF).flip(0).to(down_DF.device)
        score_F = down_DF.square().sum(0).sqrt()
        if self.criterion == "activation":
            assert moment_FF is not None
            score_F = score_F * moment_FF.diagonal().sqrt()
        else:
            for linear in block.ffn[:-1]:
                score_F = score_F * linear.weight.double().square().sum(1).sqrt()
        return score_F.argsort(descending=True, stable=True)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape = model.shape
        width, multiple = self._width(model, amount)
        done = self.done(amount, 1 - width / shape.ffn, ffn=[shape.ffn, width], rounding=multiple)
        if width == shape.ffn:
            return model.copy().after(done)
        names = parameter_names(model)
        weights: dict[str, Tensor] = {}
        for index, block in enumerate(model.blocks):
            tensors = {key: tensor.to(model.device) for key, tensor in prepared.get(f"block-{index}").items()}
            # In their old order: a kept neuron is then found at the same place whatever ranked it.
            kept_K, position_K = tensors["order"][:width].sort()
            for linear in block.ffn[:-1]:
                weights |= {names[parameter]: parameter[kept_K] for parameter in linear.parameters()}
            down_DK = block.down.weight[:, kept_K]
            if self.compensate:
                down_DK = compensated(tensors["factor"], tensors["product"], width)[:, position_K]
            weights[names[block.down.weight]] = down_DK
        return derive(model, weights, {model.entry.ffn: width}).after(done)

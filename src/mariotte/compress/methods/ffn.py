"""Fewer feed-forward neurons, whose work the kept ones take over by least squares.

Shapes: D model width, F neurons of a block (the down projection's inputs), K neurons kept, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.accounting import check_round_to
from mariotte.architectures import Need, Shape
from mariotte.compress.calibration import Means, outer, second_moments, taylor, tokens_for, watching
from mariotte.compress.compensation import (
    check_ridge,
    compensated,
    invertible,
    least_squares_factors,
    obs_order,
    with_ridge,
)
from mariotte.compress.neurons import (
    neuron_rows,
    neuron_weights,
    removed_with_neurons,
)
from mariotte.compress.scope import oriented, turned
from mariotte.compress.sequential import Walk
from mariotte.compress.surgery import derive, gathered, parameter_names
from mariotte.cuts.neurons import neuron_width, refuse_unequal_widths
from mariotte.errors import ChainError
from mariotte.models.model import Block, Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["FFN"]

CRITERIA = ("obs", "activation", "wanda", "taylor", "norm")
_BEFORE = ("taylor", "norm")
"""Criteria that rank the neurons of the model that enters, even when the rest is done block by block."""


def _lacking(
    walk: Walk, block: Block, dense: Walk, before: Block, key: str, gather: Means, *, scale: float = 1.0
) -> Tensor:
    """Mean of e hᵀ, (D, F), with e the stream behind the dense block less that behind this one; `dense` advances.

    Parameters
    ----------
    walk, block : the block whose neurons are to be cut, and the stream in front of it
    dense, before : the same of the dense model
    key, gather : also given the inputs h of the block's down projection, (M, F)
    scale : with which the family multiplies what the down projection gives: e is measured before it
    """
    total_DF = torch.zeros_like(oriented(block.down), dtype=torch.float64)
    tokens = 0
    for rows in walk.batches():
        seen: list[Tensor] = []
        with watching({key: [block.down]}, lambda _group, h_MF, seen=seen: seen.append(h_MF)):
            found_BTD = walk.run(block.module, rows)
        (h_MF,) = seen
        gather(key, h_MF)
        wanted_BTD = dense.run(before.module, rows)
        total_DF += (wanted_BTD.double() - found_BTD.double()).flatten(0, 1).T @ h_MF.double()
        tokens += len(h_MF)
        dense.stream_NTD[rows] = wanted_BTD
    return total_DF / (tokens * scale)


@dataclass(frozen=True, kw_only=True)
class FFN(Step):
    """Remove the same number of feed-forward neurons from each block.

    Parameters
    ----------
    criterion : which neurons matter, by what they multiply in the down projection W, (D, F), with inputs x, (M, F).
        obs: the greedy optimal-brain-surgeon order; activation: root mean square of x_j times the l2 norm of column j
        of W; wanda: the l2 norm of x_j times the l1 norm of column j, which is the wanda score of each weight summed
        over the rows of W; taylor: mean over calibration rows of |sum over tokens of x_j dL/dx_j|, with L the row's
        loss, the only one that needs a backward pass; norm: the product of the l2 norms of the neuron's rows and its
        column, without calibration
    compensate : fold what the removed neurons did into the kept ones, by least squares on calibration activations
    ridge : added to the diagonal of the activations' second moment, as a share of its mean; pulls the compensated
        columns towards the uncompensated ones. 0.01 is the usual damping of optimal-brain-surgeon methods
        ([frantar2023sparsegpt]_); on stories260K it lost least with little calibration text and no more than 0.02
        nats with plenty
    sequential : go through the model block by block, so that each block is measured on what the blocks cut before it
        give; nearly all work is then done for each amount. False measures the uncut model once for all amounts
    correct : with sequential and compensate, the share of the stream's error so far that the least squares of a block
        also try to make up for; 0 only keeps the work of the block's own neurons
    round_to : multiple to which the width is rounded; None takes 128 in models at least 1024 wide, 8 in smaller ones

    Raises
    ------
    ChainError
        When the criterion is none of these, the ridge is not positive, `correct` is no share, `round_to` is not
        positive, or nothing would be sequential.

    Notes
    -----
    Compensation minimises the squared error of the MLP's output on calibration text over all down projections that use
    the kept neurons; it is never above that of plain removal. Orders are nested, so that one preparation serves all
    amounts.

    With h the neurons of a block behind cut blocks, and e what the stream behind it lacks of the uncut model's, the
    sequential target is W h + c e for `correct` = c. Its least squares over all neurons are W + c E[e hᵀ] G⁻¹ with
    G = E[h hᵀ] (damped); order and compensation are then those of that matrix. Chasing the whole error fits noise of
    the calibration text; on stories260K with 25.1 % of all parameters removed (obs, ``benchmarks/stories260k.py``):
    2.748 not sequential, 2.703 with c = 0, 2.669 with c = 0.5, 2.717 with c = 1. On the smallest testbed models at half
    the neurons c = 1 gained another 0.01 nats; 0.5 was better than 0 on every model tried.

    Cost: a forward pass with F² more multiplications a token and block; F³ a block for the order and one factorisation;
    an amount then costs D K² a block. Stored: F² + D F float64 a block. Sequential: two such passes and the F³ for each
    amount, one more pass of the uncut model to correct; memory for one or two streams of all calibration tokens and a
    copy of the model.

    References
    ----------
    [hassibi1993optimal]_ for the order; least-squares compensation, with the error of what was cut before in its
    target, as in [he2017channel]_; the wanda score of [sun2024wanda]_; [molchanov2017pruning]_ for taylor.
    """

    unit: ClassVar[str] = "neurons"
    family: ClassVar[str] = "width"
    reference: ClassVar[str] = "hassibi1993optimal"
    streams: ClassVar[bool] = True
    version: ClassVar[int] = 2  # criterion=activation no longer damps what it ranks by
    needs: ClassVar[tuple[Need, ...]] = ("causal",)

    criterion: str = "obs"
    compensate: bool = True
    ridge: float = 1e-2
    sequential: bool = False
    correct: float = 0.5
    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ChainError(f"ffn: criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        check_ridge(self.name(), self.ridge)
        if not 0 <= self.correct <= 1:
            raise ChainError(f"ffn: correct must be a share in [0, 1], got {self.correct}")
        if self.sequential and not self.compensate and self.criterion in _BEFORE:
            raise ChainError(
                f"ffn: sequential=true needs compensation or a criterion of activations, got criterion={self.criterion}"
                " and compensate=false, which look at the uncut model alone: leave sequential out"
            )
        check_round_to(self.name(), self.round_to, of="neurons")

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model) or refuse_unequal_widths(model):
            return reason
        if self.sequential and self.compensate and self.correct and model.entry.lacking(["pre-norm"]):
            return (
                f"makes up for the stream in front of norms behind the MLP, and {model.entry.model_type} has some: "
                "write correct=0, or leave sequential out"
            )
        return None

    @override
    def whole(self) -> str | None:
        if self.criterion == "taylor":
            return "takes gradients through all blocks at once for criterion=taylor: leave criterion out"
        return super().whole()

    @override
    def moment(self, shape: Shape) -> int:
        return shape.ffn if self.compensate or self.criterion not in _BEFORE else 0

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        width, _ = neuron_width(model, amount, self.round_to)
        return removed_with_neurons(model, width)

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        if self.compensate or self.criterion != "norm":
            tokens_for(context, self.name())  # sequentially only `apply` reads them, and that is late to say so
        blocks = model.blocks
        downs = {f"block-{index}": block.down for index, block in enumerate(blocks)}
        importance = taylor(model, context, self.name(), downs) if self.criterion == "taylor" else {}
        moments: MutableMapping[str, Tensor] = {}
        if not self.sequential and (self.compensate or self.criterion not in _BEFORE):
            inputs = {key: [down] for key, down in downs.items()}
            moments = second_moments(model, context, self.name(), inputs)
        prepared = Prepared(context.scratch)
        for index, block in enumerate(blocks):
            key = f"block-{index}"
            down_DF = oriented(block.down).double()
            moment_FF = moments.pop(key, None)
            tensors: dict[str, Tensor] = {}
            if moment_FF is not None or self.criterion in _BEFORE:
                tensors["order"] = self._order(block, down_DF, moment_FF, importance.get(key))
            if self.compensate and moment_FF is not None:
                damped_FF = with_ridge(moment_FF, self.ridge)
                tensors["factor"], tensors["product"] = least_squares_factors(down_DF, damped_FF, tensors["order"])
            if tensors:
                prepared.put(key, tensors)
            context.progress("order", (index + 1) / len(blocks))
        return prepared.finish(ffn=model.shape.ffn)

    def _order(
        self, block: Block, down_DF: Tensor, moment_FF: Tensor | None, importance_F: Tensor | None = None
    ) -> Tensor:
        """Neurons, the most important first."""
        if self.criterion == "obs":
            assert moment_FF is not None
            return obs_order(down_DF, with_ridge(moment_FF, self.ridge)).flip(0).to(down_DF.device)
        if self.criterion == "taylor":
            assert importance_F is not None
            score_F = importance_F
        elif self.criterion == "norm":
            score_F = down_DF.square().sum(0).sqrt()
            for rows_FD in neuron_rows(block):
                score_F = score_F * rows_FD.double().square().sum(1).sqrt()
        else:
            assert moment_FF is not None
            size_F = down_DF.abs().sum(0) if self.criterion == "wanda" else down_DF.square().sum(0).sqrt()
            # The root of a mean over tokens and the l2 norm differ by a factor that all neurons share.
            score_F = size_F * moment_FF.diagonal().sqrt()
        return score_F.argsort(descending=True, stable=True)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape = model.shape
        width, multiple = neuron_width(model, amount, self.round_to)
        done = self.done(amount, 1 - width / shape.ffn, ffn=[shape.ffn, width], rounding=multiple)
        if width == shape.ffn:
            return model.copy().after(done)
        names = parameter_names(model)
        weights = gathered(model)
        cuts = self._sequential if self.sequential else self._cuts
        for block, (kept_K, down_DK) in zip(model.blocks, cuts(model, prepared, width, context), strict=True):
            weights.update(neuron_weights(block, names, kept_K, down_DK))
        return derive(model, weights, {model.entry.ffn: width}).after(done)

    def _cuts(self, model: Model, prepared: Prepared, width: int, _context: Context) -> Iterator[tuple[Tensor, Tensor]]:
        """The kept neurons of each block, (K,), and its new down projection, (D, K)."""
        for index, block in enumerate(model.blocks):
            tensors = {key: tensor.to(model.device) for key, tensor in prepared.get(f"block-{index}").items()}
            # In their old order: a kept neuron is then found at the same place whatever ranked it.
            kept_K, position_K = tensors["order"][:width].sort()
            down_DK = oriented(block.down)[:, kept_K]
            if self.compensate:
                down_DK = compensated(tensors["factor"], tensors["product"], width)[:, position_K]
            yield kept_K, down_DK

    def _sequential(
        self, model: Model, prepared: Prepared, width: int, context: Context
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, each block measured behind the cut ones before it."""
        correct = self.correct if self.compensate else 0.0
        # Cut neurons stay in the copy with columns of zeros: the outputs are the same, and no shape changes on the way.
        cut = model.copy()
        walk = Walk(cut, context, self.name())
        dense = Walk(model, context, self.name()) if correct else None
        for index, (block, before) in enumerate(zip(cut.blocks, model.blocks, strict=True)):
            key = f"block-{index}"
            down_DF = oriented(block.down).double()
            moments = Means(outer)
            lacking_DF = None
            if dense is None:
                walk.observe(block.module, {key: [block.down]}, moments)
            else:
                lacking_DF = _lacking(walk, block, dense, before, key, moments, scale=model.added_times)
            moment_FF = moments.result(self.name(), model)[key]
            damped_FF = with_ridge(moment_FF, self.ridge)
            if lacking_DF is not None:
                with invertible():
                    down_DF = down_DF + correct * cast(Tensor, torch.linalg.solve(damped_FF, lacking_DF.T)).T
            order_F = (
                prepared.get(key)["order"].to(model.device)
                if self.criterion in _BEFORE
                else self._order(block, down_DF, moment_FF)
            )
            kept_K, position_K = order_F[:width].sort()
            down_DK = down_DF[:, kept_K]
            if self.compensate:
                down_DK = compensated(*least_squares_factors(down_DF, damped_FF, order_F), width)[:, position_K]
            cut_DF = torch.zeros_like(down_DF)
            cut_DF[:, kept_K] = down_DK.double()
            block.down.weight.copy_(turned(block.down, cut_DF))
            yield kept_K, down_DK
            walk.advance(block.module)
            context.progress("order", (index + 1) / len(cut.blocks))

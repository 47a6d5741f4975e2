"""GPTQ: weights are rounded column by column, and those to the right make up for what the rounding loses.

Shapes: O outputs and I inputs of a matrix, C columns handled together, M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.architectures import Need, Shape
from mariotte.compress import llm_compressor
from mariotte.compress.calibration import Means, observe_encoder, outer, rows_at_once, tokens_for, watching
from mariotte.compress.compensation import invertible, with_ridge
from mariotte.compress.quantize import Grid, Grouped, absmax_grid, minmax_grid
from mariotte.compress.scope import change, in_scope, rewrite_
from mariotte.compress.sequential import rewrite_sequentially
from mariotte.compress.sparsity import readers, store_statistics
from mariotte.errors import ChainError
from mariotte.models.model import Block, Model
from mariotte.models.step import Context, Prepared

__all__ = ["GPTQ"]

COLUMNS = 128
"""Columns whose errors reach the columns behind them as one product; results do not depend on it."""

BY = ("mariotte", "llm-compressor")


@invertible()
def gptq(
    weight_OI: Tensor,
    moment_II: Tensor,
    bits: int,
    scales: torch.dtype,
    *,
    group: int | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    damp: float = 0.01,
    columns: int = COLUMNS,
) -> Tensor:
    r"""The weights rounded to 2^bits levels so that the outputs change little.

    Parameters
    ----------
    weight_OI : (O, I) float64
    moment_II : (I, I) float64, mean of x xᵀ over the inputs
    bits, scales, group, symmetric : the grid, as of `rtn`: bits of an integer, dtype of a stored scale, weights that
        share one, levels around zero
    act_order : columns with the largest inputs first; scales are then those of the weights as they came
    damp : added to the diagonal of the moment, as a share of its mean
    columns : columns handled together: a matter of speed alone

    Returns
    -------
    (O, I) float64; what was zero stays zero

    Raises
    ------
    ChainError
        When `damp` is too small for the moment to be inverted.

    Notes
    -----
    With H⁻¹ = Uᵀ U (U upper triangular), rounding w_oj to q and letting the columns behind j make up for it costs
    (w_oj - q)² / U_jj² and is W[:, j:] -= (w - q) / U_jj · U[j, j:]. All rows go through the columns in one order.

    The scales of a group are taken when its first column is reached, from its weights as earlier columns have left
    them. So does the published code, but for a group that begins inside the `columns` at hand, whose weights it takes
    as they were in front of these; with groups of 128, its usual case, it is the same.

    An input that is always zero has nothing but the damping on H's diagonal: its weights are rounded to the nearest and
    move no others. The published code sets them to zero, which other text than the calibration's would notice.

    Cost: I³ for the factors, O I² for the updates; float64, since the inverse of a moment in float32 stops being
    positive definite from a few thousand inputs on.

    References
    ----------
    [frantar2023gptq]_ algorithm 1; its published code for act_order with groups ("static groups").
    """
    make = absmax_grid if symmetric else minmax_grid
    inputs = weight_OI.shape[1]
    size = group or inputs
    order_I = torch.arange(inputs, device=weight_OI.device)
    if act_order:
        order_I = moment_II.diagonal().argsort(descending=True, stable=True)
    grids: list[Grid] = [make(weight_OI[:, at : at + size], bits, scales) for at in range(0, inputs, size)]
    inverse_II = torch.cholesky_inverse(
        cast(Tensor, torch.linalg.cholesky(with_ridge(moment_II, damp)[order_I][:, order_I]))
    )
    upper_II = cast(Tensor, torch.linalg.cholesky(inverse_II, upper=True))
    weight_OI = weight_OI[:, order_I].clone()
    zero_OI = weight_OI == 0
    groups = cast("list[int]", (order_I // size).tolist())
    together = columns if act_order or group is None else _aligned(columns, size)
    for start in range(0, inputs, together):
        # A view: what is written into it is written into the result.
        now_OC = weight_OI[:, start : start + together]
        upper_CC = upper_II[start : start + together, start : start + together]
        error_OC = torch.empty_like(now_OC)
        for j in range(now_OC.shape[1]):
            place = start + j
            if group is not None and not act_order and place % size == 0:
                grids[groups[place]] = make(weight_OI[:, place : place + size], bits, scales)
            level_O = grids[groups[place]].rounded(now_OC[:, j : j + 1])[:, 0].masked_fill(zero_OI[:, place], 0.0)
            error_OC[:, j] = (now_OC[:, j] - level_O) / upper_CC[j, j]
            now_OC[:, j + 1 :] -= error_OC[:, j, None] * upper_CC[j, j + 1 :]
            now_OC[:, j] = level_O
        weight_OI[:, start + together :] -= error_OC @ upper_II[start : start + together, start + together :]
    return weight_OI[:, order_I.argsort()]


def _aligned(columns: int, size: int) -> int:
    """The most columns to handle together so that a group's weights are all up to date where the group begins."""
    if size <= columns:
        return columns - columns % size
    return next(width for width in range(columns, 0, -1) if size % width == 0)


@dataclass(frozen=True, kw_only=True)
class GPTQ(Grouped):
    """Round weights to 2^bits levels, each column's error being made up for by the columns behind it.

    Parameters
    ----------
    act_order : round the columns with the largest inputs first. A group's scale is then that of its weights as they
        came, and the stored order stays
    damp : added to the diagonal of the inputs' second moment, as a share of its mean
    sequential : measure each block behind the rounded ones before it, for every number of bits anew, as published.
        False measures the model that enters, once for all
    by : mariotte: here, on any device. llm-compressor: by that program, in a Python environment of its own whose
        interpreter ``MARIOTTE_LLM_COMPRESSOR`` names

    Raises
    ------
    ChainError
        When `group` or `damp` is not positive, bits are not a whole number from 2 to 8, `by` is neither, or
        llm-compressor is asked for what it does not do here.

    Notes
    -----
    Simulated as ``rtn`` is: an ordinary checkpoint with the rounded weights in the model's own dtype, no smaller and no
    faster; the bytes counted are those of packed integers, a scale a group, and unless symmetric a zero point of so
    many bits. Weights that are zero stay zero, and others make up for what rounding loses: a pruned model keeps its
    zeros. In bfloat16 what an integer stands for is rounded once more, to 8 significant bits.

    llm-compressor gets the model as a checkpoint and the calibration rows as tokens, and gives back the rounded
    weights, all as safetensors; its scales of a group are those of the weights as they came, and its symmetric levels
    one more.

    Of a mixture each expert is measured on the tokens that take it. One that no token takes is rounded as by ``rtn``,
    as if its inputs were equally large and independent: calibrate on text that reaches all of them.

    An encoder is calibrated on what it reads in training: pieces of documents between its special tokens, 15 % of whose
    tokens are hidden. Sequentially it takes a pass through the whole model for each block.

    Calibration: a second moment of I inputs takes several times I tokens; with fewer, `damp` is what holds it up. Of an
    expert these are the tokens that take it.

    Cost: as sparsegpt's, two passes through the model, and I³ + O I² a matrix.

    References
    ----------
    [frantar2023gptq]_ sections 3 and 4.
    """

    reference: ClassVar[str] = "frantar2023gptq"
    streams: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("one text",)
    mixtures: ClassVar[bool] = True

    act_order: bool = False
    damp: float = 0.01
    sequential: bool = True
    by: str = "mariotte"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damp > 0:
            raise ChainError(f"gptq: damp must be positive, such as 0.01, got {self.damp}")
        if self.by not in BY:
            raise ChainError(f"gptq: by must be one of {', '.join(BY)}, got {self.by!r}")
        if self.by != "mariotte" and self.scope == "head":
            raise ChainError("gptq: by=llm-compressor rounds attention and MLP, got the scope head: leave by out")
        if self.by != "mariotte" and not self.sequential:
            raise ChainError("gptq: by=llm-compressor is always sequential, got sequential=false: leave one out")

    @override
    def whole(self) -> str | None:
        if self.by != "mariotte":
            return "needs the whole model in memory for by=llm-compressor: leave by out"
        if self.scope == "head":
            return "runs the whole model again and again for the scope head: take rtn, or another scope"
        return super().whole()

    @override
    def moment(self, shape: Shape) -> int:
        return max(shape.ffn, shape.hidden, shape.heads * shape.head_dim)

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        return None if self.by == "mariotte" else llm_compressor.refuse(model)

    @override
    def rounded(self, weight_OI: Tensor, bits: int, scales: torch.dtype) -> Tensor:
        raise AssertionError("gptq rounds a matrix by its inputs")

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        # Asked for also where only `apply` reads it, so that what cannot be done is refused before any work.
        tokens_NT = tokens_for(context, self.name())
        prepared = Prepared(context.scratch)
        if self.scope == "head":
            means, rows = Means(outer), rows_at_once(tokens_NT)
            if model.kind == "causal":
                with watching({"head": [model.head]}, means):
                    for start in range(0, len(tokens_NT), rows):
                        model.logits(tokens_NT[start : start + rows])
                        context.progress("calibration", min(1.0, (start + rows) / len(tokens_NT)))
            else:
                observe_encoder(model, tokens_NT, rows, {"head": [model.head]}, means)
            prepared.put("head", means.result(self.name(), model))
        elif not self.sequential:
            store_statistics(prepared, model, context, self.name(), self.scope, outer)
        return prepared.finish()

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        bits, scales = int(amount), model.stored_dtype
        if self.by != "mariotte":
            return self._elsewhere(model, amount, context)

        def rounded(weight_OI: Tensor, moment_II: Tensor) -> Tensor:
            return gptq(
                weight_OI.double(),
                moment_II.to(weight_OI.device),
                bits,
                scales,
                group=self.group,
                symmetric=self.symmetric,
                act_order=self.act_order,
                damp=self.damp,
            )

        def rewrite(_index: int, block: Block, moments: Mapping[str, Tensor]) -> None:
            for part, matrices in readers(block, self.scope).items():
                for matrix in matrices:
                    rewrite_(matrix, lambda weight_OI, moment_II=moments[part]: rounded(weight_OI, moment_II))

        if self.scope == "head":
            ((name, head),) = in_scope(model, self.scope).items()
            quantized = change(model, self.scope, {name: rounded(head.weight, prepared.get("head")["head"])})
        elif self.sequential:
            quantized = rewrite_sequentially(
                model, context, self.name(), lambda block: readers(block, self.scope), outer, rewrite
            )
        else:
            quantized = model.copy()
            for index, block in enumerate(quantized.blocks):
                rewrite(index, block, prepared.get(f"block-{index}"))
        return self.after(model, quantized, amount)

    def _elsewhere(self, model: Model, amount: int | float, context: Context) -> Model:
        names = list(in_scope(model, self.scope))
        asked = llm_compressor.Asked(
            bits=int(amount),
            group=self.group,
            symmetric=self.symmetric,
            act_order=self.act_order,
            damp=self.damp,
            matrices=[name.removesuffix(".weight") for name in names],
        )
        weights, version = llm_compressor.run(self.name(), model, asked, tokens_for(context, self.name()))
        return self.after(model, change(model, self.scope, weights), amount, by=f"llm-compressor {version}")

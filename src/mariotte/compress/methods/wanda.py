"""Wanda: weights that are small for what they multiply become zero.

Shapes: O outputs and I inputs of a linear layer, M tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.compress.calibration import squares
from mariotte.compress.sparsity import (
    Pattern,
    check_weights,
    prepare_statistics,
    prune,
    prune_sequentially,
    smallest_of_groups,
    smallest_of_rows,
    whole,
)
from mariotte.errors import ChainError
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["Wanda"]


def wanda(weight_OI: Tensor, mean_square_I: Tensor, amount: float, pattern: Pattern | None = None) -> Tensor:
    """The weights with the smallest |W_oj| |x_j| of each row set to zero.

    Parameters
    ----------
    weight_OI : (O, I) float64
    mean_square_I : (I,) float64, mean of x² of each input; the l2 norm over tokens is its root times a factor that all
        inputs share
    amount : share of each row, in [0, 1), rounded down to whole weights
    pattern : instead, so many of every few neighbours

    Returns
    -------
    (O, I) float64, of equal scores the first zero

    References
    ----------
    [sun2024wanda]_ equation 1 and algorithm 1.
    """
    score_OI = weight_OI.abs() * mean_square_I.sqrt()
    mask_OI = (
        smallest_of_rows(score_OI, whole(score_OI.shape[1], amount))
        if pattern is None
        else smallest_of_groups(score_OI, pattern)
    )
    return weight_OI.masked_fill(mask_OI, 0.0)


@dataclass(frozen=True, kw_only=True)
class Wanda(Step):
    """Set weights to zero that are small for what they multiply. Nothing gets smaller or faster.

    Parameters
    ----------
    nm : such as 2:4, to set exactly so many of every few neighbouring weights of a row to zero; the amount must then
        say the same, as in ``wanda@0.5(nm=2:4)``. None: the same share of each row, wherever in it
    sequential : measure each block behind the pruned ones before it, for every amount anew, as published. False
        measures the model that enters, once for all amounts
    scope : all: the projections of attention and MLP; attention or ffn: those alone. Embeddings, head, norms and biases
        are never touched

    Raises
    ------
    ChainError
        When `nm` is no pattern, or stands beside ``of=model``.

    Notes
    -----
    Of each row of a matrix floor(amount x inputs) weights are set to zero, those that were zero before among them, by
    |W_oj| times the l2 norm of input j over all calibration tokens. Nothing else changes.

    Calibration: a few thousand tokens are enough, since only I norms a matrix are estimated. Where weights may also be
    updated, sparsegpt loses less at high amounts and costs I³ more a matrix.

    Cost: sequential, two forward passes an amount, a copy of the model and the stream of all calibration tokens;
    otherwise one pass for all amounts. Sorting takes O I log I a matrix.

    References
    ----------
    [sun2024wanda]_ section 3.
    """

    unit: ClassVar[str] = "weights"
    family: ClassVar[str] = "unstructured"
    reference: ClassVar[str] = "sun2024wanda"
    scopes: ClassVar[tuple[str, ...]] = ("all", "attention", "ffn")

    nm: str | None = None
    sequential: bool = True

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None and self.of is not None:
            raise ChainError(f"wanda: nm={self.nm} fixes the share of weights, leaving none to of={self.of}: drop one")

    @property
    def pattern(self) -> Pattern | None:
        """What `nm` says."""
        return None if self.nm is None else Pattern.parse(self.name(), self.nm)

    @override
    def refuse(self, model: Model) -> str | None:
        return None if self.pattern is None else self.pattern.refuse(model.matrices(self.scope))

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        if self.pattern is not None:
            self.pattern.check_amount(self.name(), amount)
        return sum(
            matrix.out_features * whole(matrix.in_features, amount)
            if self.pattern is None
            else bool(amount) * matrix.weight.numel() * self.pattern.zeros // self.pattern.of
            for matrix in model.matrices(self.scope)
        )

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        check_weights(model, self.name(), self.scope)
        if self.sequential:
            context.calibration_for(self.name())
            return Prepared(context.scratch).finish()
        return prepare_statistics(model, context, self.name(), self.scope, squares)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        zeros = self.removes(model, amount)
        in_scope = sum(matrix.weight.numel() for matrix in model.matrices(self.scope))
        done = self.done(amount, zeros / in_scope, zeros=zeros, in_scope=in_scope, per="row")
        if not zeros:
            return model.copy().after(done)

        def cut(weight_OI: Tensor, mean_square_I: Tensor) -> Tensor:
            return wanda(weight_OI, mean_square_I, amount, self.pattern)

        if self.sequential:
            return prune_sequentially(model, context, self.name(), self.scope, squares, cut).after(done)
        return prune(model, prepared, self.scope, cut).after(done)

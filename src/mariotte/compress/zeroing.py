"""A share of each matrix set to zero, by scores of its weights or of whole rows, without text.

Shapes: O outputs (rows) and I inputs of a matrix.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.compress.scope import SCOPES, change, in_scope, oriented, turned, untied_weights
from mariotte.compress.sparsity import smallest
from mariotte.compress.surgery import gathered
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step


@dataclass(frozen=True, kw_only=True)
class Zeroing(Step):
    """A method that sets the same share of each matrix in scope to zero: what scores lowest goes first.

    Subclasses say how a matrix is scored, and whether whole rows go. Of n weights or rows, round(amount x n) go, those
    that were zero before among them where they score lowest.
    """

    unit: ClassVar[str] = "weights"
    family: ClassVar[str] = "unstructured"
    scopes: ClassVar[tuple[str, ...]] = SCOPES
    mixtures: ClassVar[bool] = True

    @property
    @abstractmethod
    def by_row(self) -> bool:
        """Whether rows go whole, so that outputs become constant, or weights each by itself."""

    @abstractmethod
    def scores(self, weight_OI: Tensor, index: int, context: Context) -> Tensor:
        """Non-negative scores of a matrix's rows, (O,), or weights, (O, I).

        Parameters
        ----------
        index : of the matrix among those in scope, from input to output
        """

    def _counts(self, model: Model, amount: float) -> list[tuple[int, int]]:
        """Of each matrix, how many rows or weights go, and how many weights each of them is."""
        shapes = [oriented(matrix).shape for matrix in in_scope(model, self.scope).values()]
        return [
            (round(amount * rows), inputs) if self.by_row else (round(amount * rows * inputs), 1)
            for rows, inputs in shapes
        ]

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        zeros = sum(count * size for count, size in self._counts(model, amount))
        return zeros - (untied_weights(model, self.scope) if zeros else 0)

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        return Prepared(context.scratch).finish()

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        counts = self._counts(model, amount)
        zeros, total = sum(count * size for count, size in counts), 0
        weights = gathered(model)
        for index, ((name, matrix), (count, _)) in enumerate(
            zip(in_scope(model, self.scope).items(), counts, strict=True)
        ):
            weight_OI = oriented(matrix)
            total += weight_OI.numel()
            (mask,) = smallest([self.scores(weight_OI, index, context).to(weight_OI.device)], count)
            weights[name] = turned(matrix, weight_OI.masked_fill(mask[:, None] if self.by_row else mask, 0.0))
        cut = change(model, self.scope, weights) if zeros else model.copy()
        facts: dict[str, Any] = {"per": "layer"}
        if self.by_row:
            facts |= {"by": "row", "rounding": sum(size for _, size in counts)}
        return cut.after(self.done(amount, zeros / total, zeros=zeros, in_scope=total, **facts))

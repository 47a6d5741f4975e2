"""Magnitude pruning: the smallest weights become zero.

Shapes: W weights of all matrices in scope, counted along the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from mariotte.compress.allocate import check_allocation, gather, spread
from mariotte.compress.calibration import tokens_for
from mariotte.compress.scope import SCOPES, change, in_scope, untied_weights
from mariotte.compress.sparsity import smallest
from mariotte.compress.surgery import gathered
from mariotte.cuts.common import whole
from mariotte.errors import ChainError
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Prepared, Step

__all__ = ["Magnitude"]

PER = ("model", "layer")


@dataclass(frozen=True, kw_only=True)
class Magnitude(Step):
    """Set the smallest weights of the blocks' matrices to zero. Nothing gets smaller or faster.

    Parameters
    ----------
    per : model: one threshold for all matrices in scope; layer: the same share of each matrix
    scope : all: the projections of attention and MLP; attention or ffn: those alone, as in the study that compared
        these; head: the final dense layer alone, which gets a matrix of its own where it was tied to the embeddings.
        Embeddings, norms and biases are never touched
    allocation : how the blocks share the amount, per layer. uniform: alike; influence: those that change the stream
        little lose more; greedy: by calibration loss, step by step

    Raises
    ------
    ChainError
        When `per` or `allocation` is none of these, or blocks are to differ under one threshold for all.

    Notes
    -----
    Exactly round(amount x weights in scope) weights are set to zero (of each matrix, per layer with a uniform
    allocation), those that were zero before among them. Cost: three passes over the weights in scope for every amount;
    nothing is prepared, except for an allocation: a forward pass for influence, a cut and a pass for each trial of
    greedy, about 2 L trials for each tenth of the amount.

    References
    ----------
    [namburi2023cost]_ section 3; the criterion is that of [han2015learning]_.
    """

    unit: ClassVar[str] = "weights"
    family: ClassVar[str] = "unstructured"
    reference: ClassVar[str] = "namburi2023cost"
    streams: ClassVar[bool] = True
    scopes: ClassVar[tuple[str, ...]] = SCOPES
    mixtures: ClassVar[bool] = True

    per: str = "model"
    allocation: str = "uniform"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in PER:
            raise ChainError(f"magnitude: per must be one of {', '.join(PER)}, got {self.per!r}")
        check_allocation("magnitude", self.allocation)
        if self.per == "model" and self.allocation != "uniform":
            raise ChainError(
                f"magnitude: allocation={self.allocation} needs per=layer, as one threshold for the model spreads the "
                "zeros by itself"
            )
        if self.scope == "head" and self.allocation != "uniform":
            raise ChainError(
                f"magnitude: allocation={self.allocation} spreads an amount over blocks, and the scope head has none: "
                "leave allocation out"
            )

    @override
    def refuse(self, model: Model) -> str | None:
        reason = None if self.allocation == "uniform" else model.entry.lacking(("causal",))
        return reason and f"{reason}, which allocation={self.allocation} measures by its loss: leave allocation out"

    def matrices(self, model: Model) -> list[nn.Linear]:
        """The matrices in scope, from input to output."""
        return [matrix for some in self._by_block(model) for matrix in some]

    def _by_block(self, model: Model) -> list[list[nn.Linear]]:
        if self.scope == "head":
            return [[model.head]]
        parts = {"all": ("attention", "ffn"), "attention": ("attention",), "ffn": ("ffn",)}[self.scope]
        return [[matrix for part in parts for matrix in getattr(block, part)] for block in model.blocks]

    def _block_sizes(self, model: Model) -> list[int]:
        return [sum(matrix.weight.numel() for matrix in some) for some in self._by_block(model)]

    @override
    def whole(self) -> str | None:
        if self.allocation == "greedy":
            return "measures the loss of the whole model many times for allocation=greedy: take influence or uniform"
        return super().whole()

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        sizes = [matrix.weight.numel() for matrix in self.matrices(model)]
        together = self.per == "model" or self.allocation != "uniform"
        zeros = round(amount * sum(sizes)) if together else sum(round(amount * size) for size in sizes)
        return zeros - (untied_weights(model, self.scope) if zeros else 0)

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        prepared, sizes = Prepared(context.scratch), self._block_sizes(model)
        tokens_NT = tokens_for(context, self.name(), predicting=True) if self.allocation == "greedy" else None

        def loss(shares: Sequence[float]) -> float:
            amount = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
            zeroed = self._zeroed(model, self._counts(model, amount, shares))
            assert tokens_NT is not None
            return float(token_nll(zeroed, tokens_NT).double().mean())

        tensors = gather(self.allocation, model, context, self.name(), sizes, amounts, loss)
        if tensors:
            prepared.put("allocation", tensors)
        return prepared.finish(until=max(amounts, default=0.0))

    @override
    def covers(self, prepared: Prepared, amounts: Sequence[int | float]) -> bool:
        # A greedy path ends at the largest amount that was asked for.
        return self.allocation != "greedy" or prepared.facts["until"] >= max(amounts, default=0.0)

    def _counts(self, model: Model, amount: float, shares: Sequence[float]) -> list[int]:
        """Weights of each matrix that become zero, when the blocks lose these shares."""
        by_block = self._by_block(model)
        sizes = [matrix.weight.numel() for some in by_block for matrix in some]
        each = [share for share, some in zip(shares, by_block, strict=True) for _ in some]
        if self.allocation == "uniform":
            return [round(share * size) for share, size in zip(each, sizes, strict=True)]
        return whole(each, sizes, round(amount * sum(sizes)))

    def _zeroed(self, model: Model, counts: Sequence[int]) -> Model:
        """The model with so many of the smallest weights of each matrix set to zero."""
        cut = gathered(model)
        for (name, matrix), count in zip(in_scope(model, self.scope).items(), counts, strict=True):
            (mask,) = smallest([matrix.weight], count)
            cut[name] = matrix.weight.masked_fill(mask, 0.0)
        return change(model, self.scope, cut) if any(counts) else model.copy()

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        weights = [matrix.weight for matrix in self.matrices(model)]
        facts: dict[str, Any] = {"per": self.per}
        if self.per == "model":
            zeros = round(amount * sum(weight.numel() for weight in weights))
            masks = smallest(weights, zeros)
            zeroed = gathered(model)
            for name, weight, mask in zip(in_scope(model, self.scope), weights, masks, strict=True):
                zeroed[name] = weight.masked_fill(mask, 0.0)
            cut = change(model, self.scope, zeroed) if zeros else model.copy()
        else:
            tensors = prepared.get("allocation") if "allocation" in prepared else {}
            shares = spread(self.allocation, tensors, amount, self._block_sizes(model))
            counts = self._counts(model, amount, shares)
            zeros, cut = sum(counts), self._zeroed(model, counts)
            if self.allocation != "uniform":
                facts |= {"allocation": self.allocation, "shares": [round(share, 6) for share in shares]}
        total = sum(weight.numel() for weight in weights)
        return cut.after(self.done(amount, zeros / total, zeros=zeros, in_scope=total, **facts))

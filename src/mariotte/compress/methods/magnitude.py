"""Magnitude pruning: the smallest weights become zero.

Shapes: W weights of all matrices in scope, counted along the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte.compress.surgery import derive, parameter_names
from mariotte.errors import ChainError
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["Magnitude"]

PER = ("model", "layer")
_DIGITS = 16
"""Bits settled in one pass over the weights; 2^16 counters are kept."""


def smallest(weights: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the `count` smallest entries by magnitude, over all tensors together.

    Parameters
    ----------
    weights : floating tensors of one dtype
    count : how many, from 0 to all

    Returns
    -------
    bool tensors of the same shapes, True where an entry is among the smallest; exactly `count` are. Of equal ones,
    those that come first along `weights` are taken, so that a smaller count is always a subset of a larger one.

    Notes
    -----
    The magnitude of the last one taken is found by its bits: those of a non-negative float, read as an integer, sort
    like the float. Sixteen bits are settled with each pass over the weights, by counting; a sort of all weights would
    hold several copies of a model at once.
    """
    wide = any(weight.dtype == torch.float64 for weight in weights)
    floating, integer, bits = (torch.float64, torch.int64, 64) if wide else (torch.float32, torch.int32, 32)

    def magnitudes(weight: Tensor) -> Tensor:
        return weight.detach().to(floating).abs().contiguous().view(integer).flatten()

    last, rank = 0, count  # the bits settled so far; how many are still to be taken among those that begin with them
    for shift in range(bits - _DIGITS, -1, -_DIGITS):
        histogram = torch.zeros(1 << _DIGITS, dtype=torch.int64)
        for weight in weights:
            keys_W = magnitudes(weight).long() >> shift
            digits = keys_W[keys_W >> _DIGITS == last] & ((1 << _DIGITS) - 1)
            histogram += torch.bincount(digits, minlength=1 << _DIGITS).cpu()
        reached = histogram.cumsum(0)
        digit = int(torch.searchsorted(reached, torch.tensor(rank)).clamp(max=(1 << _DIGITS) - 1))
        rank -= int(reached[digit - 1]) if digit else 0
        last = (last << _DIGITS) | digit
    masks: list[Tensor] = []
    for weight in weights:
        keys_W = magnitudes(weight).long()
        equal = keys_W == last
        taken = (keys_W < last) | (equal & (equal.cumsum(0) <= rank))
        rank = max(0, rank - int(equal.sum()))
        masks.append(taken.view(weight.shape))
    return masks


@dataclass(frozen=True, kw_only=True)
class Magnitude(Step):
    """Set the smallest weights of the blocks' matrices to zero. Nothing gets smaller or faster.

    Parameters
    ----------
    per : model: one threshold for all matrices in scope; layer: the same share of each matrix
    scope : all: the projections of attention and MLP; attention or ffn: those alone. Embeddings, head, norms and biases
        are never touched, as in the study that compared these scopes

    Raises
    ------
    ChainError
        When `per` is neither.

    Notes
    -----
    Exactly round(amount x weights in scope) weights are set to zero (of each matrix, per layer), those that were zero
    before among them. Cost: three passes over the weights in scope for every amount; nothing is prepared.

    References
    ----------
    [namburi2023cost]_ section 3; the criterion is that of [han2015learning]_.
    """

    unit: ClassVar[str] = "weights"
    family: ClassVar[str] = "unstructured"
    reference: ClassVar[str] = "namburi2023cost"
    scopes: ClassVar[tuple[str, ...]] = ("all", "attention", "ffn")

    per: str = "model"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in PER:
            raise ChainError(f"magnitude: per must be one of {', '.join(PER)}, got {self.per!r}")

    def matrices(self, model: Model) -> list[nn.Linear]:
        """The matrices in scope, from input to output."""
        parts = {"all": ("attention", "ffn"), "attention": ("attention",), "ffn": ("ffn",)}[self.scope]
        return [matrix for block in model.blocks for part in parts for matrix in getattr(block, part)]

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        sizes = [matrix.weight.numel() for matrix in self.matrices(model)]
        return round(amount * sum(sizes)) if self.per == "model" else sum(round(amount * size) for size in sizes)

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        return Prepared(context.scratch).finish()

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        weights = [matrix.weight for matrix in self.matrices(model)]
        groups = [weights] if self.per == "model" else [[weight] for weight in weights]
        names = parameter_names(model)
        cut: dict[str, Tensor] = {}
        zeros = 0
        for group in groups:
            count = round(amount * sum(weight.numel() for weight in group))
            zeros += count
            for weight, mask in zip(group, smallest(group, count), strict=True):
                cut[names[weight]] = weight.masked_fill(mask, 0.0)
        in_scope = sum(weight.numel() for weight in weights)
        done = self.done(amount, zeros / in_scope, zeros=zeros, in_scope=in_scope, per=self.per)
        return derive(model, cut).after(done)

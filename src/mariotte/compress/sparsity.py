"""Weights that become zero: which ones, and block by block so that each sees what earlier blocks have become.

Shapes: O outputs and I inputs of a linear layer, M tokens.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte.architectures import Need
from mariotte.compress import allocate
from mariotte.compress.calibration import means, tokens_for
from mariotte.compress.scope import rewrite_, sides
from mariotte.compress.sequential import rewrite_sequentially
from mariotte.cuts import common
from mariotte.errors import ChainError
from mariotte.models.model import Block, Model, OfExpert, Stacked
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Prepared, Step

Cut = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""Given weights (O, I), a statistic of their input, both float64, and how many of each part go: the new weights."""

_SLACK = 9
"""Decimals to which a number of weights is rounded before its fraction is dropped: 100 x 0.29 is 29."""

_DIGITS = 16
"""Bits settled in one pass over the weights; 2^16 counters are kept."""


@dataclass(frozen=True)
class Pattern:
    """Exactly `zeros` of every `of` neighbouring weights of a row are zero.

    For 2:4, the pattern that accelerators know, it does not matter whether an N:M names the zeros or the rest; like
    SparseGPT and its code we name the zeros.
    """

    zeros: int
    of: int

    @classmethod
    def parse(cls, step: str, text: str) -> Pattern:
        """Read ``2:4``.

        Raises
        ------
        ChainError
            When the text is no pattern, or would leave nothing or everything.
        """
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise ChainError(f"{step}: nm must be N:M with 0 < N < M, such as 2:4, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.zeros}:{self.of}"

    @property
    def share(self) -> float:
        """The share of weights that are zero."""
        return self.zeros / self.of

    def check_amount(self, step: str, amount: int | float) -> None:
        """Refuse an amount that is neither nothing nor what the pattern removes, to the six digits that are advised.

        Raises
        ------
        ChainError
            When it is another.
        """
        if amount and not math.isclose(amount, self.share, rel_tol=1e-5):
            raise ChainError(
                f"{step}: nm={self} sets {self.share:.6g} of the weights to zero, got {amount:.6g}: "
                f"write {step}@{self.share:.6g}(nm={self}), or leave nm out"
            )

    def refuse(self, matrices: Sequence[nn.Linear]) -> str | None:
        """Why the pattern does not fit into some of the matrices, or None."""
        widths = sorted({inputs for inputs in (sides(matrix)[1] for matrix in matrices) if inputs % self.of})
        if widths:
            return (
                f"needs input widths that {self.of} divides for nm={self}, and a matrix has {widths[0]}: "
                "leave nm out, or take another scope"
            )
        return None


def whole(weights: int, amount: float) -> int:
    """Whole weights that a share of some makes, rounded down, so that some are always left."""
    return min(math.floor(round(weights * amount, _SLACK)), weights - 1)


def smallest(weights: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """Masks of the `count` smallest entries by magnitude, over all tensors together.

    Parameters
    ----------
    weights : floating tensors of one dtype
    count : how many, from 0 to all

    Yields
    ------
    bool tensors of the same shapes, one after another, True where an entry is among the smallest; exactly `count` are.
    Of equal ones, those that come first along `weights` are taken, so that a smaller count is always a subset of a
    larger one.

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
    for weight in weights:
        keys_W = magnitudes(weight).long()
        equal = keys_W == last
        taken = (keys_W < last) | (equal & (equal.cumsum(0) <= rank))
        rank = max(0, rank - int(equal.sum()))
        yield taken.view(weight.shape)


def smallest_of_rows(score_OI: Tensor, counts_O: Tensor) -> Tensor:
    """Mask of the smallest scores of each row, so many as `counts_O` says; of equal ones the first."""
    order_OI = score_OI.argsort(dim=1, stable=True)
    gone_OI = torch.arange(score_OI.shape[1], device=score_OI.device) < counts_O.to(score_OI.device)[:, None]
    return torch.zeros_like(gone_OI).scatter_(1, order_OI, gone_OI)


def smallest_of_groups(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the smallest scores of every group of neighbours in a row; of equal ones the first."""
    groups = score_OI.reshape(-1, pattern.of)
    return smallest_of_rows(groups, torch.full((len(groups),), pattern.zeros)).view(score_OI.shape)


def readers(block: Block, scope: str) -> dict[str, tuple[nn.Linear, ...]]:
    """The block's matrices in scope, those that read the same input together.

    Of matrices that are products of two, the first factors stand in their place, and each second one reads by itself.
    Of a mixture each expert's matrices read what its tokens bring.
    """
    attention, ffn = block.entry.attention_paths, block.entry.ffn_paths
    paths = {
        **({"attention": attention[:-1], "output": attention[-1:]} if scope in ("all", "attention") else {}),
        **({"mlp": ffn[:-1], "down": ffn[-1:]} if scope in ("all", "ffn") and not block.entry.experts else {}),
    }
    found: dict[str, tuple[nn.Linear, ...]] = {}
    for part, some in paths.items():
        split = [[matrix for _, matrix in block.factors(path)] for path in some]
        found[part] = tuple(first for first, *_ in split)
        found |= {f"{part}-{place}": tuple(second) for place, (_, *second) in enumerate(split) if second}
    if scope in ("all", "ffn") and block.entry.experts:
        held = block.module.get_submodule(block.entry.experts)
        ins, down = (cast(Stacked, matrix) for matrix in block.ffn)
        for number in range(ins.experts):
            found[f"expert-{number}"] = (cast(nn.Linear, OfExpert(held, ins, number)),)
            found[f"expert-{number}-down"] = (cast(nn.Linear, OfExpert(held, down, number, ins)),)
    return found


def store_statistics(
    prepared: Prepared, model: Model, context: Context, step: str, scope: str, statistic: Callable[[Tensor], Tensor]
) -> None:
    """Measure the mean of a statistic of every input in scope, in the model as it enters, and store it by block."""
    inputs = {
        f"block-{index} {part}": [matrices[0]]
        for index, block in enumerate(model.blocks)
        for part, matrices in readers(block, scope).items()
    }
    found = means(model, context, step, inputs, statistic)
    for index, block in enumerate(model.blocks):
        prepared.put(f"block-{index}", {part: found.pop(f"block-{index} {part}") for part in readers(block, scope)})


@torch.no_grad()
def prune(model: Model, prepared: Prepared, scope: str, cut: Cut, counts: Sequence[Sequence[Sequence[int]]]) -> Model:
    """A copy with each matrix in scope cut by the statistic that was stored for its input.

    Parameters
    ----------
    counts : weights that go, of each part of each matrix of each block
    """
    pruned = model.copy()
    for index, block in enumerate(pruned.blocks):
        _cut(block, scope, prepared.get(f"block-{index}"), cut, counts[index])
    return pruned


@torch.no_grad()
def prune_sequentially(
    model: Model,
    context: Context,
    step: str,
    scope: str,
    statistic: Callable[[Tensor], Tensor],
    cut: Cut,
    counts: Sequence[Sequence[Sequence[int]]],
) -> Model:
    """A copy with each matrix in scope cut by the mean of a statistic of its input behind the blocks already cut.

    Parameters
    ----------
    statistic : as for `calibration.Means`
    counts : weights that go, of each part of each matrix of each block
    """

    def rewrite(index: int, block: Block, found: Mapping[str, Tensor]) -> None:
        _cut(block, scope, found, cut, counts[index])

    return rewrite_sequentially(model, context, step, lambda block: readers(block, scope), statistic, rewrite)


def _cut(block: Block, scope: str, statistics: Mapping[str, Tensor], cut: Cut, counts: Sequence[Sequence[int]]) -> None:
    each = iter(counts)
    for part, matrices in readers(block, scope).items():
        for matrix in matrices:
            counts_now = next(each)
            statistic = statistics[part].to(matrix.weight.device)
            rewrite_(matrix, lambda weight_OI, x=statistic, n=counts_now: cut(weight_OI, x, n))


@dataclass(frozen=True, kw_only=True)
class OneShot(Step):
    """A method that sets weights to zero by what their inputs are like, a matrix at a time, without training.

    Subclasses say which statistic of the inputs they need, into which parts they divide a matrix, so many weights of
    each going, and what they make of a matrix.

    Parameters
    ----------
    nm : such as 2:4, exactly so many of every few neighbouring weights of a row; the amount must then say the same
    sequential : measure each block behind the pruned ones before it, for every amount anew
    allocation : how the blocks share the amount: one of `allocate.ALLOCATIONS`
    """

    unit: ClassVar[str] = "weights"
    family: ClassVar[str] = "unstructured"
    scopes: ClassVar[tuple[str, ...]] = ("all", "attention", "ffn")
    needs: ClassVar[tuple[Need, ...]] = ("one text",)
    mixtures: ClassVar[bool] = True
    per: ClassVar[str]

    nm: str | None = None
    sequential: bool = True
    allocation: str = "uniform"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.name()
        allocate.check_allocation(name, self.allocation)
        if self.pattern is not None and self.of is not None:
            raise ChainError(f"{name}: nm={self.nm} fixes the share of weights, leaving none to of={self.of}: drop one")
        if self.pattern is not None and self.allocation != "uniform":
            raise ChainError(
                f"{name}: nm={self.nm} fixes the share of each block, leaving none to allocation={self.allocation}: "
                "drop one"
            )

    @abstractmethod
    def statistic(self, x_MI: Tensor) -> Tensor:
        """The sum over tokens of what is to be known of inputs, (M, I) float64."""

    @abstractmethod
    def parts(self, outputs: int, inputs: int) -> list[int]:
        """The weights of each part of a matrix of which a share of its own goes."""

    @abstractmethod
    def count(self, weights: int, amount: float) -> int:
        """How many weights of a part a share makes."""

    @abstractmethod
    def cut(self, weight_OI: Tensor, statistic: Tensor, counts: Sequence[int]) -> Tensor:
        """The new weights, from the mean of the statistic and how many of each part go."""

    @property
    def pattern(self) -> Pattern | None:
        """What `nm` says."""
        return None if self.nm is None else Pattern.parse(self.name(), self.nm)

    @override
    def accepted(self, amount: int | float | str | None) -> int | float:
        checked = super().accepted(amount)
        if self.pattern is not None:
            self.pattern.check_amount(self.name(), checked)
        return checked

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        if model.kind != "causal" and self.allocation != "uniform":
            return (
                f"needs a causal decoder for allocation={self.allocation}, and {model.entry.model_type} is "
                f"{model.kind}: leave it out"
            )
        return None if self.pattern is None else self.pattern.refuse(model.matrices(self.scope))

    def _matrices(self, model: Model) -> list[list[nn.Linear]]:
        """The matrices in scope of each block, in the order in which they are cut."""
        return [[m for some in readers(block, self.scope).values() for m in some] for block in model.blocks]

    def _counts(self, model: Model, amount: float, shares: Sequence[float]) -> list[list[list[int]]]:
        """Weights that go, of each part of each matrix of each block, when the blocks lose these shares."""
        by_block = [[self.parts(*sides(m)) for m in some] for some in self._matrices(model)]
        if self.allocation == "uniform":
            pattern = self.pattern
            if pattern is not None:
                pattern.check_amount(self.name(), amount)

            def gone(size: int) -> int:
                if pattern is None:
                    return self.count(size, amount)
                return size * pattern.zeros // pattern.of if amount else 0

            return [[[gone(size) for size in sizes] for sizes in matrices] for matrices in by_block]
        sizes = [size for matrices in by_block for some in matrices for size in some]
        each = [s for s, matrices in zip(shares, by_block, strict=True) for some in matrices for _ in some]
        found = iter(common.whole(each, sizes, round(amount * sum(sizes))))
        return [[[next(found) for _ in some] for some in matrices] for matrices in by_block]

    @override
    def whole(self) -> str | None:
        if self.allocation == "greedy":
            return "measures the loss of the whole model many times for allocation=greedy: take influence or uniform"
        return super().whole()

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        if self.allocation != "uniform":
            return round(amount * sum(self._sizes(model)))
        counts = self._counts(model, amount, [amount] * len(model.blocks))
        return sum(sum(parts) for matrices in counts for parts in matrices)

    def _sizes(self, model: Model) -> list[int]:
        return [sum(math.prod(sides(m)) for m in some) for some in self._matrices(model)]

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        # Asked for also where only `apply` reads it, so that what cannot be done is refused before any work.
        tokens_NT = tokens_for(context, self.name(), predicting=self.allocation == "greedy")
        prepared, sizes = Prepared(context.scratch), self._sizes(model)
        # The trials of a greedy allocation are not sequential either: the blocks are only compared by them.
        if not self.sequential or self.allocation == "greedy":
            store_statistics(prepared, model, context, self.name(), self.scope, self.statistic)

        def loss(shares: Sequence[float]) -> float:
            amount = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
            pruned = prune(model, prepared, self.scope, self.cut, self._counts(model, amount, shares))
            return float(token_nll(pruned, tokens_NT).double().mean())

        tensors = allocate.gather(self.allocation, model, context, self.name(), sizes, amounts, loss)
        if tensors:
            prepared.put("allocation", tensors)
        return prepared.finish(until=max(amounts, default=0.0))

    @override
    def covers(self, prepared: Prepared, amounts: Sequence[int | float]) -> bool:
        # A greedy path ends at the largest amount that was asked for.
        return self.allocation != "greedy" or prepared.facts["until"] >= max(amounts, default=0.0)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        sizes = self._sizes(model)
        tensors = prepared.get("allocation") if "allocation" in prepared else {}
        shares = allocate.spread(self.allocation, tensors, amount, sizes)
        counts = self._counts(model, amount, shares)
        zeros = sum(sum(parts) for matrices in counts for parts in matrices)
        facts: dict[str, Any] = {"per": self.per}
        if self.allocation != "uniform":
            facts |= {"allocation": self.allocation, "shares": [round(share, 6) for share in shares]}
        done = self.done(amount, zeros / sum(sizes), zeros=zeros, in_scope=sum(sizes), **facts)
        if not zeros:
            return model.copy().after(done)
        if self.sequential:
            pruned = prune_sequentially(model, context, self.name(), self.scope, self.statistic, self.cut, counts)
        else:
            pruned = prune(model, prepared, self.scope, self.cut, counts)
        return pruned.after(done)

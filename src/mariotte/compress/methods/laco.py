"""Fewer blocks: runs of neighbours are merged into their first.

Shapes: D model width, L blocks, T tokens of a row, B rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte.architectures import Need, Shape
from mariotte.compress.blocks import keep_blocks, removed_with_blocks
from mariotte.compress.calibration import check_finite, rows_at_once, tokens_for
from mariotte.cuts.blocks import kept_blocks, refuse_merging
from mariotte.errors import ChainError
from mariotte.models.blockwise import finals
from mariotte.models.model import Block, Model
from mariotte.models.paging import pager_of
from mariotte.models.step import Context, Prepared, Step

__all__ = ["LaCo"]

RULES = ("difference", "last")

Merge = tuple[int, int]
"""The place of a block among those that are left, and how many behind it are merged into it."""

_THRESHOLDS = 10
"""That a search tries, about."""

_STEP = 2.0**-10
"""To which a threshold is found."""


def collapse(shares: Mapping[int, int], others: Sequence[Mapping[int, int]], rule: str) -> dict[int, int]:
    """A block with the blocks behind it merged into it, as multiples of the blocks that there were at first.

    Parameters
    ----------
    shares, others : the block, and those behind it, likewise
    rule : difference: θ + Σ (θ_k - θ), the paper's equation 1; last: the last of them, see `LaCo`
    """
    if rule == "last":
        return dict(others[-1])
    merged = {block: share * (1 - len(others)) for block, share in shares.items()}
    for other in others:
        for block, share in other.items():
            merged[block] = merged.get(block, 0) + share
    return {block: share for block, share in sorted(merged.items()) if share}


def merged(layers: int, merges: Sequence[Merge], rule: str) -> dict[int, dict[int, int]]:
    """By the first block of each run that is left, what of the uncut blocks it is made of."""
    left = [(block, {block: 1}) for block in range(layers)]
    for place, behind in merges:
        first, shares = left[place]
        others = [other for _, other in left[place + 1 : place + 1 + behind]]
        left[place : place + 1 + behind] = [(first, collapse(shares, others, rule))]
    return dict(left)


def collapses(
    similarity: Callable[[Sequence[Merge]], float], layers: int, gone: int, threshold: float, together: int, apart: int
) -> list[Merge]:
    """The merges that are made over a threshold, until `gone` blocks have gone or no more can.

    Parameters
    ----------
    similarity : of the final representations of the model after some merges with those of the uncut one
    layers : L
    gone : blocks to go, fewer than L
    threshold : a merge is kept when the similarity after it is above this
    together : blocks that are merged into one at most
    apart : blocks by which the next run begins earlier after a merge that was kept

    Notes
    -----
    From the end to the beginning: after a merge that is kept the next run begins `apart` earlier, else one earlier. As
    in the authors' code the first run ends before the last block. The published algorithm ends at the first block; ours
    begins again at the end as long as a sweep has kept anything, and merges fewer in the last run where as many would
    be more than asked.
    """
    merges: list[Merge] = []
    left, kept = layers, True
    while kept and left > layers - gone:
        kept, place = False, max(left - 1 - together, 0)
        while place >= 0 and left > layers - gone:
            behind = min(together - 1, left - place - 1, left - layers + gone)
            if behind and similarity([*merges, (place, behind)]) > threshold:
                merges.append((place, behind))
                left, kept = left - behind, True
                place = min(place - apart, left - 2)
            else:
                place -= 1
    return merges


@dataclass(frozen=True, kw_only=True)
class LaCo(Step):
    """Merge runs of blocks into their first by adding parameter differences.

    Parameters
    ----------
    threshold : cosine of the final representations with those of the uncut model over which a merge is kept. None
        finds the highest with which as many blocks go as the amount asks
    together : blocks that are merged into one at most
    apart : blocks by which the next run begins earlier after a merge that was kept
    rule : what the merged block is. difference: θ + Σ (θ_k - θ) over the blocks k behind it, the paper's formula;
        last: the last of the run, which is what the authors' notebook computes, as it takes each difference from a sum
        that already holds the one before

    Raises
    ------
    ChainError
        When the rule is none of these, the threshold is no cosine, or nothing would be merged.

    Notes
    -----
    The similarity is the cosine of the stream behind the final norm, all tokens of a row taken as one vector, and then
    its mean over rows. A block keeps its own norms, as in the authors' code, and its own kind of attention. At
    least one block stays. Of products of two matrices (after svd-llm) blocks can only be taken as they are, by
    ``rule=last``: the factors' sums are not the factors of the sum. With a threshold of one's own an amount that is not
    reached over it is refused.

    When to use it: to compare with LaCo. The formula extrapolates: of a run of k blocks the first counts 2 - k times.
    Removing blocks lost less at the same size: of the seven of testbed llama-1m (dense 1.345) two were merged away at
    2.145 nats, with ``rule=last`` at 1.620, `shortgpt` came to 1.521 and `sleb` to 1.432.

    Cost: at most L forward passes for each threshold that is tried, about ten; those after the same merges are made
    once; a streamed model is read once for each. Few rows are enough: the authors take five sentences. Memory: the
    merged blocks a second time, and the final stream of all calibration tokens.

    References
    ----------
    [yang2024laco]_ equation 1 and algorithm 1.
    """

    unit: ClassVar[str] = "blocks"
    family: ClassVar[str] = "depth"
    reference: ClassVar[str] = "yang2024laco"
    streams: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("causal",)
    mixtures: ClassVar[bool] = True

    threshold: float | None = None
    together: int = 4
    apart: int = 2
    rule: str = "difference"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not -1 <= self.threshold < 1:
            raise ChainError(f"laco: threshold must be a cosine in [-1, 1), such as 0.65, got {self.threshold}")
        if self.together < 2:
            raise ChainError(f"laco: together must be at least 2 blocks, got {self.together}")
        if self.apart < 1:
            raise ChainError(f"laco: apart must be at least 1 block, got {self.apart}")
        if self.rule not in RULES:
            raise ChainError(f"laco: rule must be {' or '.join(RULES)}, got {self.rule!r}")

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model) or refuse_merging(model, self.rule):
            return reason
        sizes = [{name: p.shape for name, p in block.module.named_parameters()} for block in model.blocks]
        if any(other != sizes[0] for other in sizes):
            return "needs blocks with equal parameters to merge, and these differ: take shortgpt or sleb"
        return None

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        return removed_with_blocks(model, kept_blocks(model, amount))

    @override
    def passes(self, shape: Shape, amount: int | float) -> float:
        return _THRESHOLDS * shape.layers / 2 if amount else 1.0

    @override
    def covers(self, prepared: Prepared, amounts: Sequence[int | float]) -> bool:
        """Whether the merges of every amount are known."""
        return {str(amount) for amount in amounts} <= set(prepared.facts["of"])

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        """Find the merges that each of these amounts needs; those in the folder are kept."""
        layers = model.shape.layers
        prepared = Prepared.open(context.scratch) or Prepared(context.scratch)
        found: dict[str, dict[str, object]] = dict(prepared.facts.get("merges", {}))
        of: dict[str, int] = dict(prepared.facts.get("of", {}))
        similarity = _Similarity(self, model, context)
        for done, amount in enumerate(amounts):
            gone = layers - kept_blocks(model, amount)
            of[str(amount)] = gone
            if str(gone) not in found:
                merges, threshold = self._search(similarity, layers, gone)
                reached = similarity(merges) if merges else 1.0
                found[str(gone)] = {"merges": merges, "threshold": threshold, "similarity": reached}
            context.progress("merges", (done + 1) / len(amounts))
        return prepared.finish(merges=found, of=of)

    def _search(
        self, similarity: Callable[[Sequence[Merge]], float], layers: int, gone: int
    ) -> tuple[list[Merge], float]:
        """The merges with which as many blocks go, and the threshold: the given one, or the highest."""

        def tried(threshold: float) -> tuple[list[Merge], int]:
            merges = collapses(similarity, layers, gone, threshold, self.together, self.apart)
            return merges, sum(behind for _, behind in merges)

        if not gone:
            return [], 1.0
        if self.threshold is not None:
            return tried(self.threshold)[0], self.threshold
        # Below any cosine every merge is kept, above 1 none.
        low, high = -1.0 - _STEP, 1.0
        best = tried(low)[0]
        while high - low > _STEP:
            middle = (low + high) / 2
            merges, removed = tried(middle)
            if removed == gone:
                low, best = middle, merges
            else:
                high = middle
        return best, low

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        """The model with the merges of this amount.

        Raises
        ------
        ChainError
            When fewer blocks go over the threshold than the amount asks for.
        """
        layers, left = model.shape.layers, kept_blocks(model, amount)
        found = prepared.facts["merges"][str(layers - left)]
        merges: list[Merge] = [(place, behind) for place, behind in found["merges"]]
        removed = sum(behind for _, behind in merges)
        if removed != layers - left:
            raise ChainError(
                f"laco merges away {removed} of {layers} blocks over a threshold of {self.threshold}, got an amount of "
                f"{layers - left}: ask for at most {removed / layers:.3g}, or for a lower threshold, or leave it out"
            )
        runs = merged(layers, merges, self.rule)
        made_of = {first: shares for first, shares in runs.items() if shares != {first: 1}}
        done = self.done(
            amount,
            1 - left / layers,
            layers=[layers, left],
            merged={str(first): {str(other): times for other, times in of.items()} for first, of in made_of.items()},
            threshold=round(found["threshold"], 6),
            similarity=round(found["similarity"], 6),
        )
        return _collapsed(model, runs).after(done)


def _collapsed(model: Model, runs: Mapping[int, Mapping[int, int]], *, share: bool = False) -> Model:
    """The model with the first block of each run, made of what was merged into it; see `keep_blocks` for `share`."""
    cut = keep_blocks(model, list(runs), share=share)
    parameters = [_merging(block) for block in model.blocks]
    for block, (first, shares) in zip(cut.blocks, runs.items(), strict=True):
        for name, old in parameters[first].items() if shares != {first: 1} else ():
            total = torch.zeros_like(old, dtype=torch.float64)
            for other, times in shares.items():
                total += times * parameters[other][name].double()
            path, _, leaf = name.rpartition(".")
            pager = pager_of(old)
            value = total.to(old.dtype) if pager is None else pager.stored(total, old.dtype)
            new = nn.Parameter(value, requires_grad=old.requires_grad)
            setattr(block.module.get_submodule(path), leaf, new)
    return cut


def _merging(block: Block) -> dict[str, nn.Parameter]:
    """The parameters of a block that are merged, by path from it: all but those of norms, whose weights are vectors."""
    return {
        name: parameter
        for name, parameter in block.module.named_parameters()
        if getattr(getattr(block.module.get_submodule(name.rpartition(".")[0]), "weight", None), "ndim", 2) > 1
    }


class _Similarity:
    """Mean cosine of the final representations of a model after some merges with those of the uncut model."""

    def __init__(self, step: LaCo, model: Model, context: Context) -> None:
        self.step, self.model = step, model
        self.tokens_NT = tokens_for(context, step.name())
        self.known: dict[tuple[Merge, ...], float] = {}
        # What is not computed with just now has no place on the device of a model that does not fit there either.
        where = torch.device("cpu") if model.streamed else model.device
        self.dense = [self._checked(final_BTD, "the uncut stream").to(where) for final_BTD in self._final(model)]

    def _final(self, model: Model) -> Iterator[Tensor]:
        """The stream behind the final norm, some rows at once."""
        yield from finals(model, cast("tuple[Tensor, ...]", self.tokens_NT.split(rows_at_once(self.tokens_NT))))

    def _checked(self, found: Tensor, what: str) -> Tensor:
        check_finite(found, self.step.name(), what, self.model)
        return found

    def __call__(self, merges: Sequence[Merge]) -> float:
        key = tuple(merges)
        if key not in self.known:
            layers = self.model.shape.layers
            seen = _collapsed(self.model, merged(layers, merges, self.step.rule), share=True)
            total = 0.0
            for before_BTD, after_BTD in zip(self.dense, self._final(seen), strict=True):
                self._checked(after_BTD, f"the stream after the merges {list(key)}")
                before_BI, after_BI = (
                    x_BTD.to(self.model.device).double().flatten(1) for x_BTD in (before_BTD, after_BTD)
                )
                total += float(nn.functional.cosine_similarity(before_BI, after_BI).sum())
            self.known[key] = total / len(self.tokens_NT)
        return self.known[key]

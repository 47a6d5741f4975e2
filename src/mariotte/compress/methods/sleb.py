"""Fewer blocks: again and again the one without which the model predicts best.

Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from mariotte.architectures import Need, Shape
from mariotte.compress.blocks import keep_blocks, removed_with_blocks
from mariotte.compress.calibration import check_finite, rows_at_once, tokens_for
from mariotte.cuts.blocks import kept_blocks, refuse_sparing
from mariotte.errors import ChainError
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Prepared, Step

__all__ = ["SLEB"]


def greedy_order(
    loss: Callable[[Sequence[int]], float], alive: Sequence[int], candidates: Sequence[int], count: int
) -> tuple[list[int], list[float]]:
    """Blocks in the order in which they are best done without.

    Parameters
    ----------
    loss : of the model with the blocks of these indices, ascending
    alive : blocks that are there
    candidates : those of them that may go
    count : how many should go, at most all candidates

    Returns
    -------
    The blocks, the first to go first, and the loss after each has gone; of equal ones the first goes
    """
    left, order, losses = list(alive), list[int](), list[float]()
    for _ in range(count):
        tried = {block: loss([b for b in left if b != block]) for block in left if block in candidates}
        gone = min(tried, key=tried.__getitem__)
        left.remove(gone)
        order.append(gone)
        losses.append(tried[gone])
    return order, losses


@dataclass(frozen=True, kw_only=True)
class SLEB(Step):
    """Remove the block whose removal raises the calibration loss least, and again, as often as the amount asks.

    Parameters
    ----------
    first, last : blocks that are spared at the beginning and at the end. The authors' code spares one of each

    Raises
    ------
    ChainError
        When these are no counts.

    Notes
    -----
    The loss is the mean over calibration tokens of their negative log-likelihood. It is measured anew after each
    removal, so that the order knows what the blocks that are left do for one another; `shortgpt` ranks all by the uncut
    model. One nested order serves all amounts; asked for more later, it is continued and not begun again. At least one
    block stays, and those that are spared: of an amount that asks for more, what can go goes.

    When to use it: as `shortgpt`, where more calibration may be spent, above all where several blocks go: without two
    of the seven blocks of testbed llama-1m (dense 1.345) it came to 1.432 nats, `shortgpt` to 1.521; without one of the
    five of stories260K both take the same.

    Cost: L forward passes for the first block that goes, one fewer for each that follows: of k blocks about k L, each
    over all calibration tokens and as much faster as the model has lost blocks. Memory: the model and its activations.
    A streamed model is read once for each pass.

    References
    ----------
    [song2024sleb]_ algorithm 1.
    """

    unit: ClassVar[str] = "blocks"
    family: ClassVar[str] = "depth"
    reference: ClassVar[str] = "song2024sleb"
    streams: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("causal",)
    mixtures: ClassVar[bool] = True

    first: int = 0
    last: int = 0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.first, self.last) < 0:
            raise ChainError(f"sleb: first and last must be numbers of blocks, got {self.first} and {self.last}")

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_sparing(model, self.first, self.last)

    def _kept(self, model: Model, amount: int | float) -> int:
        return kept_blocks(model, amount, self.first + self.last)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        return removed_with_blocks(model, self._kept(model, amount))

    @override
    def passes(self, shape: Shape, amount: int | float) -> float:
        gone = round(shape.layers * amount)
        return 1.0 + sum((left + 1) * left / shape.layers for left in range(shape.layers - gone, shape.layers))

    @override
    def covers(self, prepared: Prepared, amounts: Sequence[int | float]) -> bool:
        """Whether the order is long enough."""
        return max(amounts, default=0.0) <= prepared.facts["until"]

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        """Find the order, as far as the largest of these amounts needs; one in the folder is continued."""
        tokens_NT = tokens_for(context, self.name(), predicting=True)
        layers = model.shape.layers
        until = max(amounts, default=0.0)
        prepared = Prepared.open(context.scratch) or Prepared(context.scratch)
        order: list[int] = list(prepared.facts.get("order", []))
        losses: list[float] = list(prepared.facts.get("losses", []))
        wanted = layers - self._kept(model, until) - len(order)
        left = [block for block in range(layers) if block not in order]
        spared = {*range(self.first), *range(layers - self.last, layers)}
        passes, tried = sum(len(left) - len(spared) - i for i in range(wanted)) + (not losses), 0

        def loss(kept: Sequence[int]) -> float:
            nonlocal tried
            nll_NT = token_nll(keep_blocks(model, kept, share=True), tokens_NT, batch=rows_at_once(tokens_NT))
            found = nll_NT.double().mean()
            check_finite(found, self.name(), f"blocks {', '.join(map(str, kept))}", model, what="losses")
            tried += 1
            context.progress("order", tried / passes)
            return float(found)

        if wanted and not losses:
            losses.append(loss(range(layers)))
        more, after = greedy_order(loss, left, [block for block in left if block not in spared], wanted)
        return prepared.finish(until=until, order=order + more, losses=losses + after)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        layers, left = model.shape.layers, self._kept(model, amount)
        order: list[int] = prepared.facts["order"]
        assert len(order) >= layers - left, (order, layers, left)
        gone = order[: layers - left]
        losses: list[float] = prepared.facts["losses"][: len(gone) + 1] if gone else []
        done = self.done(
            amount,
            1 - left / layers,
            layers=[layers, left],
            removed_blocks=sorted(gone),
            calibration_loss=[round(loss, 6) for loss in losses],
        )
        return keep_blocks(model, [block for block in range(layers) if block not in gone]).after(done)

"""Feed-forward neurons dropped at random: what a cut of this size costs when nothing is chosen.

Shapes: F neurons of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from mariotte.accounting import check_round_to
from mariotte.architectures import Need
from mariotte.compress.neurons import keep_neurons, removed_with_neurons
from mariotte.cuts.neurons import neuron_width, refuse_unequal_widths
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["PruneNetRandom"]


@dataclass(frozen=True, kw_only=True)
class PruneNetRandom(Step):
    """Remove the same number of feed-forward neurons from each block, drawn uniformly without replacement.

    Parameters
    ----------
    round_to : multiple to which the width is rounded; None takes 128 in models at least 1024 wide, 8 in smaller ones;
        1 is the published count

    Raises
    ------
    ChainError
        When `round_to` is not positive.

    Notes
    -----
    The calibration-free method of the Compression Laws study: PruneNet's cut with a policy that knows nothing. It looks
    at no text and at no weight, so that its results are a baseline for every method that does; results differ from seed
    to seed, so use several.

    The published code draws the kept rows anew for every ratio and keeps int((1 - r) F) of them. We draw one
    permutation a block and keep its first K neurons: each cut is as uniform as theirs, and of two cuts the larger is a
    subset of the smaller, so that a curve over ratios carries no noise of its own. Widths are rounded to the nearest
    multiple as everywhere (recorded); with ``round_to=1`` K is (1 - r) F to the nearest neuron, at most one more than
    theirs. A block's permutation depends on the run's seed, the block's place and F only. Kept neurons stay in their
    old order, which changes no logit but for float rounding.

    Cost: F random numbers a block, and a copy of what is kept.

    References
    ----------
    [compressionlaws2025]_ section 3; [sengupta2025prunenet]_ for what is cut.
    """

    unit: ClassVar[str] = "neurons"
    family: ClassVar[str] = "width"
    reference: ClassVar[str] = "compressionlaws2025"
    streams: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("causal",)

    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_round_to(self.name(), self.round_to, of="neurons")

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_unequal_widths(model)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        width, _ = neuron_width(model, amount, self.round_to)
        return removed_with_neurons(model, width)

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        prepared = Prepared(context.scratch)
        neurons = model.shape.ffn
        for index in range(len(model.blocks)):
            order_F = torch.randperm(neurons, generator=context.generator(self.name(), "block", index))
            prepared.put(f"block-{index}", {"order": order_F})
        return prepared.finish(ffn=neurons)

    @override
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        neurons = model.shape.ffn
        width, multiple = neuron_width(model, amount, self.round_to)
        done = self.done(amount, 1 - width / neurons, ffn=[neurons, width], rounding=multiple)
        if width == neurons:
            return model.copy().after(done)
        kept = [prepared.get(f"block-{index}")["order"][:width] for index in range(len(model.blocks))]
        return keep_neurons(model, kept).after(done)

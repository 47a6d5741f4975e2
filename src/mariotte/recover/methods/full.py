"""Full fine-tuning: every weight trains on text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from mariotte.models.model import Model
from mariotte.models.step import Context
from mariotte.recover.learner import Weights, cannot_train
from mariotte.recover.trunk import Recovery

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(Recovery):
    """Recover by training all weights.

    Parameters
    ----------
    lr : learning rate of the trunk; None takes 1e-3, less beyond a hidden size of 128
    batch, block, warmup, corpus, trunk, keep_best, repeats : see `Recovery`

    Notes
    -----
    Weights train in float32 whatever their dtype, and are rounded once, at the end. A tied head stays tied. Where an
    earlier step of the chain set weights to zero, the zeros of every matrix stay (``mask_reapplied``).

    Costs: memory, four float32 copies of the model (weights, gradient, two moments); disk, three a D.

    References
    ----------
    AdamW: [loshchilov2019adamw]_. The constant rate with a branch that decays: [hagele2024scaling]_.
    """

    reference: ClassVar[str] = "loshchilov2019adamw"

    @override
    def refuse(self, model: Model) -> str | None:
        return cannot_train(self.name(), model)

    @override
    def rate(self, model: Model) -> float:
        return 1e-3 * min(1.0, (128 / model.shape.hidden) ** (2 / 3))

    @override
    def learner(self, model: Model, context: Context) -> Weights:
        return Weights.of(model)

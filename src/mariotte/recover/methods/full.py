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
    lr : learning rate of the trunk; None takes 2e-4, less beyond a hidden size of 128, see Notes
    batch, block, warmup, corpus, trunk, keep_best, repeats, gain, most : see `Recovery`

    Notes
    -----
    Weights train in float32 whatever their dtype, and are rounded once, at the end. A tied head stays tied. Where an
    earlier step of the chain set weights to zero, the zeros of every matrix stay (``mask_reapplied``).

    The default rate is ours, from a testbed model of width 128 (dense test loss 1.3371): after ``ffn@0.3`` (1.3377)
    16k tokens gave 1.3378, 1.3395, 1.3461 and 1.3556 at rates of 1e-4, 2e-4, 5e-4 and 1e-3; after ``slice@0.3``
    (1.4137) 1.3836, 1.3769, 1.3756 and 1.3895. lora gave 1.3376 and 1.3751 there: on few tokens, prefer it.

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
        return 2e-4 * min(1.0, (128 / model.shape.hidden) ** (2 / 3))

    @override
    def learner(self, model: Model, context: Context) -> Weights:
        return Weights.of(model)

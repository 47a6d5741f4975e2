"""LoRA: low-rank adapters on every matrix of the blocks, trained on text and merged into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from mariotte.models.model import Model
from mariotte.models.step import Context
from mariotte.recover.learner import Adapters, cannot_adapt, check_adapters
from mariotte.recover.trunk import Recovery

__all__ = ["LoRA"]


@dataclass(frozen=True, kw_only=True)
class LoRA(Recovery):
    """Recover with low-rank adapters on all linear layers of the blocks, merged at the end.

    Parameters
    ----------
    rank : R
    alpha : the change of a matrix is alpha / R · B A
    lr : learning rate of the trunk; None takes 2e-3, less beyond a hidden size of 128, see Notes
    dropout : of the adapters' input, in [0, 1)
    batch, block, warmup, corpus, trunk, keep_best, repeats, gain, most : see `Recovery`

    Notes
    -----
    The defaults are ours, from the testbed's models of width 48 and 128 with 30 % of the feed-forward neurons or of
    the width gone, and 4k to 64k tokens. A rate of 4e-3 and more recovered faster what was badly cut but left worse a
    model that had lost next to nothing (loss 1.349 before, 1.379 after 64k tokens); 1e-3 recovered less.
    Batches of 4 rows recovered more than 8 or 16 at 4k and 16k tokens, as much at 64k. Beyond width 128 the rate
    falls as width to the power -2/3, to 2e-4 at 4096, where 1e-4 to 3e-4 is usual.

    Where an earlier step of the chain set weights to zero, all zeros stay: the change is masked in training and in
    merging alike. The facts count them (``mask_reapplied``). All else is frozen: embeddings, head, norms, biases, and
    the shortcuts of a model that `slicegpt` cut.

    Costs, with D tokens in all: memory, one copy of the model when merging, none while training; disk, three float32
    copies of the adapter a D.

    References
    ----------
    [hu2022lora]_ section 4. The constant rate with a branch that decays: [hagele2024scaling]_.
    """

    reference: ClassVar[str] = "hu2022lora"
    version: ClassVar[int] = 2  # small matrices are changed before the product: other rounding

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapters(self.name(), self.rank, self.alpha, self.dropout)

    @override
    def refuse(self, model: Model) -> str | None:
        return cannot_adapt(self.name(), model)

    @override
    def rate(self, model: Model) -> float:
        return 2e-3 * min(1.0, (128 / model.shape.hidden) ** (2 / 3))

    @override
    def learner(self, model: Model, context: Context) -> Adapters:
        return Adapters.beside(model, context, self.name(), rank=self.rank, alpha=self.alpha, dropout=self.dropout)

    @override
    def settings(self) -> Mapping[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}

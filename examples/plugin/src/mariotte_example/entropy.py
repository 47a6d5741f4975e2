"""How unsure a model is: the mean entropy of its predictions.

Shapes: N rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from typing_extensions import override

from mariotte.data import corpora, tokens
from mariotte.data.tokens import Blocks
from mariotte.errors import ChainError
from mariotte.evaluate.base import Measure, Measurement
from mariotte.models.model import Model

__all__ = ["Entropy"]


@dataclass(frozen=True, kw_only=True)
class Entropy(Measure):
    """Mean entropy of the next token's distribution over the test split of a corpus, in nats.

    Parameters
    ----------
    on : corpus
    rows : rows read
    block : tokens a row
    """

    rows: int = 32
    block: int = 64

    metrics: ClassVar = {"entropy": "loss"}

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("block", self.block)):
            if value < 1:
                raise ChainError(f"entropy: {name} must be at least 1, got {value}")

    def _read(self, model: Model) -> Blocks:
        return tokens.read(corpora.find(self.on), "test", model.tokenizer, self.block, self.rows)

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        read = self._read(model)
        return {"tokens": read.sha256, "tokenizer": read.tokenizer, "dtype": str(model.hf.dtype)}

    @override
    @torch.no_grad()
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        read = self._read(model)
        total = 0.0
        for row_T in read.tokens:
            log_TV = model.logits(row_T[None])[0].double().log_softmax(-1)
            total -= float((log_TV.exp() * log_TV).sum())
        return Measurement(metrics={"entropy": total / read.tokens.numel()}, protocol=self.protocol(model))

"""Eight-bit floats: each weight keeps an exponent of its own, and checkpoints hold them packed.

Shapes: O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte.architectures import Need
from mariotte.compress.quantize import Quantizer, packed_bytes
from mariotte.compress.scope import in_scope
from mariotte.models import packed
from mariotte.models.model import Model

__all__ = ["FP8"]


@dataclass(frozen=True, kw_only=True)
class FP8(Quantizer):
    """Round weights to eight-bit floats (e4m3), a scale for each output channel; activations stay as they are.

    Parameters
    ----------
    scope : all: the projections of attention and MLP; attention or ffn: those alone; head: the final dense layer alone,
        which gets a matrix of its own where it was tied to the embeddings

    Notes
    -----
    It takes no amount: write ``fp8``. The levels are those of torchao's ``Float8WeightOnlyConfig``: four bits of
    exponent and three of mantissa, the largest weight of a channel at 448. Relative to their size small weights are
    rounded as well as large ones, unlike by ``int8``, whose largest error in a channel is nine times smaller.

    In memory weights are kept as what these floats stand for, in the model's own dtype. A checkpoint holds them as
    torchao packs them, one byte a weight and a float32 scale a channel: stock transformers loads it where torchao is
    installed, to the same logits. In a class of ours, and in encoder-decoders, it holds them unpacked.

    Cost: one pass over the weights in scope, on the CPU.

    References
    ----------
    [micikevicius2022fp8]_ table 1 for e4m3; torchao for the scales.
    """

    reference: ClassVar[str] = "micikevicius2022fp8"
    needs: ClassVar[tuple[Need, ...]] = ("linear",)
    fixed: ClassVar[int | None] = 8

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        # A subclass with a pass of its own, such as Falcon's, asks of packed weights what torchao does not give.
        own = {type(m).__name__ for m in in_scope(model, self.scope).values() if type(m) is not nn.Linear}
        if own:
            return f"needs torch's own linear layers, and {model.entry.model_type} has {sorted(own)[0]}: take int8"
        return None if packed.installed() else f"needs torchao, which is not installed: {packed.INSTALL}, or take int8"

    @override
    def rounded(self, weight_OI: Tensor, bits: int, scales: torch.dtype) -> Tensor:
        return packed.round_float8(weight_OI)

    @override
    def packed(self, outputs: int, inputs: int, bits: int, scales: torch.dtype) -> int:
        return packed_bytes(outputs * inputs, bits, outputs, torch.float32)

    @override
    def facts(self) -> dict[str, Any]:
        return {"stored": packed.STORED}

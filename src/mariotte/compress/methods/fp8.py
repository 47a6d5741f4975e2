"""Eight-bit floats: each weight keeps an exponent of its own, and checkpoints hold them packed.

Shapes: O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from mariotte.compress.quantize import Held, packed_bytes
from mariotte.models import packed

__all__ = ["FP8"]


@dataclass(frozen=True, kw_only=True)
class FP8(Held):
    """Round weights to eight-bit floats (e4m3), a scale for each output channel; activations stay as they are.

    Notes
    -----
    It takes no amount: write ``fp8``. The levels are those of torchao's ``Float8WeightOnlyConfig``: four bits of
    exponent and three of mantissa, the largest weight of a channel at 448. Relative to their size small weights are
    rounded as well as large ones, unlike by ``int8``, whose largest error in a channel is nine times smaller.

    In memory weights are kept as what these floats stand for, in the model's own dtype. A checkpoint holds them as
    torchao packs them, one byte a weight and a float32 scale a channel: stock transformers loads it where torchao is
    installed, to the same logits. In a class of ours, in encoder-decoders and for Falcon, whose layers have a pass of
    their own, it holds them unpacked.

    Cost: one pass over the weights in scope, on the CPU.

    References
    ----------
    [micikevicius2022fp8]_ table 1 for e4m3; torchao for the scales.
    """

    reference: ClassVar[str] = "micikevicius2022fp8"
    fixed: ClassVar[int | None] = 8
    otherwise: ClassVar[str] = "int8"

    @property
    @override
    def form(self) -> packed.Form:
        return packed.Form(packed.FLOAT8)

    @override
    def packed(self, outputs: int, inputs: int, bits: int, scales: torch.dtype) -> int:
        return packed_bytes(outputs * inputs, bits, outputs, torch.float32)

"""Eight-bit weights: each output channel rounded to 255 levels around zero.

Shapes: O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.compress.quantize import Quantizer, round_absmax

__all__ = ["Int8"]


@dataclass(frozen=True, kw_only=True)
class Int8(Quantizer):
    """Round weights to eight bits, a scale for each output channel; activations stay as they are.

    Notes
    -----
    It takes no amount: write ``int8``. A channel's scale is its largest magnitude over 127. Simulated: the result is an
    ordinary checkpoint with the rounded weights in the model's own dtype, no smaller and no faster; the bytes counted
    are one a weight and a scale a channel in the dtype of the checkpoint. It is the mildest quantizer here, and rarely
    measurable; take it last, after pruning and recovery. Cost: one pass over the weights in scope.

    References
    ----------
    [dettmers2022llmint8]_ section 2.1, absmax quantization, by row of the weight.
    """

    reference: ClassVar[str] = "dettmers2022llmint8"
    streams: ClassVar[bool] = True
    mixtures: ClassVar[bool] = True
    fixed: ClassVar[int | None] = 8

    @override
    def rounded(self, weight_OI: Tensor, bits: int, scales: torch.dtype) -> Tensor:
        return round_absmax(weight_OI, bits, scales)

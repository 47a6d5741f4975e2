"""Round to nearest: weights of 2 to 8 bits, with nothing done about what the rounding loses.

Shapes: O outputs and I inputs of a matrix, G weights of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.compress.quantize import Grouped, round_absmax, round_minmax

__all__ = ["RTN"]


@dataclass(frozen=True, kw_only=True)
class RTN(Grouped):
    """Round weights to the nearest of 2^bits levels, the same ones for each row or group of neighbours in it.

    Raises
    ------
    ChainError
        When `group` is not positive, or bits are not a whole number from 2 to 8.

    Notes
    -----
    Simulated: the result is an ordinary checkpoint with the rounded weights in the model's own dtype, no smaller and no
    faster; the bytes counted are those of packed integers, a scale a group in the dtype of the checkpoint, and unless
    symmetric a zero point of so many bits. Weights that are zero stay zero. In bfloat16 what an integer stands for is
    rounded once more, to 8 significant bits.

    Rows suffice at 8 bits. At 4 and fewer take groups of 32 to 128, which cost a quarter of a bit or less a weight, and
    expect a calibrated method to lose less. Cost: one pass over the weights in scope.

    References
    ----------
    [frantar2023gptq]_ section 4, where it is the baseline.
    """

    reference: ClassVar[str] = "frantar2023gptq"
    streams: ClassVar[bool] = True
    mixtures: ClassVar[bool] = True

    @override
    def rounded(self, weight_OI: Tensor, bits: int, scales: torch.dtype) -> Tensor:
        rounded = round_absmax if self.symmetric else round_minmax
        weight_NG = weight_OI.reshape(-1, self.group or weight_OI.shape[1])
        return rounded(weight_NG, bits, scales).view(weight_OI.shape)

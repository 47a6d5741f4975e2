"""Eight-bit weights and inputs: what a matrix reads is rounded anew each time, by its own range.

Shapes: O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.compress.quantize import Quantizer, packed_bytes, round_absmax
from mariotte.compress.scope import in_scope
from mariotte.errors import ChainError
from mariotte.models.dynamic import SCHEMES, can_wrap, wrap_
from mariotte.models.model import Model, Stacked
from mariotte.models.step import Context, Prepared

__all__ = ["Int8Dynamic"]


def round_whole_matrix(weight_OI: Tensor) -> Tensor:
    """A matrix rounded to 256 levels with one scale, (O, I): torch's default for weights, symmetric around zero."""
    wide_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
    scale = (wide_OI.abs().amax() / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    # Multiplied as torch does: many weights of a checkpoint lie on a half, and a division puts some on its other side.
    return ((wide_OI * (1 / scale)).round().clamp(-128, 127) * scale).to(weight_OI.dtype)


def _layer(name: str, matrix: object) -> str:
    """The path of what reads a matrix's input, given the name of its weight."""
    return name.rpartition(".")[0] if isinstance(matrix, Stacked) else name.removesuffix(".weight")


@dataclass(frozen=True, kw_only=True)
class Int8Dynamic(Quantizer):
    """Round weights, and what they are multiplied with, to eight bits.

    Parameters
    ----------
    scheme : token: a scale for each output channel of the weights, and one for each token of what a matrix reads, both
        around zero. torch: what torch.ao.quantization.quantize_dynamic does, as in the Cost of Compression study: one
        scale for a whole matrix, and one for all that it reads at once, in 128 levels from the least to the largest

    Raises
    ------
    ChainError
        When `scheme` is neither.

    Notes
    -----
    It takes no amount: write ``int8-dynamic``. Simulated: weights are stored as what their integers stand for, inputs
    are rounded on their way into a matrix, and products are computed in the model's own dtype. So nothing is smaller or
    faster; the bytes counted are one a weight and the scales.

    With the scheme torch the levels are those of torch's own layers, and the output of a layer is theirs to float
    rounding. In a whole model that puts a value now and then on the other side of a half, so that some logits differ
    by a fraction of what quantization costs (``benchmarks/int8_dynamic_parity.py`` shows both side by side). As in
    torch one scale serves a whole batch, so that a row's logits depend on its neighbours. The scheme token has neither
    that nor outlying tokens that cost all others their levels; take it unless you compare with the study.

    The checkpoint is the family's own, and its config says which matrices round their input; ``mariotte`` reads that,
    as does transformers in a process that has imported ``mariotte.models.dynamic``.

    In a mixture each expert rounds what its tokens bring, and what its neurons give, token by token; experts are then
    computed one after another.

    Cost: one pass over the weights in scope, and at run time two passes over what each matrix reads.

    References
    ----------
    [namburi2023cost]_ section 3; [dettmers2022llmint8]_ section 2.1 for scales by row of both factors.
    """

    reference: ClassVar[str] = "namburi2023cost"
    streams: ClassVar[bool] = True
    fixed: ClassVar[int | None] = 8
    mixtures: ClassVar[bool] = True
    plain: ClassVar[bool] = False

    scheme: str = "token"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in SCHEMES:
            raise ChainError(f"int8-dynamic: scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        for name, matrix in in_scope(model, self.scope).items():
            if isinstance(matrix, Stacked):
                if self.scheme == "torch":
                    return "needs matrices one by one for scheme=torch, and experts are stacked: take scheme=token"
                continue
            if not can_wrap(matrix):
                return (
                    f"needs linear layers, and {name.removesuffix('.weight')} is a {type(matrix).__name__}: "
                    "take int8, which rounds weights alone"
                )
        return None

    @override
    def rounded(self, weight_OI: Tensor, bits: int, scales: torch.dtype) -> Tensor:
        return round_whole_matrix(weight_OI) if self.scheme == "torch" else round_absmax(weight_OI, bits, scales)

    @override
    def packed(self, outputs: int, inputs: int, bits: int, scales: torch.dtype) -> int:
        if self.scheme == "torch":
            return packed_bytes(outputs * inputs, bits, 1, torch.float32)
        return packed_bytes(outputs * inputs, bits, outputs, scales)

    @override
    def facts(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "inputs": "rounded"}

    @override
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        quantized = super().apply(model, prepared, amount, context)
        paths = [
            quantized.entry.head if self.scope == "head" else _layer(name, matrix)
            for name, matrix in in_scope(quantized, self.scope).items()
        ]
        wrap_(quantized.hf, dict.fromkeys(paths), self.scheme)
        return quantized

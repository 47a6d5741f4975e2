"""Rounding weights to a few levels: grids, their bytes, and what every quantizer checks and writes down.

Shapes: O outputs and I inputs of a matrix, G weights of a group, which share a scale.

Quantization is simulated: weights are rounded to what the stored integers stand for and kept in the model's own dtype,
so that every program computes with them. Bytes are counted as the packed integers and their scales would take.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.compress.scope import PARTS, SCOPES, change, in_scope, oriented, turned
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step


def round_absmax(weight_NG: Tensor, bits: int, scales: torch.dtype) -> Tensor:
    """Weights rounded to 2^bits - 1 levels that lie evenly around zero, as far as the largest of each group.

    Parameters
    ----------
    weight_NG : (N, G) floating, N groups
    bits : of an integer
    scales : dtype in which a group's scale is stored

    Returns
    -------
    (N, G), in the dtype of `weight_NG`; zero stays zero

    References
    ----------
    [dettmers2022llmint8]_ section 2.1.
    """
    most = 2 ** (bits - 1) - 1
    wide_NG = weight_NG.to(torch.promote_types(weight_NG.dtype, torch.float32))
    scale_N1 = _stored(wide_NG.abs().amax(1, keepdim=True) / most, scales)
    return ((wide_NG / scale_N1).round().clamp(-most, most) * scale_N1).to(weight_NG.dtype)


def round_minmax(weight_NG: Tensor, bits: int, scales: torch.dtype) -> Tensor:
    """Weights rounded to 2^bits levels between the least and the largest of each group, one of which is zero.

    Parameters and result are as for `round_absmax`.

    References
    ----------
    [frantar2023gptq]_, the grid of its experiments and of their round-to-nearest baseline.
    """
    most = 2**bits - 1
    wide_NG = weight_NG.to(torch.promote_types(weight_NG.dtype, torch.float32))
    low_N1 = wide_NG.amin(1, keepdim=True).clamp(max=0)
    high_N1 = wide_NG.amax(1, keepdim=True).clamp(min=0)
    scale_N1 = _stored((high_N1 - low_N1) / most, scales)
    zero_N1 = (-low_N1 / scale_N1).round().clamp(0, most)
    level_NG = ((wide_NG / scale_N1).round() + zero_N1).clamp(0, most)
    return ((level_NG - zero_N1) * scale_N1).to(weight_NG.dtype)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it is after being stored; 1 for a group of zeros, or of what is as good as zero."""
    kept = scale.clamp(max=torch.finfo(dtype).max).to(dtype).to(scale.dtype)
    return kept.masked_fill(kept == 0, 1.0)


def packed_bytes(weights: int, bits: int, groups: int, scales: torch.dtype, *, zeros: bool = False) -> int:
    """Bytes of so many integers of `bits` bits packed without gaps, with a scale a group and perhaps a zero point."""
    return math.ceil(weights * bits / 8) + groups * scales.itemsize + (math.ceil(groups * bits / 8) if zeros else 0)


@dataclass(frozen=True, kw_only=True)
class Quantizer(Step):
    """A method that rounds the matrices in scope, each by itself, without text.

    Subclasses say how a matrix is rounded and how many bytes it takes.
    """

    unit: ClassVar[str] = "bits"
    family: ClassVar[str] = "quantization"
    scopes: ClassVar[tuple[str, ...]] = SCOPES

    @abstractmethod
    def rounded(self, weight_OI: Tensor, bits: int, scales: torch.dtype) -> Tensor:
        """What is left of a matrix, (O, I), in its dtype."""

    @abstractmethod
    def packed(self, outputs: int, inputs: int, bits: int, scales: torch.dtype) -> int:
        """Bytes of a matrix's integers and of what stands beside them."""

    def facts(self) -> dict[str, Any]:
        """What else a model's history should say."""
        return {}

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        for done in model.done:
            if done.family == self.family and PARTS[done.scope] & PARTS[self.scope]:
                return (
                    f"needs weights that were not quantized yet, and {done.step} was done to them: "
                    "quantize once, from the model before it"
                )
        for name, matrix in in_scope(model, self.scope).items():
            if type(matrix.weight.data) is not Tensor or not matrix.weight.is_floating_point():
                return f"needs floating-point weights, and {name} is quantized: load the model without quantization"
        return None

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        return Prepared(context.scratch).finish()

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        bits, scales = int(amount), model.stored_dtype
        matrices = in_scope(model, self.scope)
        weights: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            weights[name] = turned(matrix, self.rounded(oriented(matrix), bits, scales))
        shapes = [(int(outputs), int(inputs)) for outputs, inputs in (oriented(m).shape for m in matrices.values())]
        quantized = change(model, self.scope, weights)
        return quantized.after(
            self.done(
                amount,
                bits,
                weights=sum(outputs * inputs for outputs, inputs in shapes),
                packed_bytes=sum(self.packed(outputs, inputs, bits, scales) for outputs, inputs in shapes),
                simulated=True,
                **self.facts(),
            )
        )

"""Rounding weights to a few levels: grids, their bytes, and what every quantizer checks and writes down.

Shapes: O outputs and I inputs of a matrix, G weights of a group, which share a scale.

Quantization is simulated: weights are rounded to what the stored integers stand for and kept in the model's own dtype,
so that every program computes with them. Bytes are counted as the packed integers and their scales would take.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.architectures import Need
from mariotte.chain import print_number
from mariotte.compress.scope import SCOPES, change, in_scope, oriented, turned
from mariotte.compress.surgery import gathered
from mariotte.cuts.common import PARTS
from mariotte.cuts.matrices import misfit
from mariotte.errors import ChainError
from mariotte.models import packed
from mariotte.models.model import Model
from mariotte.models.paging import Stored
from mariotte.models.step import Context, Prepared, Step


@dataclass(frozen=True)
class Grid:
    """The levels on which the weights of each group may lie.

    Parameters
    ----------
    scale_N1 : (N, 1) distance of two levels, of each of N groups
    zero_N1 : (N, 1) the integer that stands for zero; None where integers are signed and 0 does
    least, most : integers of the lowest and the highest level
    """

    scale_N1: Tensor
    zero_N1: Tensor | None
    least: int
    most: int

    def rounded(self, weight_NG: Tensor) -> Tensor:
        """The level nearest to each weight, (N, G) in the dtype of the scales; zero stays zero."""
        level_NG = (weight_NG / self.scale_N1).round()
        if self.zero_N1 is None:
            return level_NG.clamp(self.least, self.most) * self.scale_N1
        return ((level_NG + self.zero_N1).clamp(self.least, self.most) - self.zero_N1) * self.scale_N1


def absmax_grid(weight_NG: Tensor, bits: int, scales: torch.dtype) -> Grid:
    """2^bits - 1 levels that lie evenly around zero, as far as the largest weight of each group.

    Parameters
    ----------
    weight_NG : (N, G) floating, N groups
    bits : of an integer
    scales : dtype in which a group's scale is stored

    References
    ----------
    [dettmers2022llmint8]_ section 2.1.
    """
    most = 2 ** (bits - 1) - 1
    wide_NG = weight_NG.to(torch.promote_types(weight_NG.dtype, torch.float32))
    return Grid(_stored(wide_NG.abs().amax(1, keepdim=True) / most, scales), None, -most, most)


def minmax_grid(weight_NG: Tensor, bits: int, scales: torch.dtype) -> Grid:
    """2^bits levels between the least and the largest weight of each group, one of which is zero.

    Parameters are as for `absmax_grid`.

    References
    ----------
    [frantar2023gptq]_, the grid of its experiments and of their round-to-nearest baseline.
    """
    most = 2**bits - 1
    wide_NG = weight_NG.to(torch.promote_types(weight_NG.dtype, torch.float32))
    low_N1 = wide_NG.amin(1, keepdim=True).clamp(max=0)
    high_N1 = wide_NG.amax(1, keepdim=True).clamp(min=0)
    scale_N1 = _stored((high_N1 - low_N1) / most, scales)
    return Grid(scale_N1, (-low_N1 / scale_N1).round().clamp(0, most), 0, most)


def round_absmax(weight_NG: Tensor, bits: int, scales: torch.dtype) -> Tensor:
    """Weights rounded to the nearest level of `absmax_grid`, (N, G) in their dtype; zero stays zero."""
    return _rounded(weight_NG, absmax_grid(weight_NG, bits, scales))


def round_minmax(weight_NG: Tensor, bits: int, scales: torch.dtype) -> Tensor:
    """Weights rounded to the nearest level of `minmax_grid`, (N, G) in their dtype; zero stays zero."""
    return _rounded(weight_NG, minmax_grid(weight_NG, bits, scales))


def _rounded(weight_NG: Tensor, grid: Grid) -> Tensor:
    return grid.rounded(weight_NG.to(grid.scale_N1.dtype)).to(weight_NG.dtype)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it is after being stored; 1 for a group of zeros, or of what is as good as zero."""
    kept = scale.clamp(max=torch.finfo(dtype).max).to(dtype).to(scale.dtype)
    return kept.masked_fill(kept == 0, 1.0)


def packed_bytes(weights: int, bits: int, groups: int, scales: torch.dtype, *, zeros: bool = False) -> int:
    """Bytes of so many integers of `bits` bits packed without gaps, with a scale a group and perhaps a zero point."""
    return math.ceil(weights * bits / 8) + groups * scales.itemsize + (math.ceil(groups * bits / 8) if zeros else 0)


@dataclass(frozen=True, kw_only=True)
class Quantizer(Step):
    """A method that rounds the matrices in scope, each by itself and without text unless it prepares otherwise.

    Subclasses say how a matrix is rounded, and how many bytes it takes unless it is its integers and a scale a row.

    Parameters
    ----------
    scope : all: the projections of attention and MLP; attention or ffn: those alone; head: the final dense layer alone,
        which gets a matrix of its own where it was tied to the embeddings
    """

    unit: ClassVar[str] = "bits"
    family: ClassVar[str] = "quantization"
    scopes: ClassVar[tuple[str, ...]] = SCOPES

    @abstractmethod
    def rounded(self, weight_OI: Tensor, bits: int, scales: torch.dtype) -> Tensor:
        """What is left of a matrix, (O, I), in its dtype."""

    def packed(self, outputs: int, inputs: int, bits: int, scales: torch.dtype) -> int:
        """Bytes of a matrix's integers and of what stands beside them."""
        return packed_bytes(outputs * inputs, bits, outputs, scales)

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
            if type(matrix.weight.data) not in (Tensor, Stored) or not matrix.weight.is_floating_point():
                return f"needs floating-point weights, and {name} is quantized: load the model without quantization"
        return None

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        return Prepared(context.scratch).finish()

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        bits, scales = int(amount), model.stored_dtype
        weights = gathered(model)
        for name, matrix in in_scope(model, self.scope).items():
            weights[name] = turned(matrix, self.rounded(oriented(matrix), bits, scales))
        return self.after(model, change(model, self.scope, weights), amount)

    def after(self, model: Model, quantized: Model, amount: int | float, **facts: Any) -> Model:
        """The quantized model, with what was done to `model` in its history and the packed bytes counted."""
        bits, scales = int(amount), model.stored_dtype
        matrices = in_scope(model, self.scope).values()
        shapes = [(int(outputs), int(inputs)) for outputs, inputs in (oriented(m).shape for m in matrices)]
        return quantized.after(
            self.done(
                amount,
                bits,
                weights=sum(outputs * inputs for outputs, inputs in shapes),
                packed_bytes=sum(self.packed(outputs, inputs, bits, scales) for outputs, inputs in shapes),
                simulated=True,
                **self.facts(),
                **facts,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Held(Quantizer):
    """A quantizer whose weights a checkpoint holds packed by torchao; in memory they are plain.

    Subclasses say how, and under ``otherwise`` which method to take where there is no torchao.
    """

    needs: ClassVar[tuple[Need, ...]] = ("linear",)
    otherwise: ClassVar[str]

    @property
    @abstractmethod
    def form(self) -> packed.Form:
        """How torchao packs them."""

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        if packed.installed():
            return None
        return f"needs torchao, which is not installed: {packed.INSTALL}, or take {self.otherwise}"

    @override
    def whole(self) -> str | None:
        return (
            "leaves the checkpoint to torchao, which packs and unpacks all matrices at once, in memory: take "
            f"{self.otherwise}, whose weights are stored as they are"
        )

    @override
    def rounded(self, weight_OI: Tensor, bits: int, scales: torch.dtype) -> Tensor:
        return packed.rounded(weight_OI, self.form)

    @override
    def facts(self) -> dict[str, Any]:
        return {"stored": self.form.stored}


@dataclass(frozen=True, kw_only=True)
class InGroups(Quantizer):
    """A quantizer whose scales each serve a row, or some neighbours in it.

    Parameters
    ----------
    group : neighbouring weights of a row that share a scale; it must divide the inputs of every matrix in scope.
        None: the whole row
    """

    group: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and self.group < 1:
            raise ChainError(
                f"{self.name()}: group must be a positive number of weights, got {self.group}: try group=64"
            )

    def misfit(self, widths: Mapping[str, int]) -> str | None:
        """Why the groups do not divide all widths; as `misfit`."""
        return misfit(self.group, widths)

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        return self.misfit({name: oriented(m).shape[1] for name, m in in_scope(model, self.scope).items()})

    @override
    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "group": self.group or "row"}


@dataclass(frozen=True, kw_only=True)
class Grouped(InGroups):
    """A quantizer of 2 to 8 bits.

    Parameters
    ----------
    symmetric : levels lie around zero, one fewer than there could be, and no zero point is stored. False: they go from
        the least weight of a group to its largest, as in the experiments of GPTQ
    """

    symmetric: bool = False

    @classmethod
    @override
    def check_amount(cls, name: str, amount: int | float | str | None) -> int | float:
        checked = super().check_amount(name, amount)
        if checked != int(checked) or not 2 <= checked <= 8:
            raise ChainError(
                f"{name}: bits must be a whole number from 2 to 8, got {print_number(checked)}: write {name}@4"
            )
        return int(checked)

    @override
    def packed(self, outputs: int, inputs: int, bits: int, scales: torch.dtype) -> int:
        groups = outputs * inputs // (self.group or inputs)
        return packed_bytes(outputs * inputs, bits, groups, scales, zeros=not self.symmetric)

"""Four-bit integers for NVIDIA GPUs, as torchao rounds and packs them.

Shapes: O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from mariotte.compress.quantize import Held, InGroups
from mariotte.cuts.common import PARTS
from mariotte.cuts.matrices import misfit
from mariotte.errors import ChainError
from mariotte.models import packed
from mariotte.models.model import Model

__all__ = ["Int4"]


@dataclass(frozen=True, kw_only=True)
class Int4(InGroups, Held):
    """Round weights to four bits as torchao does for NVIDIA GPUs, some neighbours of a row sharing a scale.

    Parameters
    ----------
    group : neighbouring weights of a row that share a scale: 32, 64, 128 or 256; it must divide the inputs of every
        matrix in scope

    Raises
    ------
    ChainError
        When `group` is another number.

    Notes
    -----
    It takes no amount: write ``int4``. It needs a GPU of compute capability 8.0 (Ampere) or newer, and a model computed
    in bfloat16; where there is none, ``rtn@4(group=128)`` does nearly the same. The levels are those of torchao's
    ``Int4WeightOnlyConfig``: sixteen from the least weight of a group to its largest, their distance and their middle
    in bfloat16. None of them need be zero, so that a pruned model is refused.

    In memory weights are kept as what their integers stand for. A checkpoint holds them in the order in which the GPU's
    kernel reads them (``TILE_PACKED_TO_4D``): half a byte a weight and four bytes a group, inputs filled up to a
    multiple of 1024, outputs to one of 8, which is what is counted. Stock transformers loads it on such a machine,
    where torchao is installed. In a class of ours, in encoder-decoders and for Falcon it holds them unpacked.

    Cost: a few passes over the weights in scope.

    References
    ----------
    torchao's ``Int4WeightOnlyConfig``; [frantar2023gptq]_ section 4, whose baseline it is but for where levels lie.
    """

    reference: ClassVar[str] = "frantar2023gptq"
    fixed: ClassVar[int | None] = 4
    otherwise: ClassVar[str] = "rtn@4"

    group: int = 128  # pyright: ignore[reportIncompatibleVariableOverride] it is frozen, so that narrower is enough

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in packed.GROUPS:
            raise ChainError(
                f"int4: group must be one of {', '.join(map(str, packed.GROUPS))}, got {self.group}: "
                "take one of these, or rtn@4, which takes any"
            )

    @property
    @override
    def form(self) -> packed.Form:
        return packed.Form(packed.INT4, self.group)

    @override
    def misfit(self, widths: Mapping[str, int]) -> str | None:
        return misfit(self.group, widths, sizes=packed.GROUPS, otherwise="take rtn@4, whose groups are of any size")

    @override
    def refuse_device(self, device: torch.device) -> str | None:
        reason = packed.cannot_hold_int4(device)
        return None if reason is None else f"{reason}: take rtn@4(group={self.group}) instead"

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        for done in model.done:
            if done.zeros and PARTS.get(done.scope, PARTS["all"]) & PARTS[self.scope]:
                return (
                    f"needs weights that were not set to zero, which is none of its levels, and {done.step} was done "
                    "to them: take rtn@4, which keeps zeros"
                )
        if model.device.type != "cpu" and model.hf.dtype != torch.bfloat16:
            dtype = str(model.hf.dtype).removeprefix("torch.")
            return f"needs a model in bfloat16, as its kernel computes, and this one is in {dtype}: load it in bfloat16"
        return None

    @override
    def packed(self, outputs: int, inputs: int, bits: int, scales: torch.dtype) -> int:
        return packed.int4_bytes(outputs, inputs, self.group)

"""What of a model trains: low-rank adapters beside its matrices, or all of its weights.

A learner is a twin of the model; the model itself stays as it is until what was learned is written into a copy.

Shapes: O and I outputs and inputs of a matrix, R rank, B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte.errors import ChainError
from mariotte.models.model import Model
from mariotte.models.step import Context


class Learner(Protocol):
    """A twin of a model, of which some parameters train."""

    @property
    def module(self) -> nn.Module:
        """The twin; what trains has ``requires_grad``."""
        ...

    def write_(self, model: Model) -> int:
        """Write what was learned into a copy of the model; the number of weights held at zero."""
        ...


def matrices(model: Model) -> dict[str, nn.Linear]:
    """The matrices of the blocks by their path from the model; of one that is the product of two, these."""
    return {
        f"{block.path}.{place}": matrix
        for block in model.blocks
        for path in (*block.entry.attention_paths, *block.entry.ffn_paths)
        for place, matrix in block.factors(path)
    }


def _cannot_read(model: Model) -> str | None:
    """Why a model cannot train on the next tokens of text, or None."""
    reason = model.entry.lacking(("causal",))
    return reason and f"{reason}: compress such a model without recovery"


def cannot_adapt(who: str, model: Model) -> str | None:
    """Why the matrices of the blocks cannot have adapters, in a clause after the name of `who`; None when they can."""
    if reason := _cannot_read(model):
        return reason
    for path, matrix in matrices(model).items():
        if not isinstance(matrix, nn.Linear):  # pyright: ignore[reportUnnecessaryIsInstance] cast above
            return f"needs linear layers, and {path} of this {model.entry.model_type} is a {type(matrix).__name__}"
        if type(matrix.weight.data) is not Tensor or not matrix.weight.is_floating_point():
            return f"trains beside plain weights, and {path} is quantized: put {who} before the quantization"
    return None


def cannot_train(who: str, model: Model) -> str | None:
    """Why the weights cannot be trained, in a clause after the name of `who`; None when they can."""
    if reason := _cannot_read(model):
        return reason
    for path, p in model.hf.named_parameters():
        if type(p.data) is not Tensor or not p.is_floating_point():
            return f"trains plain weights, and {path} is quantized: put {who} before the quantization"
    return None


def _is_sparse(model: Model) -> bool:
    return sum(done.zeros for done in model.done) > 0


def twin(model: Model, parameters: Mapping[int, nn.Parameter]) -> nn.Module:
    """The model's module with other parameters in place of its own, by the id of each; buffers are shared."""
    memo: dict[int, Any] = dict(parameters)
    memo |= {id(b): b for b in model.hf.buffers()}
    return copy.deepcopy(model.hf, memo)


# -- adapters ---------------------------------------------------------------------------------------------------------

_SMALL = 1 << 16
"""Weights of a matrix up to which a step is faster with the change added to the matrix first: two products of matrices
forward and four back instead of three and five, none of them thin, and no sum over the outputs. Measured on one core
with 256 tokens a step: 17 % less time a step at width 48, 18 % at 96, 8 % at 128. Of larger matrices the gradient of
the whole matrix costs more than that saves."""


class Adapted(nn.Module):
    """A frozen matrix with a low-rank change beside it: x W^T + bias + scale · dropout(x) A^T B^T.

    Parameters
    ----------
    base : the matrix, frozen
    a_RI, b_OR : the factors, float32 beside weights of any dtype
    scale : alpha / R
    dropout : of the adapter's input
    mask_OI : where the change may be other than zero, so that a sparse matrix stays sparse; None for everywhere.
        Without it the merged change fills every zero; with a mask applied only after training, the model that is kept
        is not the one whose loss was lowered. Cost: the product of the factors, R·O·I, once a matrix and pass.
    """

    def __init__(
        self, base: nn.Linear, a_RI: Tensor, b_OR: Tensor, *, scale: float, dropout: float, mask_OI: Tensor | None
    ) -> None:
        super().__init__()
        self.base = base
        self.a_RI, self.b_OR = nn.Parameter(a_RI), nn.Parameter(b_OR)
        self.scale, self.dropout, self.mask_OI = scale, dropout, mask_OI

    def delta(self) -> Tensor:
        """What the adapter adds to its matrix, (O, I), float32."""
        change_OI = (self.b_OR @ self.a_RI) * self.scale
        return change_OI if self.mask_OI is None else change_OI * self.mask_OI

    @override
    def forward(self, x: Tensor) -> Tensor:
        linear, weight = nn.functional.linear, self.base.weight
        dropout = self.dropout and self.training
        if not dropout and weight.dtype == self.a_RI.dtype and (self.mask_OI is not None or weight.numel() <= _SMALL):
            if self.mask_OI is None:
                changed_OI = torch.addmm(weight, self.b_OR, self.a_RI, alpha=self.scale)
            else:
                changed_OI = weight + self.delta()
            return linear(x, changed_OI, self.base.bias)
        plain = linear(x, weight, self.base.bias)
        x = x.to(self.a_RI.dtype)
        if dropout:
            x = nn.functional.dropout(x, self.dropout)
        if self.mask_OI is None:
            change = linear(linear(x, self.a_RI), self.b_OR) * self.scale
        else:
            change = linear(x, self.delta())
        return (plain + change).to(plain.dtype)


@dataclass(frozen=True)
class Adapters:
    """A twin that shares the model's weights and trains none of them, only adapters beside the blocks' matrices."""

    module: nn.Module

    @classmethod
    def beside(
        cls, model: Model, context: Context, who: str, *, rank: int, alpha: float, dropout: float = 0.0
    ) -> Adapters:
        """Fresh adapters, which change nothing yet: A uniform within 1 / sqrt(I), as in the paper's code, B zero.

        Parameters
        ----------
        who : the recovery that asks: its random choices are its own
        rank, alpha : the change of a matrix is alpha / R · B A
        """
        # Its own parameters over the same storage: the model is not ours to mark as frozen.
        frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.hf.parameters()}
        module = twin(model, frozen)
        sparse = _is_sparse(model)
        for path, matrix in matrices(model).items():
            generator = context.generator(who, "start", path)
            n_out, n_in = matrix.weight.shape
            start_RI = (2 * torch.rand((rank, n_in), generator=generator) - 1) / math.sqrt(n_in)
            layer = Adapted(
                cast(nn.Linear, module.get_submodule(path)),
                start_RI.to(matrix.weight.device),
                torch.zeros((n_out, rank), device=matrix.weight.device),
                scale=alpha / rank,
                dropout=dropout,
                mask_OI=(matrix.weight != 0).detach() if sparse else None,
            )
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, layer.train(module.training))
        return cls(module)

    @torch.no_grad()
    def write_(self, model: Model) -> int:
        """Add what the adapters learned to the weights of a copy of the model; the number of weights held at zero."""
        held = 0
        for path, matrix in matrices(model).items():
            layer = cast(Adapted, self.module.get_submodule(path))
            held += 0 if layer.mask_OI is None else int((~layer.mask_OI).sum())
            # float32: a small change would vanish if it were rounded to the weight's dtype before the sum.
            matrix.weight.copy_(matrix.weight.float() + layer.delta())
        return held


def check_adapters(who: str, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Refuse settings that no adapter can have.

    Raises
    ------
    ChainError
        When one is out of range.
    """
    if rank < 1:
        raise ChainError(f"{who}: rank must be at least 1, got {rank}")
    if not 0 <= dropout < 1:
        raise ChainError(f"{who}: dropout must be in [0, 1), got {dropout}")
    if not 0 < alpha < math.inf:
        raise ChainError(f"{who}: alpha must be positive, got {alpha}")


# -- all weights ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """A twin with weights of its own, float32, all of which train; tied ones are one, and zeros can be held."""

    module: nn.Module
    masks: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Model, *, within: str = "") -> Weights:
        """All weights as they are, in float32: in bf16 a small update vanishes in rounding.

        Where an earlier step of the chain set weights to zero, the zeros of every matrix stay.

        Parameters
        ----------
        within : path of the part of the model that trains; empty for all of it
        """
        own = {id(p): nn.Parameter(p.detach().float().clone()) for p in model.hf.parameters()}
        module = twin(model, own)
        for name, p in module.named_parameters():
            p.requires_grad_(name.startswith(within))
        masks: dict[str, Tensor] = {}
        if _is_sparse(model):
            for name, p in module.named_parameters():
                if p.ndim < 2 or not p.requires_grad:
                    continue
                masks[name] = mask = (p != 0).detach()
                # Without a gradient Adam's moments stay zero, and so does the weight, to the bit.
                p.register_hook(mask.mul)
        return cls(module, masks)

    @torch.no_grad()
    def write_(self, model: Model) -> int:
        """Put the trained weights into a copy of the model, in its dtypes; the number of weights held at zero."""
        for p, trained in zip(model.hf.parameters(), self.module.parameters(), strict=True):
            p.copy_(trained)
        return sum(int((~mask).sum()) for mask in self.masks.values())

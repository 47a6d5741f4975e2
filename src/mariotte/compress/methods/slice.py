"""One rotation of the residual stream, then fewer dimensions: a narrower model of the same architecture.

Shapes: D model width, d width kept, O outputs and I inputs of a linear layer, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte import accounting
from mariotte.architectures import Need, Shape
from mariotte.compress.calibration import rms_normalised, second_moments
from mariotte.compress.compensation import check_ridge, compensated, least_squares_factors, with_ridge
from mariotte.compress.rotation import principal_directions, without_mean
from mariotte.compress.surgery import (
    cut_width,
    derive,
    gathered,
    norm_weight,
    parameter_names,
    rounding,
    set_norm_eps_,
)
from mariotte.cuts.stream import refuse_slice
from mariotte.models.model import Model
from mariotte.models.paging import pieces
from mariotte.models.step import Context, Prepared, Step

__all__ = ["Slice"]

SHIFT = "shift "
"""Before the name of a matrix, that of what the biases of the norm in front of it give."""

FACTOR = "factor"
"""Key of the Cholesky factor beside the matrices that read through one norm."""


@dataclass(frozen=True, kw_only=True)
class Slice(Step):
    """Rotate the residual stream to its principal directions and keep the strongest.

    Parameters
    ----------
    compensate : let the matrices behind each norm draw from the kept dimensions what they drew from the removed ones,
        by least squares on calibration text; without it they are only cut
    ridge : for compensation, added to the diagonal of the second moments as a share of its mean
    round_to : multiple to which the hidden size is rounded; None takes 128 from a width of 1024 on and 8 below, less
        where the head count makes that too coarse; where the family asks for it, always a multiple of the heads

    Raises
    ------
    ChainError
        When `ridge` or `round_to` is not positive.

    Notes
    -----
    With h the residual stream, Q orthogonal and g the weights of a norm, RMSNorm(h) = g * h / rms(h). Because
    rms(Qᵀh) = rms(h), folding g into the matrices that the norm feeds and Q into every matrix leaves each logit as it
    is. Q holds the principal directions of h / rms(h), pooled over all norms and calibration tokens: SliceGPT's idea
    with one rotation for the whole stream, so that no shortcut matrices are needed and one pass serves all amounts.

    Cut to d of D dimensions, a norm takes its mean over d. Where the rest of the stream is zero,
    h / sqrt(|h|²/D + eps) = sqrt(D/d) h / sqrt(|h|²/d + eps D/d): hence the factor sqrt(D/d), folded into the matrices
    too (in bfloat16 a norm weight would carry the same rounding error in each dimension), and eps scaled by D/d.

    Where the rest is not zero, the norm misses its energy and makes the kept signal too large. With s the share of the
    energy that the kept directions hold on calibration text, the factor is sqrt(s D/d), which is sqrt(D/d) when nothing
    is lost. On stories260K at half the width, sqrt(D/d) gives a loss of 4.779, sqrt(s D/d) 4.375, and compensation
    4.291; smaller cuts gain too (``benchmarks/stories260k.py``).

    LayerNorm (phi) also subtracts the mean of the dimensions that are there. The stream is then one whose mean is zero,
    d - 1 directions are kept of it, and laid out in d dimensions so that their mean is zero again; biases of norms go
    into those of the matrices behind them, the head's among them, which only a family that has them all can hold.

    A tied head is untied, since the final norm's weights cannot be folded into both ends: the second vocabulary matrix
    is counted, and can make the ratio of a small cut negative. A cut of nothing returns the model as it is.

    Cost: a forward pass over the calibration tokens with D² more multiplications a token and norm, one D³ eigenproblem,
    and D more multiplications a weight for the rotation, stored once in float32; an amount costs at most d more a
    weight. Memory: D² float64 for each norm with compensation, once without.

    References
    ----------
    [ashkboos2024slicegpt]_ sections 3.1 to 3.3.
    """

    unit: ClassVar[str] = "hidden"
    family: ClassVar[str] = "slice"
    reference: ClassVar[str] = "ashkboos2024slicegpt"
    streams: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("causal",)

    compensate: bool = True
    ridge: float = 1e-2
    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_ridge(self.name(), self.ridge)
        accounting.check_round_to(self.name(), self.round_to, of="dimensions")

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_slice(model)

    def _width(self, model: Model, amount: int | float) -> tuple[int, int]:
        """The hidden size that is kept, and the multiple to which it is rounded."""
        shape = model.shape
        multiple = rounding(
            shape.hidden,
            self.round_to,
            multiple_of=shape.heads if model.entry.hidden_multiple_of_heads else 1,
        )
        return cut_width(shape.hidden, amount, multiple), multiple

    @override
    def moment(self, shape: Shape) -> int:
        return shape.hidden

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        shape = model.shape
        width, _ = self._width(model, amount)
        after = shape if width == shape.hidden else replace(shape, hidden=width, tied=False)
        return model.counts.n_params - accounting.count_shape(after).n_params

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        readers = _readers(model)
        eps, centred = float(model.config[_eps_key(model)]), not model.entry.rms_norm
        norms = {key: [norm] for key, (norm, _) in readers.items()}
        # One by one only for compensation: pooled, they take D² numbers and not D² for each norm.
        inputs = norms if self.compensate else {"stream": [norm for (norm,) in norms.values()]}

        def normalised(x_MD: Tensor) -> Tensor:
            return rms_normalised(x_MD - x_MD.mean(-1, keepdim=True) if centred else x_MD, eps)

        moments = second_moments(model, context, self.name(), inputs, transform=normalised)
        # One after another: of a streamed model each is read from disk.
        pooled_DD = sum((moments[key] for key in moments), torch.zeros(())) / len(moments)
        rotation_DD, energy_D = _directions(pooled_DD, centred=centred)
        # Kept in float32 at least: rotated weights are cast to the model's own dtype once, when they are cut.
        kept = torch.promote_types(model.embeddings.weight.dtype, torch.float32)
        prepared = Prepared(context.scratch)
        prepared.put("rotation", {"directions": rotation_DD, "energy": energy_D})
        in_order_D = torch.arange(len(rotation_DD), device=rotation_DD.device)
        for done, (key, (norm, linears)) in enumerate(readers.items()):
            tensors: dict[str, Tensor] = {}
            moment_DD = None
            if self.compensate:
                moment_DD = with_ridge(rotation_DD.T @ moments.pop(key) @ rotation_DD, self.ridge)
            for name, linear in linears.items():
                rows: list[Tensor] = []
                shifts: list[Tensor] = []
                for piece_OD in pieces(linear.weight):
                    if centred:
                        shifts.append(piece_OD.double() @ cast(Tensor, norm.bias).double())
                    weight_OD = (piece_OD.double() * norm_weight(norm).double()) @ rotation_DD
                    if moment_DD is not None:
                        tensors[FACTOR], weight_OD = least_squares_factors(weight_OD, moment_DD, in_order_D)
                    rows.append(weight_OD.to(kept))
                tensors[name] = _whole(rows)
                if centred:
                    tensors[SHIFT + name] = _whole(shifts)
            prepared.put(key, tensors)
            context.progress("rotation", (done + 1) / len(readers))
        for key, parameters in _writers(model).items():
            tensors = {
                name: _whole([(piece.double() @ rotation_DD).to(kept) for piece in _along_stream(key, parameter)])
                for name, parameter in parameters.items()
            }
            prepared.put(key, tensors)
        return prepared.finish(hidden=model.shape.hidden)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape = model.shape
        width, multiple = self._width(model, amount)
        untied = shape.tied and width < shape.hidden
        done = self.done(
            amount, 1 - width / shape.hidden, hidden=[shape.hidden, width], rounding=multiple, untied=untied
        )
        if width == shape.hidden:
            return model.copy().after(done)
        return _cut(model, prepared, width).after(done)


def _eps_key(model: Model) -> str:
    """What the family's config calls the constant under the root of its norms."""
    return "rms_norm_eps" if model.entry.rms_norm else "layer_norm_eps"


def _directions(moment_DD: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """The principal directions, and the energy along each; last that of the mean, if norms subtract it."""
    if not centred:
        return principal_directions(moment_DD)
    basis_DC = without_mean(len(moment_DD)).to(moment_DD.device)
    directions_CC, energy_C = principal_directions(basis_DC.T @ moment_DD @ basis_DC)
    mean_D1 = torch.full_like(moment_DD[:, :1], len(moment_DD) ** -0.5)
    return torch.cat([basis_DC @ directions_CC, mean_D1], 1), torch.cat([energy_C, energy_C.new_zeros(1)])


def _whole(rows: list[Tensor]) -> Tensor:
    """A matrix that was worked on some rows at a time."""
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _along_stream(key: str, parameter: Tensor) -> Iterable[Tensor]:
    """A parameter that is written into the stream, whose axis is then the last; a streamed table in pieces."""
    return pieces(parameter) if key == "embeddings" else [parameter.transpose(0, -1)]


def _readers(model: Model) -> dict[str, tuple[nn.Module, dict[str, nn.Linear]]]:
    """Each norm with the matrices that read the stream through it, by their weights' names."""
    names = parameter_names(model)
    found: dict[str, tuple[nn.Module, dict[str, nn.Linear]]] = {}
    for index, block in enumerate(model.blocks):
        for part, norm, linears in (
            ("attention", block.attention_norm, block.attention[:-1]),
            ("mlp", block.mlp_norm, block.ffn[:-1]),
        ):
            found[f"block-{index}-{part}"] = norm, {names[linear.weight]: linear for linear in linears}
    # By its own name: a tied head shares the embeddings' parameter now, and will not after a cut.
    found["head"] = model.final_norm, {f"{model.entry.head}.weight": model.head}
    return found


def _writers(model: Model) -> dict[str, dict[str, Tensor]]:
    """What is written into the stream, by name: embeddings, outputs of blocks and their biases; see `_along_stream`."""
    names = parameter_names(model)
    found: dict[str, dict[str, Tensor]] = {"embeddings": {names[model.embeddings.weight]: model.embeddings.weight}}
    for index, block in enumerate(model.blocks):
        written = (parameter for linear in (block.output, block.down) for parameter in linear.parameters())
        found[f"block-{index}-written"] = {names[parameter]: parameter for parameter in written}
    return found


def _cut(model: Model, prepared: Prepared, width: int) -> Model:
    """The rotated model, cut to its first `width` dimensions; of full width, its logits are the model's own."""
    shape, entry = model.shape, model.entry
    energy_D = prepared.get("rotation")["energy"].clamp(min=0)
    # A norm that subtracts the mean leaves one dimension less: the strongest directions are then laid out so that the
    # mean of what they hold is zero, which it was of what they held.
    basis_dk = None if entry.rms_norm else without_mean(width).to(model.device)
    directions = width if basis_dk is None else width - 1
    share = float(energy_D[:directions].sum() / energy_D.sum()) if bool(energy_D.any()) else 1.0
    factor = (share * shape.hidden / width) ** 0.5
    eps = float(model.config[_eps_key(model)]) * shape.hidden / width

    def laid_out(kept_Xk: Tensor) -> Tensor:
        return kept_Xk if basis_dk is None else kept_Xk.to(basis_dk) @ basis_dk.T

    names = parameter_names(model)
    weights = gathered(model)
    # A config has one eps for all norms. Those of queries and keys give the same with the new one when what they read
    # grows as the root of it.
    growth = (shape.hidden / width) ** 0.5
    grown = {
        names[parameter]: parameter
        for block in model.blocks
        for linear in ((block.query, block.key) if entry.head_norms else ())
        for parameter in linear.parameters()
    }
    for key, (norm, linears) in _readers(model).items():
        rotated = {name: tensor.to(model.device) for name, tensor in prepared.get(key).items()}
        weights[names[norm_weight(norm)]] = torch.ones(width)
        if basis_dk is not None:
            weights[names[cast(Tensor, norm.bias)]] = torch.zeros(width)
        for name, linear in linears.items():
            whole_OD = rotated[name]
            # Of the head of a streamed model some rows at a time: it may have more of them than all blocks.
            parts = cast("tuple[Tensor, ...]", whole_OD.split(shape.ffn if model.streamed else len(whole_OD)))
            rows = [
                compensated(rotated[FACTOR], part_OD.double(), directions)
                if FACTOR in rotated
                else part_OD[:, :directions]
                for part_OD in parts
            ]
            whole = laid_out(_whole(rows)) * factor
            # Here and not afterwards: what is put in may be rounded at once.
            weights[name] = whole * growth if name in grown else whole
            if SHIFT + name in rotated:
                weights[names[linear.bias]] = linear.bias.double() + rotated[SHIFT + name]
    for key, parameters in _writers(model).items():
        rotated = prepared.get(key)
        for name in parameters:
            weights[name] = laid_out(rotated[name][..., :directions].to(model.device))
            if key != "embeddings":
                weights[name] = weights[name].transpose(0, -1)
    for name, parameter in grown.items():
        if name not in weights:
            weights[name] = parameter * growth
    sizes = {entry.hidden: width, entry.head_dim: shape.head_dim, _eps_key(model): eps}
    cut = derive(model, weights, sizes, untie=shape.tied)
    set_norm_eps_(cut, eps)
    return cut

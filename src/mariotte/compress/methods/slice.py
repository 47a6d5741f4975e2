"""One rotation of the residual stream, then fewer dimensions: a narrower model of the same architecture.

Shapes: D model width, d width kept, O outputs and I inputs of a linear layer, M tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte.compress.calibration import rms_normalised, second_moments
from mariotte.compress.surgery import cut_width, derive, norm_weight, parameter_names, rounding, set_norm_eps_
from mariotte.errors import ChainError
from mariotte.models.model import Done, Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["Slice"]

EPS = "rms_norm_eps"
"""What every family with RMSNorm calls the constant under its root."""


def principal_directions(moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal directions of a second moment, the largest first.

    Parameters
    ----------
    moment_DD : (D, D) float64, symmetric

    Returns
    -------
    (D, D) with a direction in each column, and (D,) the energy along each

    Notes
    -----
    float64: in float32 the directions of a wide covariance lose orthogonality, and the rotated model drifts. A
    direction has no sign of its own; ours makes its largest entry positive, so that equal moments give equal models.
    """
    energy_D, directions_DD = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(moment_DD))
    energy_D, directions_DD = energy_D.flip(0), directions_DD.flip(1)
    largest_1D = torch.gather(directions_DD, 0, directions_DD.abs().argmax(0, keepdim=True))
    return directions_DD * (1 - 2 * (largest_1D < 0).double()), energy_D


@dataclass(frozen=True, kw_only=True)
class Slice(Step):
    """Rotate the residual stream to its principal directions and keep the strongest.

    Parameters
    ----------
    round_to : multiple to which the hidden size is rounded; None takes 128 from a width of 1024 on and 8 below, less
        where the head count makes that too coarse; where the family asks for it, always a multiple of the heads

    Raises
    ------
    ChainError
        When `round_to` is not positive.

    Notes
    -----
    With h the residual stream, Q orthogonal and g the weights of a norm, RMSNorm(h) = g * h / rms(h). Because
    rms(Qᵀh) = rms(h), folding g into the matrices that the norm feeds and Q into every matrix leaves each logit as it
    is. Q holds the principal directions of h / rms(h), pooled over all norms and calibration tokens: SliceGPT's idea
    with one rotation for the whole stream, so that no shortcut matrices are needed and one pass serves all amounts.

    Cut to d of D dimensions, a norm takes its mean over d. Where the rest of the stream is zero,
    h / sqrt(|h|²/D + eps) = sqrt(D/d) h / sqrt(|h|²/d + eps D/d): hence the factor sqrt(D/d), folded into the matrices
    too (in bfloat16 a norm weight would carry the same rounding error in each dimension), and eps scaled by D/d.

    A tied head is untied, since the final norm's weights cannot be folded into both ends: the second vocabulary matrix
    is counted, and can make the ratio of a small cut negative. A cut of nothing returns the model as it is.

    Cost: a forward pass over the calibration tokens with D² more multiplications a token and norm, one D³ eigenproblem,
    and D more multiplications a weight for the rotation, stored once in float32; an amount then only reads and cuts.

    References
    ----------
    [ashkboos2024slicegpt]_ sections 3.1 to 3.3.
    """

    unit: ClassVar[str] = "hidden"
    family: ClassVar[str] = "slice"
    reference: ClassVar[str] = "ashkboos2024slicegpt"

    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_to is not None and self.round_to < 1:
            raise ChainError(f"slice: round_to must be a positive number of dimensions, got {self.round_to}")

    @override
    def refuse(self, model: Model) -> str | None:
        entry = model.entry
        if not entry.rms_norm:
            return f"needs RMSNorm, and the norms of {entry.model_type} also subtract the mean"
        if not entry.norm_first:
            return f"needs norms that feed the matrices, and {entry.model_type} has norms after them"
        if not entry.head_dim:
            return f"needs a config that states head_dim, and {entry.model_type} ties the head size to the hidden size"
        return None

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        norms = [norm for block in model.blocks for norm in (block.attention_norm, block.mlp_norm)]
        eps = float(model.config[EPS])
        moments = second_moments(
            model,
            context,
            self.name(),
            {"stream": [*norms, model.final_norm]},
            transform=lambda x_MD: rms_normalised(x_MD, eps),
        )
        rotation_DD, energy_D = principal_directions(moments["stream"])
        # Kept in float32 at least: rotated weights are cast to the model's own dtype once, when they are cut.
        kept = torch.promote_types(model.embeddings.weight.dtype, torch.float32)

        def reading(weight_OD: Tensor, norm: nn.Module) -> Tensor:
            return ((weight_OD.double() * norm_weight(norm).double()) @ rotation_DD).to(kept)

        def writing(weight_DI: Tensor) -> Tensor:
            return (rotation_DD.T @ weight_DI.double()).to(kept)

        names = parameter_names(model)
        prepared = Prepared(context.scratch)
        prepared.put("rotation", {"directions": rotation_DD, "energy": energy_D})
        for index, block in enumerate(model.blocks):
            tensors: dict[str, Tensor] = {}
            for norm, readers in ((block.attention_norm, block.attention[:-1]), (block.mlp_norm, block.ffn[:-1])):
                for linear in readers:
                    tensors[names[linear.weight]] = reading(linear.weight, norm)
            for linear in (block.output, block.down):
                # A bias is written into the stream like a column of the weight.
                tensors |= {names[parameter]: writing(parameter) for parameter in linear.parameters()}
            prepared.put(f"block-{index}", tensors)
            context.progress("rotation", (index + 1) / len(model.blocks))
        embeddings_VD = (model.embeddings.weight.double() @ rotation_DD).to(kept)
        prepared.put("ends", {"embeddings": embeddings_VD, "head": reading(model.head.weight, model.final_norm)})
        return prepared.finish(hidden=model.shape.hidden)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape = model.shape
        multiple = rounding(
            shape.hidden,
            self.round_to,
            multiple_of=shape.heads if model.entry.hidden_multiple_of_heads else 1,
        )
        width = cut_width(shape.hidden, amount, multiple)
        link = self.link(amount)
        done = Done(
            step=str(link),
            name=link.name,
            unit=self.unit,
            family=self.family,
            amount=amount,
            obtained=1 - width / shape.hidden,
            facts={
                "hidden": [shape.hidden, width],
                "rounding": multiple,
                "untied": shape.tied and width < shape.hidden,
            },
        )
        if width == shape.hidden:
            return model.copy().after(done)
        return _cut(model, prepared, width).after(done)


def _cut(model: Model, prepared: Prepared, width: int) -> Model:
    """The rotated model, cut to its first `width` dimensions; of full width, its logits are the model's own."""
    shape, entry = model.shape, model.entry
    factor = (shape.hidden / width) ** 0.5
    eps = float(model.config[EPS]) * shape.hidden / width
    names = parameter_names(model)
    ones_d = torch.ones(width)
    ends = prepared.get("ends")
    weights: dict[str, Tensor] = {
        names[model.embeddings.weight]: ends["embeddings"][:, :width],
        names[norm_weight(model.final_norm)]: ones_d,
        f"{entry.head}.weight": ends["head"][:, :width] * factor,
    }
    for index, block in enumerate(model.blocks):
        rotated = prepared.get(f"block-{index}")
        weights |= {names[norm_weight(norm)]: ones_d for norm in (block.attention_norm, block.mlp_norm)}
        for linear in (*block.attention[:-1], *block.ffn[:-1]):
            weights[names[linear.weight]] = rotated[names[linear.weight]][:, :width] * factor
        for linear in (block.output, block.down):
            weights |= {names[parameter]: rotated[names[parameter]][:width] for parameter in linear.parameters()}
    sizes = {entry.hidden: width, entry.head_dim: shape.head_dim, EPS: eps}
    cut = derive(model, weights, sizes, untie=shape.tied)
    set_norm_eps_(cut, eps)
    return cut

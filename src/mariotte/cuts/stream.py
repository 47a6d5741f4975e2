"""The width of the residual stream: how much of it stays, and why it cannot be turned or sliced."""

from __future__ import annotations

from dataclasses import replace

from mariotte.architectures import Shape
from mariotte.cuts.common import IRREGULAR, Sizes, refuse_counted_factors


def refuse_slice(model: Sizes) -> str | None:
    """Why the hidden size of `model` cannot be reduced under one rotation of the stream, or None when it can."""
    entry, shape = model.entry, model.shape
    # Where every matrix behind a norm has biases, and the head, these hold the norm's: then it may subtract the mean.
    held = shape.attention_bias and shape.mlp_bias and bool(shape.head_biases) and bool(entry.head_dim)
    if not (held and entry.norm_first and not entry.outer_norms) and (reason := cannot_turn(model)):
        return reason
    if not entry.head_dim:
        return (
            f"needs a config that states head_dim, and {entry.model_type} ties the head size to the hidden size: "
            "take ffn or shortgpt"
        )
    if model.shape.shortcuts:
        return "needs one stream through all blocks, and this one goes through shortcut matrices: slice first"
    return None


ONE_WIDTH = ("gpt2",)
"""Families whose code takes the stream behind the blocks to be as wide as the embeddings."""


def refuse_slicegpt(model: Sizes) -> str | None:
    """Why the stream of `model` cannot be reduced under a rotation for each norm, or None when it can."""
    entry = model.entry
    if not entry.norm_first or entry.outer_norms:
        return (
            f"needs norms that feed the matrices, and {entry.model_type} has norms after them, whose weights no "
            "rotation passes: take ffn or shortgpt"
        )
    if entry.model_type not in IRREGULAR:
        return (
            f"needs a class for sliced models, and {entry.model_type} has none; {', '.join(IRREGULAR)} have one: "
            "take slice"
        )
    if model.shape.map_in or model.shape.map_out:
        return "needs embeddings as wide as the stream, and these are mapped to it: take ffn or shortgpt"
    if entry.slopes:
        return (
            f"needs scores that do not depend on the hidden size, and those of this {entry.model_type} do (ALiBi): "
            "take ffn or shortgpt"
        )
    if entry.model_type in ONE_WIDTH:
        return (
            f"needs a last block that may write more than the first reads, and the code of {entry.model_type} takes "
            "both to be as wide: take ffn or shortgpt"
        )
    return refuse_counted_factors(model)


def sliced_width(shape: Shape, amount: float, round_to: int) -> int:
    """The hidden size that is kept: rounded down, but at least one multiple; all of it when nothing should go."""
    if not amount:
        return shape.hidden
    asked = int(shape.hidden * (1 - amount) + 1e-9)  # 0.9 x 80 in floats may lie below 72
    return min(max(asked - asked % round_to, round_to), shape.hidden)


def sliced(shape: Shape, width: int, *, always: bool = False) -> Shape:
    """The shape of a sliced model; a cut of nothing leaves it as it was, unless it is made `always`."""
    if width == shape.hidden and not always:
        return shape
    final = shape.final_size
    if shape.norm_bias:  # LayerNorms become RMSNorms, and their biases those of the matrices behind them
        shape = replace(
            shape,
            norm_bias=False,
            attention_bias=True,
            up_bias=not shape.mlp_bias,
            head_biases=max(shape.head_biases, 1),
        )
    return replace(
        shape,
        hidden=width,
        tied=False,
        shortcuts=True,
        final=None if final == width else final,
        tables=shape.tables // shape.hidden * width,
    )


def cannot_turn(model: Sizes) -> str | None:
    """Why the stream of `model` cannot be rotated, in a clause after a method's name; None when it can."""
    entry = model.entry
    if not entry.rms_norm:
        other = "ffn or shortgpt" if refuse_slicegpt(model) else "slicegpt, whose class does without, or ffn"
        return (
            "needs RMSNorm, or LayerNorm in front of matrices that all have biases, the head among them, and a config "
            f"that states head_dim, and {entry.model_type} has neither: take {other}"
        )
    if not entry.turns:
        return (
            f"needs norms that feed the matrices, and {entry.model_type} has norms after them, whose weights no "
            "rotation passes: take ffn or shortgpt"
        )
    return None

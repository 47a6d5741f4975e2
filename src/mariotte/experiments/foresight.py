"""What the first steps of a chain will leave, and whether its later steps can work on that: asked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from mariotte import architectures
from mariotte.architectures import Architecture, Shape
from mariotte.chain import Chain
from mariotte.compress.methods.heads import Heads
from mariotte.compress.quantize import Grouped
from mariotte.cuts import input_widths, misfit
from mariotte.errors import ChainError, ModelError
from mariotte.experiments.identity import Part
from mariotte.models.model import Done, Model
from mariotte.shapes import Sized, left_by


def check(name: str, config: Mapping[str, Any], parts: Sequence[Part], done: Sequence[Done] = ()) -> None:
    """Refuse a chain of which a later step cannot work on what the earlier ones will leave, as far as sizes tell.

    What they do not tell, such as the widths that a search will choose, each step refuses itself when it is reached.

    Parameters
    ----------
    name, config : of the model that enters
    parts : of the chain
    done : quantizations whose integers the model's weights stand for

    Raises
    ------
    ModelError
        When groups that share a scale do not divide a width that will be left; it names the width and groups that fit.
    ChainError
        When a recovery comes after a quantization: training moves weights off their levels.
    """
    rounded = done[-1].step if done else None
    shape: Shape | None = architectures.shape(config)
    entry = architectures.of(config)
    for place, part in enumerate(parts):
        step = part.step
        if part.recovers and rounded is not None:
            raise ChainError(
                f"{step.name()} trains weights, and {rounded} rounds them before: "
                f"put {step.name()} before the quantization"
            )
        # The first step is refused by its own word, which names the matrix.
        group = step.group if isinstance(step, Grouped) and place else None
        if shape is not None and (reason := misfit(group, input_widths(shape, step.scope) if group else {})):
            before = Chain(tuple(each.link for each in parts[:place]))
            raise ModelError(f"{step.name()} cannot work on what {before} leaves of {name}: it {reason}")
        if step.family == "quantization":
            rounded = str(part.link)
        shape = None if shape is None else left(shape, entry, part)


@dataclass(frozen=True)
class _Sizes:
    """All that a step asks of a model when it says what follows from sizes alone."""

    shape: Shape
    entry: Architecture


def left(shape: Shape, entry: Architecture, part: Part) -> Shape | None:
    """The sizes that a step leaves; None where they do not follow from sizes alone."""
    step = part.step
    if step.of is not None:
        return None
    if step.family in ("unstructured", "quantization", "recovery"):
        return shape
    if isinstance(step, Heads):
        heads, groups = step.kept(cast(Model, _Sizes(shape, entry)), part.amount)
        return replace(shape, heads=heads, kv_heads=groups)
    found = left_by(Sized(name="", config={}, shape=shape, entry=entry, dtype="float32"), Chain((part.link,)))
    return None if found is None else found.shape

"""What the first steps of a chain will leave, and whether its later steps can work on that: asked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mariotte import architectures
from mariotte.chain import Chain, parse_link
from mariotte.errors import ChainError, ModelError
from mariotte.experiments.identity import Part
from mariotte.models.model import Done
from mariotte.shapes import Here, Sized, UntoldError, after


def check(
    name: str,
    config: Mapping[str, Any],
    parts: Sequence[Part],
    done: Sequence[Done] = (),
    *,
    device: str | torch.device = "cpu",
) -> None:
    """Refuse a chain of which a step cannot work on the model, or on what earlier ones leave, as far as sizes tell.

    What they do not tell, such as the widths that a search will choose, each step refuses itself when it is reached.

    Parameters
    ----------
    name, config : of the model that enters
    parts : of the chain
    done : quantizations whose integers the model's weights stand for
    device : where the model is, or will be

    Raises
    ------
    ModelError
        When a step cannot work on the sizes that it will meet: groups that share a scale must divide each width, and
        the sentence names the width and groups that fit; what cuts needs blocks that are alike, or whole matrices.
        When what a step makes cannot be computed with on the device.
    ChainError
        When a recovery comes after a quantization: training moves weights off their levels.
    """
    rounded = done[-1].step if done else None
    sized = Sized(
        name=name, config=config, shape=architectures.shape(config), entry=architectures.of(config), dtype="float32"
    )
    here: Here | None = Here(model=sized, rounded=tuple(parse_link(each.step) for each in done))
    for place, part in enumerate(parts):
        step = part.step
        if part.recovers and rounded is not None:
            raise ChainError(
                f"{step.name()} trains weights, and {rounded} rounds them before: "
                f"put {step.name()} before the quantization"
            )
        if reason := step.refuse_device(torch.device(device)):
            raise ModelError(f"{step.name()} cannot work on {name}: it {reason}")
        if step.family == "quantization":
            rounded = str(part.link)
        try:
            here = here if here is None or part.recovers else after(here, part.link)
        except UntoldError:
            here = here if step.family in ("unstructured", "quantization") else None
        except ModelError as error:
            if not place:
                raise ModelError(f"{step.name()} cannot work on {name}: {error}") from None
            before = Chain(tuple(each.link for each in parts[:place]))
            raise ModelError(f"{step.name()} cannot work on what {before} leaves of {name}: it {error}") from None

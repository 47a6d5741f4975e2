"""Model families: where their parts are and what their configs call them.

Each family has one entry in ``families.py``, whose fields are described in ``entry.py``; ``sizes.py`` reads a model's
sizes with it. A family that is not described is refused by name; it never borrows another's entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

from mariotte.architectures.entry import Architecture, Kind, Need
from mariotte.architectures.families import FAMILIES
from mariotte.architectures.sizes import Shape, stack_shape
from mariotte.errors import ModelError, unknown

__all__ = ["FAMILIES", "IRREGULAR", "Architecture", "Kind", "Need", "Shape", "find", "in_own_class", "of", "shape"]

IRREGULAR = "mariotte_"
"""Before a family's name, the ``config.model_type`` of its models with irregular sizes."""


def find(model_type: str) -> Architecture:
    """The entry of a family, or of its models with irregular sizes.

    Raises
    ------
    UnknownNameError
        When the family is not described; the message lists those that are.
    """
    family = model_type.removeprefix(IRREGULAR)
    if family != model_type and family in FAMILIES:
        known = FAMILIES[family]
        return in_own_class(known)
    if model_type not in FAMILIES:
        raise unknown("model type", model_type, FAMILIES, hint="; see docs/extend.md for describing a family")
    return FAMILIES[model_type]


def in_own_class(entry: Architecture) -> Architecture:
    """A family's entry for a model in the class of ours, whose config states the width of a head by itself."""
    return replace(entry, irregular=True, hidden_multiple_of_heads=False, head_dim=entry.head_dim or "head_dim")


def of(config: Mapping[str, Any]) -> Architecture:
    """The entry of a config: its family's, in the variant that it states.

    Parameters
    ----------
    config : the content of ``config.json``

    Raises
    ------
    UnknownNameError
        When the config's family is not described.
    ModelError
        When the config states no family, or a variant that the entry does not describe.
    """
    if not config.get("model_type"):
        raise ModelError(
            "a config must state its model_type, got none; is this the config.json of a transformers model?"
        )
    entry = find(str(config["model_type"]))
    stated = entry.stated(config)
    for key, value in entry.assumes.items():
        if stated.get(key, value) != value:
            raise ModelError(
                f"of {entry.model_type} models only those with {key}={value} are described, got {stated[key]!r}; "
                "see docs/extend.md for describing others"
            )
    for condition, otherwise in entry.variants.items():
        key, _, wanted = condition.partition("=")
        found: Any = stated
        for part in key.split("."):
            found = cast("Mapping[str, Any]", found).get(part) if isinstance(found, Mapping) else None
        if fnmatchcase(str(found), wanted):
            encoder = {**entry.encoder, **otherwise.get("encoder", {})}
            entry = replace(entry, **{**otherwise, "encoder": encoder})
    if entry.irregular and stated.get("shortcuts"):
        entry = replace(entry, rms_norm=True)
    if entry.irregular and stated.get("width_sizes"):
        entry = replace(entry, grouped=False)
    return entry


def shape(config: Mapping[str, Any]) -> Shape:
    """The sizes that a config states.

    Parameters
    ----------
    config : the content of ``config.json``

    Raises
    ------
    UnknownNameError
        When the config's family is not described.
    ModelError
        When the config lacks a size.
    """
    entry = of(config)
    *encoder, decoder = (stack_shape(config, stack) for stack in entry.stacks)
    return replace(decoder, encoder=encoder[0]) if encoder else decoder

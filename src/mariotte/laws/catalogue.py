"""The laws that exist, by name."""

from __future__ import annotations

from typing import cast

from mariotte.laws.base import Kind, Law
from mariotte.named import Catalogue

LAWS = Catalogue("law", "mariotte.laws.forms", "mariotte.laws")


def find(name: str) -> Law:
    """The law called `name`.

    Raises
    ------
    UnknownNameError
        When nothing defines it.
    """
    return cast("type[Law]", LAWS.find(name))()


def applicable(kind: Kind) -> list[Law]:
    """Every law that describes a metric of this kind and is tried unasked (`Law.screened`), in the order of names."""
    return [law for law in map(find, LAWS.names()) if kind in law.metric_kinds and law.screened]

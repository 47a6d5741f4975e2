"""The laws that exist, by name."""

from __future__ import annotations

from typing import cast

from mariotte.laws.base import Kind, Law
from mariotte.laws.ensemble import JOIN, ensemble
from mariotte.named import Catalogue

LAWS = Catalogue("law", "mariotte.laws.forms", "mariotte.laws", "mariotte.laws.base:Law")


def find(name: str) -> Law:
    """The law called `name`, or the ensemble of several, such as ``odds + weibull``.

    Raises
    ------
    UnknownNameError
        When nothing defines it.
    FitError
        When laws make no ensemble.
    """
    if JOIN.strip() in name:
        return ensemble([find(member.strip()) for member in name.split(JOIN.strip())])
    return cast("type[Law]", LAWS.find(name))()


def applicable(kind: Kind) -> list[Law]:
    """Every law that describes a metric of this kind and is tried unasked (`Law.screened`), in the order of names."""
    return [law for law in map(find, LAWS.names()) if kind in law.metric_kinds and law.screened]

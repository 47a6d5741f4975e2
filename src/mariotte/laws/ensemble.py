"""Laws that a hold-out cannot tell apart, as one law: the median of what each expects.

Shape legend: M points, P parameters of all members together, E members.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Estimate, Inputs, Kind, Law
from mariotte.laws.posterior import PosteriorLaw

JOIN = " + "
"""Between the names of an ensemble's members, which together are its name."""


class Ensemble(Law):
    """The median of what several laws expect, each fitted alone; of two it is the mean.

    Notes
    -----
    The median, since one member that explodes beyond its points would carry a mean away. Parameters are those of the
    members, one after the other, as ``member.parameter``.
    """

    members: ClassVar[tuple[Law, ...]]

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return np.median(self._expected(theta, x), axis=0)

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        order_EM = np.argsort(self._expected(theta, x), axis=0, kind="stable")
        middle = {(len(self.members) - 1) // 2, len(self.members) // 2}
        weight_EM = np.zeros(order_EM.shape)
        for place in middle:
            np.put_along_axis(weight_EM, order_EM[place : place + 1], 1.0 / len(middle), axis=0)
        return np.hstack([weight_EM[i, :, None] * law.jac(theta[own], x) for i, (law, own) in enumerate(self._parts())])

    @override
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        found = [law.estimate(x, y_M) for law in self.members]
        theta = np.concatenate([one.theta for one in found])
        covariance: Array | None = np.zeros((len(theta), len(theta)))
        for (_, own), one in zip(self._parts(), found, strict=True):
            if covariance is not None:
                covariance = None if one.covariance is None else covariance
            if covariance is not None and one.covariance is not None:
                covariance[own, own] = one.covariance

        def named(which: str) -> dict[str, str]:
            pairs = zip(self.members, found, strict=True)
            return {f"{law.name}.{name}": why for law, one in pairs for name, why in getattr(one, which).items()}

        searches = [one.search for one in found if one.search is not None]
        recipes = (f"{law.name} by {one.recipe}" for law, one in zip(self.members, found, strict=True))
        return Estimate(
            theta=theta,
            covariance=covariance,
            dof=min(one.dof for one in found),
            dropped=named("dropped"),
            condition=max(one.condition for one in found),
            recipe=f"each member alone ({'; '.join(recipes)}), then the median",
            given=named("given"),
            search=min(searches, key=lambda search: search.agreeing, default=None),
        )

    @override
    def remarks(self, estimate: Estimate, x: Inputs, kind: Kind) -> list[str]:
        said = ["its members predict held-out points equally well and are equally simple, so none is believed alone"]
        for law, own in self._parts():
            inside = f"{law.name}."
            alone = replace(
                estimate,
                theta=estimate.theta[own],
                covariance=None if estimate.covariance is None else estimate.covariance[own, own],
                dropped={n.removeprefix(inside): w for n, w in estimate.dropped.items() if n.startswith(inside)},
                given={n.removeprefix(inside): w for n, w in estimate.given.items() if n.startswith(inside)},
            )
            said += [f"{law.name}: {remark}" for remark in law.remarks(alone, x, kind)]
        return said

    def _parts(self) -> Iterator[tuple[Law, slice]]:
        """Each member and where its parameters are."""
        first = 0
        for law in self.members:
            yield law, slice(first, first + len(law.params))
            first += len(law.params)

    def _expected(self, theta: Array, x: Inputs) -> Array:
        """(E, M) what each member expects."""
        return np.stack([law.f(theta[own], x) for law, own in self._parts()])


def ensemble(members: Sequence[Law]) -> Law:
    """The ensemble of two or more laws; the order of members does not matter.

    Raises
    ------
    FitError
        When a law is named twice, describes other metrics than the rest, does not move with the ratio, or has a
        posterior, whose intervals no ensemble keeps.
    """
    members = sorted(members, key=lambda law: law.name)
    name = JOIN.join(law.name for law in members)
    if len(members) < 2 or len({law.name for law in members}) < len(members):
        raise FitError(f"an ensemble is of two or more different laws, got {name!r}: name each once")
    for law in members:
        if isinstance(law, PosteriorLaw) or law.ratio_param is None:
            lacking = "intervals of its own" if isinstance(law, PosteriorLaw) else "no parameter of the ratio"
            raise FitError(f"an ensemble is of laws fitted to their points, {law.name} has {lacking}: leave it out")
    if not set.intersection(*(set(law.metric_kinds) for law in members)):
        raise FitError(f"an ensemble's laws must describe the same metrics, those of {name!r} do not: choose others")
    return _of(tuple(type(law) for law in members))()


@functools.cache
def _of(kinds: tuple[type[Law], ...]) -> type[Ensemble]:
    """One class an ensemble, as laws are equal where their classes are."""
    members = tuple(kind() for kind in kinds)
    inputs = dict.fromkeys(name for law in members for name in law.inputs)
    return type(
        "Ensemble",
        (Ensemble,),
        {
            "__doc__": Ensemble.__doc__,
            "members": members,
            "name": JOIN.join(law.name for law in members),
            "formula": f"median of {', '.join(f'{law.name} [{law.formula}]' for law in members)}",
            "reference": "",
            "inputs": tuple(inputs),
            "metric_kinds": tuple(k for k in members[0].metric_kinds if all(k in law.metric_kinds for law in members)),
            "params": tuple(replace(p, name=f"{law.name}.{p.name}") for law in members for p in law.params),
            "anchored": 2 * sum(law.anchored for law in members) > len(members),  # the median is then one of these
            "ratio_param": f"{members[0].name}.{members[0].ratio_param}",
            "log_link": all(law.log_link for law in members),
            "screened": False,
            "defects": tuple(f"{law.name}: {defect}" for law in members for defect in law.defects),
        },
    )

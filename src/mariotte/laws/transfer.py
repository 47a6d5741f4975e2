"""To a new model: what others say of it before it is measured, and what one or a few measurements of it change.

The pool is the published series that ship with the package and, where given, points of one's own. (Ours, on published
series: without a point the median error is about 0.2 nats, and one mild measurement halves it.)
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from mariotte import __version__
from mariotte.errors import FitError
from mariotte.laws.axes import scale_of
from mariotte.laws.base import Inputs, Point, metric_kind
from mariotte.laws.facts import FitReport
from mariotte.laws.fitting import coefficients, fit
from mariotte.laws.forms.family import Family
from mariotte.laws.learning import learn
from mariotte.laws.points import read_all
from mariotte.laws.priors import Priors
from mariotte.laws.published import base_model
from mariotte.laws.published import points as published_points
from mariotte.laws.result import Fit
from mariotte.store.record import digest


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked of a new model.

    Parameters
    ----------
    metric : its name decides the scale: a perplexity or a loss over text, the loss of answers, or a score
    base : the dense model's value, in nats or as a fraction
    family : pruning family of what shall be cut; None or an unknown one gets the wide curve of all families
    ratio_kind, protocol : as points say them; predictions answer for these
    chance : score of a guesser (for a loss ln of the vocabulary), None where unknown
    recovered : whether training follows the cut
    params : of the dense model, None where unknown
    """

    metric: str
    base: float
    family: str | None
    ratio_kind: str = ""
    protocol: str = ""
    chance: float | None = None
    recovered: bool = False
    params: float | None = None

    def __post_init__(self) -> None:
        if scale_of(self.metric) is None:
            raise FitError(f"transfer is for losses and scores, {self.metric!r} is a {metric_kind(self.metric)}")
        # A point checks the rest: the dense value and its kind.
        Point(
            value=self.base,
            base=self.base,
            ratio=0.0,
            ratio_kind=self.ratio_kind,
            metric=self.metric,
            protocol=self.protocol,
        )
        if metric_kind(self.metric) == "score" and self.base - (self.chance or 0.0) < 0.05:
            raise FitError(
                f"a dense score of {self.base:g} is within 0.05 of chance ({self.chance or 0:g}) and cannot fall: "
                "choose another metric"
            )


def own_pool(sources: Iterable[str]) -> list[Point]:
    """The points of every loss and score of tables and stores, clustered by base model × family as the shipped ones.

    Raises
    ------
    FitError
        When a source has none.
    """
    found: list[Point] = []
    for source in sources:
        own = [p for p in read_all(source) if scale_of(p.metric) is not None]
        if not own:
            raise FitError(f"{source!r} has no loss and no score of a compressed model to learn from: leave it out")
        found += [replace(p, cluster=f"{base_model(p.model)} × {p.family or 'unknown'}") for p in own]
    return found


def learn_with(own: Iterable[Point], *, shipped: bool = True) -> Priors:
    """Priors and calibration from the shipped points and one's own, or from these alone.

    Raises
    ------
    FitError
        When nothing can be learned from them.
    """
    return learn([*(published_points() if shipped else ()), *own])


def transfer(target: Target, points: Iterable[Point] = (), *, priors: Priors | None = None) -> Fit:
    """What a new model's curve is expected to be: zero-, one- or k-shot, by the number of its own points.

    Parameters
    ----------
    target : what is asked
    points : measured on the new model; of the target's metric, protocol and kind of ratio
    priors : None for those that ship; `learn_with` gives those of one's own pool as well

    Raises
    ------
    FitError
        When points are no measurements of the target.
    """
    law = Family(priors)
    known = list(points)
    for name in ("metric", "ratio_kind", "protocol", "family", "chance", "recovered"):
        other = next((p for p in known if getattr(p, name) != getattr(target, name)), None)
        if other is not None:
            raise FitError(
                f"the target's {name} is {getattr(target, name)!r}, a point has {getattr(other, name)!r}: "
                "transfer each alone"
            )
    if known:
        return fit(law, known)
    return _before(law, target)


def _before(law: Family, target: Target) -> Fit:
    """The fit to no point: the family's curve."""
    nan = float("nan")
    x = Inputs.at(
        target.base,
        0.0,
        0.0,
        chance=nan if target.chance is None else target.chance,
        params=nan if target.params is None else target.params,
        family=target.family,
        metric=target.metric,
        recovered=target.recovered,
    )
    estimate = law.before(x)
    assert estimate.covariance is not None
    kind = metric_kind(target.metric)
    facts = FitReport(
        law=law.name,
        formula=law.formula,
        metric=target.metric,
        kind=kind,
        protocol=target.protocol,
        ratio_kind=target.ratio_kind,
        n_points=0,
        n_series=0,
        n_clusters=0,
        box={"ratio": (0.0, 0.0), "base": (target.base, target.base), "tokens": (0.0, 0.0)},
        base=target.base,
        tokens=0.0,
        chance=target.chance,
        coefficients=coefficients(law, estimate),
        dof=0,
        residual_sd=None,
        adj_r2_uncentred=None,
        adj_r2_centred=None,
        r2_log_ratio=None,
        f_statistic=None,
        f_dof=None,
        condition=estimate.condition,
        max_correlation=None,
        remarks=("no point of this model is known: the curve of its family", *law.remarks(estimate, x, kind)),
        recipe=estimate.recipe,
        data_hash=digest([asdict(target)]),
        versions={"mariotte": __version__, "numpy": np.__version__, "python": platform.python_version()},
        params=target.params,
        family=target.family,
        recovered=target.recovered,
    )
    return Fit(
        law=law,
        facts=facts,
        calibration=law.standardised(target.metric),
        posterior=tuple(estimate.covariance[np.triu_indices(len(law.params))].tolist()),
    )

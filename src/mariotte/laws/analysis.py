"""From points to an answer: hold every law out, choose one, fit it, say what is critical."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mariotte.errors import FitError
from mariotte.laws import published
from mariotte.laws.axes import known_name
from mariotte.laws.base import Inputs, Kind, Law, Point, values
from mariotte.laws.catalogue import applicable, find
from mariotte.laws.ensemble import JOIN
from mariotte.laws.facts import Ratio
from mariotte.laws.fitting import fit
from mariotte.laws.forms.family import Family
from mariotte.laws.linear import LinearLaw
from mariotte.laws.pool import Pool
from mariotte.laws.priors import Priors
from mariotte.laws.result import Fit
from mariotte.laws.validation import Fold, HoldOut, grouped, rolling

AUTO = "auto"
"""The name that asks for `DEFAULT` where it applies, and for the winner of the hold-out elsewhere."""

BEST = "best"
"""The name that asks for the winner of the hold-out of all laws."""

DEFAULT = "family"
"""The law that predicts best on published series; what it describes it is the default for."""

TOLERANCE: Mapping[Kind, float] = {"loss": 1.05, "score": 0.95, "speed": 1.05, "size": 0.95}
"""Of which the critical ratio is printed: 5 % more loss, 5 % less of a score, 5 % faster, or 5 % smaller."""

LEVEL = 0.8
"""Of the critical ratio's interval: the highest that four clusters can calibrate."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What `analyse` found.

    Parameters
    ----------
    metric, kind : of the points
    by : the field grouped by, None for one fit
    held_out : predictions of all laws; empty when every series is too short
    law : the one fitted
    why : how it was chosen, one sentence
    fits : one a group; the empty text names the only one
    critical : the ratio at which each fit reaches `TOLERANCE`
    refused : groups that could not be fitted, and why
    left_out : points beyond collapse that a group's fit did not use, where there were any
    """

    metric: str
    kind: Kind
    by: str | None
    held_out: HoldOut
    law: str
    why: str
    fits: Mapping[str, Fit]
    critical: Mapping[str, Ratio]
    refused: Mapping[str, str]
    left_out: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: scores three ways, fits with their reports, critical ratios."""
        return {
            "metric": self.metric,
            "kind": self.kind,
            "by": self.by,
            "hold_out": {
                "before_collapse": [asdict(s) for s in self.held_out.scores()],
                "next_step": [asdict(s) for s in self.held_out.scores(next_step=True)],
                "all": [asdict(s) for s in self.held_out.scores(before_collapse=False)],
                "refused": [
                    {"law": r.law, "series": r.series._asdict(), "trained_on": r.k, "reason": r.reason}
                    for r in self.held_out.refusals
                ],
            },
            "law": self.law,
            "why": self.why,
            "tolerance": TOLERANCE[self.kind],
            "fits": [
                {"group": group, "critical": asdict(self.critical[group]), **asdict(fitted.report())}
                for group, fitted in self.fits.items()
            ],
            "refused": dict(self.refused),
            "left_out_beyond_collapse": dict(self.left_out),
        }


def analyse(
    points: Sequence[Point],
    *,
    law: str = AUTO,
    by: str | None = None,
    keep_collapsed: bool = False,
    priors: Priors | None = None,
) -> Analysis:
    """Compare laws by rolling hold-out, choose one, and fit it to the points or to each group of them.

    Parameters
    ----------
    points : of one metric
    law : ``auto`` for the family law where it applies and else as ``best``; ``best`` for the simplest within one
        standard error of the best of all laws, or the ensemble of those that are equally simple; or a name, such as
        ``weibull`` or ``odds + weibull``. Unless it is ``best`` the hold-out is of that law and of those that are
        solved directly, so that it costs no search
    by : a field of the points; None pools them all into one fit
    keep_collapsed : fit to points beyond collapse too (a loss over twice the dense one), as the papers do. A model that
        has collapsed says nothing about mild cuts, and a few such points bend a curve away from all others; the
        hold-out always sees them
    priors : what the family law starts from; None for what ships

    Raises
    ------
    FitError
        When nothing can be chosen or fitted.
    UnknownNameError
        When no law has that name.
    """
    chosen = None if law in (AUTO, BEST) else find(law).name  # a misspelt name must not wait for the hold-out

    def prepare(one: Law, fold: Fold | None = None) -> Law:
        if not isinstance(one, Family):
            return one
        return default if fold is None or priors is not None else without(fold.train[0])

    default = Family(priors)
    without = _strict(points, default)
    held_out = _living(rolling(points, _screened(points, law), prepare=prepare))
    if chosen is not None:
        why = "as asked"
    elif law == AUTO and points[0].kind in find(DEFAULT).metric_kinds and _can_fit(DEFAULT, points, by):
        chosen, why = DEFAULT, "chosen: the default, which predicts published series best"
        why += _against_others(held_out, chosen)
    else:
        if law == AUTO and points[0].kind in find(DEFAULT).metric_kinds:
            held_out = _living(rolling(points, prepare=prepare))  # the default refuses: the choice is among all laws
        winners = held_out.winners()
        why = "chosen: the simplest within one standard error of the best mean"
        if len(winners) > 1:
            held_out = held_out.joined(winners)
            why += ", several of which are equally simple: their ensemble"
        chosen = find(JOIN.join(winners)).name
        why += _against_baselines(held_out, chosen)
    groups = grouped(points, by)
    fits: dict[str, Fit] = {}
    refused: dict[str, str] = {}
    left_out: dict[str, int] = {}
    for group, whole in groups.items():
        own = [p for p in whole if keep_collapsed or p.before_collapse]
        if len(own) < len(whole):
            left_out[group] = len(whole) - len(own)
        try:
            fits[group] = fit(prepare(find(chosen)), own, pool=points)
        except FitError as error:
            # One group of many that is too small is told and passed over; a single fit that fails is an error.
            if len(groups) == 1:
                raise
            refused[group] = str(error)
    if not fits:
        raise FitError(f"no group by {by} could be fitted: {next(iter(refused.values()))}")
    kind = points[0].kind
    return Analysis(
        metric=points[0].metric,
        kind=kind,
        by=by,
        held_out=held_out,
        law=chosen,
        why=why,
        fits=fits,
        critical={group: fitted.critical(TOLERANCE[kind], level=LEVEL) for group, fitted in fits.items()},
        refused=refused,
        left_out={group: n for group, n in left_out.items() if group in fits},
    )


def _strict(points: Sequence[Point], default: Family) -> Callable[[Point], Family]:
    """The family law for the hold-out of a point: one that has not learned from its cluster, if that was published."""
    shipped: set[str] = set()
    if any(p.source for p in points):
        shipped = {s for table in published.TABLES for s in published.sources(table.name)}
    own = {p.source.partition(" ")[0] for p in points} & shipped
    if not own:
        return lambda _point: default
    pool = Pool(published.points())
    laws: dict[str, Family] = {}

    def without(point: Point) -> Family:
        if point.source.partition(" ")[0] not in own:
            return default
        cluster = f"{published.base_model(point.model)} × {known_name(point.family)}"
        if cluster not in laws:
            laws[cluster] = Family(pool.priors(lambda other: other == cluster))
        return laws[cluster]

    return without


def _living(held_out: HoldOut) -> HoldOut:
    """The hold-out without the default law where that refuses every fold: scores are of folds that all laws cover."""
    if any(DEFAULT in row.predictions for row in held_out.rows):
        return held_out
    return replace(held_out, laws=tuple(law for law in held_out.laws if law != DEFAULT))


def _screened(points: Sequence[Point], law: str) -> list[str] | None:
    """The laws to hold out: all for ``best``, else the one asked for and those that are solved directly."""
    if law == BEST or not points:
        return None
    kind = points[0].kind
    direct = [a for a in applicable(kind) if a.baseline or isinstance(a, LinearLaw) or a.name == DEFAULT]
    asked = [] if law == AUTO else [find(law)]
    asked = [a for a in asked if kind in a.metric_kinds]
    return sorted({a.name for a in (*direct, *asked)})


def _can_fit(law: str, points: Sequence[Point], by: str | None) -> bool:
    """Whether the law describes any of the groups."""
    for own in grouped(points, by).values():
        try:
            find(law).estimate(Inputs.of(own), values(own))
        except FitError:
            continue
        return True
    return False


def _against_others(held_out: HoldOut, chosen: str) -> str:
    """What held-out points of one's own say against the default, where they do."""
    scores = {s.law: s for s in held_out.scores()}
    if chosen not in scores:
        return ""
    own = scores[chosen]
    better = [s for s in scores.values() if s.mean < own.mean - (s.se or 0.0)]
    return f"; but {better[0].law} has a smaller error here ({better[0].mean:.3g})" if better else ""


def _against_baselines(held_out: HoldOut, chosen: str) -> str:
    scores = {s.law: s for s in held_out.scores()}
    better = [s for s in scores.values() if find(s.law).baseline and s.mean < scores[chosen].mean]
    return f"; but {better[0].law} has a smaller error ({better[0].mean:.3g})" if better else ""

"""What the page says of laws: the only file of the report that knows the laws package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mariotte.report.series import share
from mariotte.store.record import Record, digest

if TYPE_CHECKING:
    from mariotte.laws.facts import Ratio


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """One law's or baseline's rolling hold-out error: RMSE on cuts beyond those it was fitted to.

    Parameters
    ----------
    law : its name
    baseline : it only exists to be beaten
    all, before_collapse, next_step : over all later cuts, those before collapse, the next one; None without folds
    folds : how many forecasts were judged
    best : chosen by hold-out
    """

    law: str
    baseline: bool
    all: float | None
    before_collapse: float | None
    next_step: float | None
    folds: int
    best: bool


@dataclass(frozen=True, kw_only=True)
class Coefficient:
    """A fitted parameter with its interval; None where none could be had."""

    name: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class FittedLaw:
    """One law fitted to one series.

    Parameters
    ----------
    series : model and method
    law, formula : name, and formula in plain text
    coefficients : in the law's order
    centred, uncentred : R² in sample, None where undefined
    critical : share removed at which the loss has risen by the allowance, as text with its interval or the reason
        why there is none
    points : how many it was fitted to
    notes : what is known to be wrong with it or with these data
    """

    series: str
    law: str
    formula: str
    coefficients: tuple[Coefficient, ...]
    centred: float | None
    uncentred: float | None
    critical: str
    points: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LawReport:
    """Hold-out table and fits of one measure.

    Parameters
    ----------
    measure : canonical text
    unit : of the errors
    holdout : from the smallest error before collapse on
    fits : one for each series
    calibrated : whether intervals were checked to cover what they promise
    clusters, series : how many were judged
    """

    measure: str
    unit: str
    holdout: tuple[HoldOut, ...]
    fits: tuple[FittedLaw, ...]
    calibrated: bool
    clusters: int
    series: int


def law_reports(records: Sequence[Record], *, allowance: float = 0.05) -> list[LawReport]:
    """Hold-out tables and fits, one report for each measure of loss and protocol; empty when no series is long enough.

    Parameters
    ----------
    records : of any measures; cuts that were recovered or quantized are left out: these laws begin at the dense model
        and go by the share removed alone
    allowance : relative rise of the loss at which the critical share is given
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "loss" in record.metrics and record.recovery is None and not _quantized(record):
            groups.setdefault((record.measure, digest(record.protocol)), []).append(record)
    reports = (_report(measure, own, allowance) for (measure, _), own in groups.items())
    return [report for report in reports if report is not None]


def _quantized(record: Record) -> bool:
    return "quantization" in {record.family, *(step.get("family") for step in record.steps)}


def _report(measure: str, records: Sequence[Record], allowance: float) -> LawReport | None:
    from mariotte.errors import FitError
    from mariotte.laws import find
    from mariotte.laws.analysis import LEVEL, analyse
    from mariotte.laws.points import from_records
    from mariotte.laws.validation import grouped

    try:
        points = from_records(records, metric="loss").points
        found = analyse(points, by="series")
    except FitError:
        return None  # too few ratios to hold any out: the page then has no section on laws
    kept = found.held_out.scores()
    following = {s.law: s.mean for s in found.held_out.scores(next_step=True)}
    every = {s.law: s.mean for s in found.held_out.scores(before_collapse=False)}
    fits: list[FittedLaw] = []
    calibrated = True
    groups = grouped(points, "series")
    for group, fitted in found.fits.items():
        first, facts = groups[group][0], fitted.report()
        point = fitted.critical(1 + allowance, level=LEVEL)
        beyond = found.left_out.get(group, 0)
        remarks = [*facts.remarks, *([f"{beyond} cuts beyond collapse are not fitted to"] if beyond else [])]
        calibrated &= point.r is None or point.lo is not None or point.hi is not None
        fits.append(
            FittedLaw(
                series=f"{first.model} × {first.method}",
                law=facts.law,
                formula=facts.formula,
                coefficients=tuple(
                    Coefficient(name=c.name, value=c.estimate, low=c.lo, high=c.hi)
                    for c in fitted.shown()
                    if not c.dropped
                ),
                centred=facts.adj_r2_centred,
                uncentred=facts.adj_r2_uncentred,
                critical=_critical(point),
                points=facts.n_points,
                notes=tuple(f"{first.model} × {first.method}: {remark}." for remark in remarks),
            )
        )
    return LawReport(
        measure=measure,
        unit="nats",
        holdout=tuple(
            HoldOut(
                law=score.law,
                baseline=find(score.law).baseline,
                all=every.get(score.law),
                before_collapse=score.mean,
                next_step=following.get(score.law),
                folds=score.n_folds,
                best=score.law == found.law,
            )
            for score in kept
        ),
        fits=tuple(fits),
        calibrated=calibrated,
        clusters=kept[0].n_clusters if kept else 0,
        series=kept[0].n_series if kept else 0,
    )


def _critical(point: Ratio) -> str:
    """The critical share with its interval, or the word for why there is none."""
    if point.r is None:
        return point.status.replace("_", " ")
    interval = "" if point.lo is None or point.hi is None else f" ({share(point.lo)} to {share(point.hi)})"
    return f"{share(point.r, 1)}{interval}" + (", beyond the data" if point.status == "beyond_box" else "")

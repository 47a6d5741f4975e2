"""``mariotte fit``: hold-out table, coefficients with intervals, critical ratio."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mariotte.laws.analysis import Analysis

__all__ = ["fit"]


def fit(
    source: Annotated[
        str, typer.Argument(metavar="TABLE|STORE", help="A .csv, .parquet or .json table, or a store (path or URL).")
    ],
    metric: Annotated[
        str | None, typer.Option(help="Which metric; by default 'loss', or the only one there is.", show_default=False)
    ] = None,
    law: Annotated[
        str,
        typer.Option(
            help="A law (see 'mariotte laws'); auto: the family law where it applies, else as best; best: the simplest "
            "within one standard error of the best of the hold-out of all laws, or the ensemble of those equally "
            "simple; 'odds + weibull': an ensemble of your own."
        ),
    ] = "auto",
    by: Annotated[
        str | None,
        typer.Option(
            help="One fit for each model, method, family, source, protocol, ratio_kind, recovery, cluster or series.",
            show_default=False,
        ),
    ] = None,
    covariate: Annotated[
        str | None,
        typer.Option(
            help="What the ratio of a record is: removed (parameters removed or zeroed; the default), ratio, amount, "
            "obtained or sparsity.",
            show_default=False,
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=TEXT",
            help="Keep points whose field is, or begins with, the text; repeatable.",
            show_default=False,
        ),
    ] = None,
    keep_collapsed: Annotated[
        bool,
        typer.Option("--keep-collapsed", help="Fit to points beyond collapse too (loss over twice the dense one)."),
    ] = False,
    priors: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="What the family law starts from, of 'mariotte laws --learn'.", show_default=False
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Write the fit here, for 'mariotte predict'.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the laws on data that they have not seen, and fit one.

    Every series (model, method, metric, protocol, recovery) is predicted from its mild ratios by every law and by the
    naive baselines; the table shows their errors. Then the law asked for, or the winner, is fitted to all points and
    printed with its coefficients and the ratio at which 5 % are lost. Metrics, protocols and kinds of ratio are never
    pooled.
    """
    from mariotte.cli.console import one_line, print_json, say
    from mariotte.errors import FitError
    from mariotte.laws import points
    from mariotte.laws.analysis import analyse
    from mariotte.laws.priors import read as read_priors

    reading = points.read(source, metric=metric, covariate=covariate)
    conditions: dict[str, str] = {}
    for text in where or []:
        field, mark, wanted = text.partition("=")
        if not mark:
            raise FitError(f"--where must be FIELD=TEXT, such as method=slice, got {text!r}: add the text to look for")
        conditions[field] = wanted
    kept = points.where(reading.points, conditions)
    if out == "":  # as a path it would be the working folder
        raise FitError("--out needs the name of a file, got an empty one: give one, such as fit.json")
    known = None if priors is None else read_priors(Path(priors))
    found = analyse(kept, law=law, by=by, keep_collapsed=keep_collapsed, priors=known)
    if out is not None:
        if len(found.fits) > 1:
            raise FitError(f"--out keeps one fit, --by {by} gives {len(found.fits)}: choose one with --where {by}=...")
        Path(out).write_text(next(iter(found.fits.values())).to_json(), encoding="utf-8")
    if as_json:
        print_json({**found.to_dict(), "skipped": dict(reading.skipped)})
        return
    for reason, n in reading.skipped.items():
        say(f"left out: {n} {reason}")
    _print(found)
    if out is not None:
        say(one_line(f"fit written to {out}"))


def _print(found: Analysis) -> None:
    from mariotte.cli.console import format_cell, one_line, print_table, say
    from mariotte.laws.analysis import LEVEL, TOLERANCE
    from mariotte.laws.base import metric_unit
    from mariotte.laws.points import is_perplexity

    unit = metric_unit(found.metric)
    name = f"ln {found.metric}" if is_perplexity(found.metric) else found.metric
    scores = found.held_out.scores()
    following = {s.law: s.mean for s in found.held_out.scores(next_step=True)}
    every = {s.law: s.mean for s in found.held_out.scores(before_collapse=False)}
    if scores:
        first = scores[0]
        rows = [[s.law, s.mean, s.median, s.se, following.get(s.law), every.get(s.law)] for s in scores]
        title = (
            f"Hold-out error of {name} ({unit}, RMSE before collapse): {first.n_series} series in "
            f"{first.n_clusters} clusters, {first.n_folds} folds"
        )
        print_table(title, ["law", "mean", "median", "s.e.", "next step", "all ratios"], rows)
    else:
        say("no hold-out: it needs a series with at least 3 ratios before collapse")
    for law, n, reason in found.held_out.refused():
        say(one_line(f"{n} folds left out: {law}: {reason}"))
    label = [found.by] if found.by else []
    rows = [
        [*([group] if found.by else []), c.name, c.estimate, c.se, _interval(c.lo, c.hi), c.dropped or ""]
        for group, fitted in found.fits.items()
        for c in fitted.shown()
    ]
    any_fit = next(iter(found.fits.values())).report()
    say(one_line(f"{found.law} ({found.why}): {any_fit.formula}"))
    posterior = next(iter(found.fits.values())).posterior is not None
    errors = "of the posterior" if posterior else "classical errors, points taken as independent"
    print_table(
        f"Coefficients ({errors}; 95 % intervals)",
        [*label, "parameter", "estimate", "s.e.", "interval", "left out because"],
        rows,
    )
    rows = [
        [
            *([group] if found.by else []),
            fitted.report().base,
            ratio.r,
            _interval(ratio.lo, ratio.hi),
            ratio.status,
            ratio.note,
        ]
        for (group, fitted), ratio in zip(found.fits.items(), found.critical.values(), strict=True)
    ]
    change = "+5 %" if TOLERANCE[found.kind] > 1 else "-5 %"
    print_table(
        f"Critical ratio: where {name} changes by {change} ({any_fit.ratio_kind or 'ratio as stated by the source'})",
        [*label, "dense value", "ratio", f"{LEVEL:.0%} interval", "status", "note"],
        rows,
    )
    for group, fitted in found.fits.items():
        report = fitted.report()
        prefix = f"{group}: " if found.by else ""
        ratios = report.box["ratio"]
        lines = [
            f"{report.n_points} points, {report.n_series} series, {report.n_clusters} clusters, "
            f"ratios {ratios[0]:.3g} to {ratios[1]:.3g}; in-sample adjusted R² "
            f"{format_cell(report.adj_r2_centred)} centred, {format_cell(report.adj_r2_uncentred)} uncentred, "
            f"R² of ln(L/L0) {format_cell(report.r2_log_ratio)}",
            *report.remarks,
        ]
        for line in lines:
            say(one_line(prefix + line))
    for group, n in found.left_out.items():
        prefix = f"{group}: " if found.by else ""
        say(one_line(f"{prefix}{n} points beyond collapse are not fitted to; --keep-collapsed fits to them too"))
    for group, reason in found.refused.items():
        say(one_line(f"not fitted: {group}: {reason}"))


def _interval(lo: float | None, hi: float | None) -> str:
    return "-" if lo is None or hi is None else f"{lo:.3g} to {hi:.3g}"

"""The tables of the page, as text: every row names model, data, protocol and seeds, with the dense value beside."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from mariotte.chain import print_number
from mariotte.report.claim import Claim, Verdict
from mariotte.report.lawtable import FittedLaw, LawReport
from mariotte.report.series import (
    DENSE,
    Cut,
    Setting,
    corpus_of,
    cuts,
    is_dense,
    kind_of,
    measure_labels,
    own_metrics,
    recipe_of,
    repairs,
    setting_of,
    share,
    signed_share,
    span,
    tokens_text,
)
from mariotte.report.series import series as as_series
from mariotte.report.summary import ALLOWANCES, Affordable, affordable
from mariotte.report.table import DASH, MINUS, Cell, Table, row_of
from mariotte.store.record import Record

MOST_ROWS = 2_000
"""Rows of the table of all cuts: beyond, a page is no longer a page; the store's export has them all."""

MOST_OPEN = 12
"""Rows of a table that stays open; further ones are folded away; chosen by us."""

LEAST_LOSS, LEAST_SCORE = 0.01, 0.02
"""Damage in nats and in accuracy below which what recovery repairs is not asked: seeds decide; chosen by us."""


def allowance_tables(records: Sequence[Record], main: Setting | None) -> list[Table]:
    """What a rise of the loss by 1, 5 or 10 % buys: the main model's series, then all others folded away."""
    facts = cuts(records, "knowledge", "top1")
    found = as_series(cuts(records, "loss", "loss"))
    answers = [
        [affordable(curve, allowance, facts) for allowance in ALLOWANCES]
        for curve in found
        if curve.setting.kind == "loss"
    ]
    usable = [row for row in answers if any(row)]
    usable.sort(key=lambda row: [-(a.removed if a else 0.0) for a in (row[1], row[2], row[0])])
    mine = [row for row in usable if main and _any(row).setting == main]
    others = [row for row in usable if not main or _any(row).setting != main]
    tables: list[Table] = []
    if mine:
        assert main is not None
        caption = (
            f"{main.model} on {corpus_of(main.measure) or main.measure} (protocol {main.protocol}): share of the "
            "parameters that each method takes away before the loss has risen so far. Interpolated between measured "
            "cuts; an empty cell means that not even the mildest cut stays within."
        )
        tables.append(_allowances(mine[:MOST_OPEN], caption, ""))
        if mine[MOST_OPEN:]:
            tables.append(_allowances(mine[MOST_OPEN:], "", f"{len(mine) - MOST_OPEN} more series of {main.model}"))
    if others:
        others.sort(key=lambda row: (-_any(row).base_params, _any(row).setting.model))
        models = {_any(row).setting.model for row in others}
        again = main is not None and main.model in models
        tables.append(_allowances(others, "", f"Other models{' and texts' * again} ({len(models)})"))
    return tables


def _any(row: Sequence[Affordable | None]) -> Affordable:
    return next(answer for answer in row if answer is not None)


def _allowances(rows: Sequence[Sequence[Affordable | None]], caption: str, fold: str) -> Table:
    several = bool(fold)
    body: list[tuple[Cell, ...]] = []
    for row in rows:
        some = _any(row)
        cells: list[str | Cell] = []
        if several:
            cells.append(
                Cell(text=some.setting.model, below=f"{corpus_of(some.setting.measure)} · {some.setting.protocol}")
            )
        cells.append(Cell(text=some.series, below="zeroed, still stored" if some.zeroes else ""))
        cells.append(f"{some.base_loss:.3f}")
        for answer in row:
            if answer is None:
                cells.append("")
                continue
            at_least = "≥\u202f" if answer.open else ""
            kept = answer.facts_kept
            below = f"@{print_number(round(answer.amount, 3))} · loss {answer.loss:.3f}"
            below += f" · facts {share(kept)}" if kept is not None else ""
            cells.append(
                Cell(text=f"{at_least}{share(answer.removed)}", below=below, strong=answer.allowance == ALLOWANCES[1])
            )
        cells.append(span(seed for answer in row if answer for seed in answer.seeds))
        body.append(row_of(*cells))
    heads = tuple(f"#Within {signed_share(allowance, 0)}" for allowance in ALLOWANCES)
    columns = ("Series", "#Dense loss", *heads, "#Seeds")
    return Table(columns=("Model", *columns) if several else columns, rows=tuple(body), caption=caption, fold=fold)


def cut_table(losses: Sequence[Cut], facts: Sequence[Cut]) -> Table | None:
    """Every chain of every model with its losses and facts known, dense values below."""
    labels = measure_labels(cut.setting.measure for cut in losses)
    known = {(cut.setting.model_hash, cut.chain): cut for cut in facts}
    rows: dict[tuple[str, str], list[dict[str, Cut]]] = defaultdict(list)  # a second dictionary for a second protocol
    for cut in losses:
        own = rows[cut.setting.model_hash, cut.chain]
        free = next((found for found in own if cut.setting.measure not in found), None)
        if free is None:
            own.append(free := {})
        free[cut.setting.measure] = cut
    for key in known:
        rows[key] = rows[key] or [{}]
    every = [(found, known.get(key)) for key, own in rows.items() for found in own]
    if not every:
        return None
    heads = [f"#Loss, {label}" if len(labels) > 1 else "#Loss" for label in labels.values()]
    caption = (
        "Means over seeds, and below them the change, the dense value and the range over seeds. Loss in nats a token"
        f"{', facts as top-1 share' * bool(facts)}."
    )
    if len(every) > MOST_ROWS:
        caption += f" The first {MOST_ROWS:,} of {len(every):,} cuts; `mariotte export` writes them all."
    return Table(
        columns=("Model", "Chain", "#Removed", *heads, *(["#Facts"] if facts else [])),
        rows=tuple(
            row_of(
                *_cut_cells(next(cut for cut in (*found.values(), fact) if cut), alone=len(labels) < 2),
                *(_value_cell(found.get(name), "{:.3f}".format) for name in labels),
                *([_value_cell(fact, lambda value: share(value, 1))] if facts else []),
            )
            for found, fact in every[:MOST_ROWS]
        ),
        caption=caption,
        fold=f"All {len(every):,} cuts in numbers",
    )


def _cut_cells(cut: Cut, *, alone: bool) -> list[Cell]:
    """Model, chain and share removed; corpus and protocol where a cut is `alone` in its row, not one of several."""
    seeds = f"seed{'s' if len(cut.seeds) > 1 else ''} {span(cut.seeds)}"
    zeroed = "zeroed" if cut.zeroed > 0.5 * abs(cut.removed) > 0 else ""
    where = f"{corpus_of(cut.setting.measure) or cut.setting.measure} · {cut.setting.protocol}"
    return [
        Cell(text=cut.setting.model, below=where if alone else ""),
        Cell(text=cut.chain, below=seeds),
        Cell(text=share(cut.removed, 1), below=zeroed),
    ]


def _value_cell(cut: Cut | None, text: Callable[[float], str]) -> Cell:
    if cut is None:
        return Cell(text="")
    below = [f"{text(cut.low)}{DASH}{text(cut.high)}"] if len(cut.seeds) > 1 else []
    if cut.method is not None:
        change = [signed_share(cut.change)] if math.isfinite(cut.change) else []
        below = [*change, f"dense {text(cut.base)}", *below]
    return Cell(text=text(cut.value), below=" · ".join(below))


def repair_table(losses: Sequence[Cut], accuracies: Sequence[Cut], facts: Sequence[Cut]) -> Table | None:
    """What recovery repairs, by method and tokens: medians over models and amounts, loss by training corpus."""
    near: dict[tuple[str, int], list[float]] = defaultdict(list)
    far: dict[tuple[str, int], list[float]] = defaultdict(list)
    scores: tuple[dict[tuple[str, int], list[float]], ...] = (defaultdict(list), defaultdict(list))
    for cut, repaired in repairs(losses, least=LEAST_LOSS):
        same = cut.trained == corpus_of(cut.setting.measure)
        (near if same else far)[recipe_of(cut), cut.tokens].append(repaired)
    for found, kind in zip(scores, (accuracies, facts), strict=True):
        for cut, repaired in repairs(kind, least=LEAST_SCORE):
            found[recipe_of(cut), cut.tokens].append(repaired)
    columns = {
        "Loss, same corpus": near,
        "Loss, other corpora": far,
        "Accuracy": scores[0],
        "Facts": scores[1],
    }
    columns = {name: found for name, found in columns.items() if found}
    rows = sorted({key for found in columns.values() for key in found})
    if not rows:
        return None
    return Table(
        columns=("Method and recovery", "#Tokens", *(f"#{name}" for name in columns)),
        rows=tuple(
            row_of(
                recipe, tokens_text(tokens), *(_repaired(found.get((recipe, tokens), [])) for found in columns.values())
            )
            for recipe, tokens in rows
        ),
        caption=(
            "What recovery repairs: median share of the damage that is undone, over models, amounts and training "
            "corpora, with quartiles and the number of recoveries; 100 % is the dense model, below 0 is worse than the "
            f"cut. Cuts that cost less than {LEAST_LOSS} nats, or less than {share(LEAST_SCORE)} of accuracy, are left "
            "out."
        ),
    )


def _repaired(values: Sequence[float]) -> Cell:
    if not values:
        return Cell(text="")
    below = f"n = {len(values)}"
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        below = f"{share(low)} to {share(high)} · {below}"
    return Cell(text=share(statistics.median(values)), below=below)


def speed_table(parts: Mapping[str, Sequence[Cut]]) -> Table | None:
    """How many cuts of each method the measure calls faster, slower or neither, and the largest S."""
    groups: dict[str, dict[str, list[Cut]]] = defaultdict(lambda: defaultdict(list))
    for part, found in parts.items():
        for cut in found:
            if cut.method is not None:
                groups[cut.series][part].append(cut)
    rows: list[tuple[Cell, ...]] = []
    for name, by_part in sorted(groups.items()):
        cells: list[str | Cell] = [name]
        for part in parts:
            own = by_part.get(part, [])
            said = Counter(cut.verdict for cut in own if cut.verdict).most_common()
            cells.append(Cell(text=_counted(said[:1]), below=_counted(said[1:])))
            best = max(own, key=lambda cut: cut.value, default=None)
            if best is None:
                cells.append("")
                continue
            at = "" if best.amount is None else f"@{print_number(best.amount)} of "
            below = f"{best.low:.2f} to {best.high:.2f} · {at}{best.setting.model}"
            cells.append(Cell(text=f"{best.value:.2f}", below=below))
        rows.append(row_of(*cells))
    columns = tuple(column for part in parts for column in (f"{part}: cuts", f"#{part}: largest S"))
    caption = "Cuts by the measure's own verdict, and the fastest one with its interval."
    return Table(columns=("Method", *columns), rows=tuple(rows), caption=caption) if rows else None


def _counted(said: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in said)


def other_tables(records: Sequence[Record]) -> list[Table]:
    """Every metric of the measures other than loss and knowledge: a table for each, a row for each chain."""
    groups: dict[str, dict[Setting, dict[str, list[Record]]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if kind_of(record.measure) not in ("loss", "knowledge"):
            groups[record.measure][setting_of(record)].setdefault(record.chain, []).append(record)
    return [_other_table(measure, by_setting) for measure, by_setting in sorted(groups.items())]


def _other_table(measure: str, groups: Mapping[Setting, Mapping[str, Sequence[Record]]]) -> Table:
    names = own_metrics(record for chains in groups.values() for group in chains.values() for record in group)
    rows: list[tuple[Cell, ...]] = []
    for setting, chains in groups.items():
        model = Cell(text=setting.model, below=setting.protocol)
        dense = [record.base for group in chains.values() for record in group]
        rows.append(row_of(model, Cell(text=DENSE, strong=True), "", *(_mean_cell(dense, name) for name in names)))
        for chain, group in chains.items():
            if not is_dense(group[0]):
                found = [record.metrics for record in group]
                seeds = span(record.seed for record in group)
                rows.append(row_of(model, chain, seeds, *(_mean_cell(found, name) for name in names)))
    caption = "Means over seeds; the dense model stands first. Standard errors are in the store."
    if len(rows) > MOST_ROWS:
        caption += f" The first {MOST_ROWS:,} of {len(rows):,} rows; `mariotte export` writes them all."
    return Table(
        columns=("Model", "Chain", "#Seeds", *(f"#{name.replace('_', ' ')}" for name in names)),
        rows=tuple(rows[:MOST_ROWS]),
        caption=caption,
        fold=f"All numbers of {measure}",
    )


def _mean_cell(found: Sequence[Mapping[str, float]], name: str) -> str:
    values = [metrics[name] for metrics in found if name in metrics]
    return f"{statistics.fmean(values):.4g}".replace("-", MINUS) if values else ""


def relation_tables(records: Sequence[Record], main_hash: str | None) -> Table | None:
    """Facts known by relation for the main model's cuts, as far as the measure tells them apart."""
    rows: list[tuple[Cell, ...]] = []
    names: list[str] = []
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    for record in records:
        if record.model_hash == main_hash and record.recovery is None:
            found = _relations(record.details)
            if found:
                groups[record.chain].append(found)
                names += [name for name in found if name not in names]
    if len(names) < 2 or len(groups) < 2:
        return None
    for chain, found in groups.items():
        means = [statistics.fmean(values) if (values := [f[n] for f in found if n in f]) else None for n in names]
        rows.append(row_of(chain, *("" if mean is None else share(mean) for mean in means)))
    model = next(record.model for record in records if record.model_hash == main_hash)
    caption = f"{model}: top-1 by relation, means over seeds; the first row is the dense model."
    return Table(
        columns=("Chain", *(f"#{name}" for name in names)),
        rows=tuple(rows),
        caption=caption,
        fold="Facts known by relation",
    )


def _relations(details: Mapping[str, Any]) -> dict[str, float]:
    """Top-1 by relation from a knowledge measure's details: ``{"relations": {name: share or {"top1": share}}}``."""
    given = details.get("relations")
    if not isinstance(given, Mapping):
        return {}
    found: dict[str, float] = {}
    for name, value in cast("Mapping[str, Any]", given).items():
        number = cast("Mapping[str, Any]", value).get("top1") if isinstance(value, Mapping) else value
        if isinstance(number, int | float):
            found[name] = float(number)
    return found


def law_summary(reports: Sequence[LawReport]) -> Table:
    """The law that forecast best on each measure, beside the best naive rule."""
    rows: list[tuple[Cell, ...]] = []
    for report in reports:
        law = next((row for row in report.holdout if row.best), None)
        judged = [row for row in report.holdout if row.baseline and row.before_collapse is not None]
        naive = min(judged, key=lambda row: row.before_collapse or 0.0, default=None)
        rows.append(
            row_of(
                Cell(text=report.measure, below=f"{report.series} series in {report.clusters} clusters"),
                law.law if law else "",
                Cell(text=_error(law.before_collapse) if law else "", strong=True),
                naive.law if naive else "",
                _error(naive.before_collapse) if naive else "",
                f"{len(report.fits)}",
            )
        )
    return Table(
        columns=("Measure", "Law that forecast best", "#RMSE", "Best naive rule", "#RMSE", "#Fits"),
        rows=tuple(rows),
        caption="Fitted to the mildest cuts of a series, judged on those beyond, before collapse: RMSE in "
        f"{', '.join(dict.fromkeys(report.unit for report in reports))}. A measure has a row for each tokenizer.",
    )


def holdout_table(report: LawReport, *, fold: bool = False) -> Table:
    """Rolling hold-out errors, laws and naive baselines in one list."""
    rows = [
        row_of(
            Cell(text=row.law, below="naive baseline" if row.baseline else "", strong=row.best),
            Cell(text=_error(row.before_collapse), strong=row.best),
            _error(row.next_step),
            _error(row.all),
            f"{row.folds}",
        )
        for row in report.holdout
    ]
    return Table(
        columns=("Law", "#Before collapse", "#Next cut", "#All later cuts", "#Forecasts"),
        rows=tuple(rows),
        caption=(
            f"{report.measure}: fitted to the mildest cuts of a series, judged on those beyond; RMSE in {report.unit}, "
            f"mean over {report.series} series in {report.clusters} clusters. Collapse: more than twice the dense loss."
        ),
        fold=f"Hold-out of {report.measure}, {report.series} series" if fold else "",
    )


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def fit_table(report: LawReport, allowance: float, *, fold: bool = False) -> Table | None:
    """Coefficients with intervals, the critical share, and R² in second place."""
    if not report.fits:
        return None
    formulas = {fit.law: fit.formula for fit in report.fits}
    alone = formulas.popitem() if len(formulas) == 1 else None  # told once, not in every row
    rows = [_fit_row(fit, told=alone is not None) for fit in report.fits]
    return Table(
        columns=(
            "Series",
            "Law",
            "Coefficients",
            f"#Share at {signed_share(allowance, 0)}",
            "#R² centred",
            "#R² uncentred",
        ),
        rows=tuple(rows),
        caption=(f"Law {alone[0]}: {alone[1]}. " if alone else "")
        + "R² is in-sample and says little about cuts not yet made: read the hold-out table first.",
        fold=f"Fits of {report.measure}, {len(report.fits)} series" if fold else "",
    )


def _fit_row(fit: FittedLaw, *, told: bool) -> tuple[Cell, ...]:
    """One fit; its formula too unless that was told above."""
    coefficients = ", ".join(f"{c.name} = {_number(c.value)}" for c in fit.coefficients)
    intervals = ", ".join(
        f"{c.name} {_number(c.low)} to {_number(c.high)}"
        for c in fit.coefficients
        if c.low is not None and c.high is not None
    )
    return row_of(
        Cell(text=fit.series, below=f"{fit.points} cut{'s' * (fit.points != 1)}"),
        Cell(text=fit.law, below="" if told else fit.formula),
        Cell(text=coefficients, below=intervals),
        fit.critical,
        "" if fit.centred is None else f"{fit.centred:.3f}",
        "" if fit.uncentred is None else f"{fit.uncentred:.3f}",
    )


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", MINUS)


BADGES: Mapping[Verdict, str] = {"holds": "yes", "does not hold": "no"}
"""Verdicts that have a colour; the others leave the question open."""


def claim_table(claims: Sequence[Claim]) -> Table:
    """What a paper says, whether it holds, and our statistic."""
    return Table(
        columns=("The paper says", "Verdict", "These models say"),
        rows=tuple(
            row_of(
                _typeset(claim.sentence),
                Cell(text=claim.verdict, badge=BADGES.get(claim.verdict, "open")),
                _typeset(claim.statistic),
            )
            for claim in claims
        ),
        prose=True,
    )


def _typeset(text: str) -> str:
    """A sentence with the page's percentages and minus signs, and no line that breaks within a number or before one."""
    text = re.sub(r"(?<=\d) ?%", "\u202f%", text)
    text = re.sub(r"(?<![\w)])-(?=\d)", MINUS, text)
    return text.replace(" = ", "\u00a0=\u00a0")

"""The sections of the page: which figures and tables some records ask for, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mariotte.report import figures, provenance, tables
from mariotte.report.chart import Figure, Palette
from mariotte.report.claim import Paper
from mariotte.report.claims import PAPERS
from mariotte.report.lawtable import LawReport, law_reports
from mariotte.report.series import (
    Cut,
    Series,
    Setting,
    corpus_of,
    cuts,
    kind_of,
    own_metrics,
    recoveries,
    series,
    setting_of,
    signed_share,
    speeds,
)
from mariotte.report.summary import main_setting
from mariotte.report.table import Cell, Table
from mariotte.store.record import Failure, Record

ALLOWANCE = 0.05
"""Relative rise of the loss that headline and laws answer for."""

MOST_TASKS = 12
"""Tasks that the page draws beside their mean; the table has all; chosen by us."""

MOST_LAWS = 2
"""Measures whose laws are told in full; of more there is a summary, and the rest is folded away; chosen by us."""

_HOW = (
    "Marks are means over seeds, upright strokes their range, the dashed line the dense model under the same protocol. "
    "Point at a mark for its chain, seeds and protocol; press a series to hide it."
)

_MEAN = "Mean of the tasks"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page; parts that are empty are not shown.

    Parameters
    ----------
    name : anchor
    title, short : heading, and its word in the bar on top
    text : a sentence or two below the heading
    lines : terms with their values
    figure, caption : a figure and what its numbers are
    tables, notes : below it
    """

    name: str
    title: str
    short: str
    text: str = ""
    lines: Sequence[tuple[str, list[Cell]]] = ()
    figure: Figure | None = None
    caption: str = ""
    tables: Sequence[Table] = ()
    notes: Sequence[str] = field(default=())


def sections_of(
    records: Sequence[Record],
    runs: Sequence[Mapping[str, Any]],
    failures: Sequence[Failure],
    papers: Sequence[str],
) -> list[Section]:
    """Those that have something to show, in the order of the page.

    Parameters
    ----------
    runs, failures : as for `mariotte.report.page.build`
    papers : whose sentences are checked
    """
    losses = cuts(records, "loss", "loss")
    facts = cuts(records, "knowledge", "top1")
    heldout = cuts(records, "knowledge", "heldout_top1")
    tasks = {name: cuts(records, "tasks", name) for name in _task_metrics(records)}
    fast = {part.capitalize(): speeds(records, part) for part in ("decode", "prefill")}
    main = main_setting(losses)
    others = [cut for found in (*tasks.values(), *fast.values()) for cut in found]
    palette = _palette([*losses, *facts], others)
    laws = law_reports(records, allowance=ALLOWANCE)
    failed = provenance.failure_table(failures)
    found = [
        Section(
            name="allowance",
            title="What a rise of the loss buys",
            short="Headline",
            tables=tables.allowance_tables(records, main),
        ),
        *_claim_sections(records, papers),
        Section(
            name="run",
            title="What was run",
            short="Run",
            lines=provenance.what_was_run(records, failures),
            tables=[failed] if failed else [],
        ),
        _loss_section(losses, palette),
        _facts_section(records, facts, heldout, palette, main.model_hash if main else None),
        _tasks_section(records, tasks, palette),
        _speed_section(fast, palette),
        _recovery_section(losses, tasks, facts, palette),
        *_law_sections(laws),
        Section(
            name="numbers",
            title="All numbers",
            short="Numbers",
            tables=[t for t in (tables.cut_table(losses, facts), *tables.other_tables(records)) if t],
        ),
        Section(
            name="cost",
            title="Cost",
            short="Cost",
            tables=[t for t in (provenance.cost_table(records), provenance.run_table(runs)) if t],
        ),
        Section(
            name="protocol",
            title="Protocols and environment",
            short="Protocols",
            text="Numbers are comparable only under one protocol; those of different protocols are never pooled here.",
            tables=[t for t in (provenance.protocol_table(records), provenance.environment_table(records)) if t],
        ),
        Section(name="notes", title="Read with care", short="Notes", notes=_notes(records, failures, laws)),
    ]
    return [s for s in found if s is not None and (s.figure or s.tables or s.lines or s.notes)]


def _palette(found: Sequence[Cut], others: Sequence[Cut] = ()) -> Palette:
    """Colours of every series: those of `found` first, so that a study that measures more keeps them."""
    every = [*found, *others]
    curves = series(every)
    first = {curve.name for curve in series(found)}
    plain = {curve.name for curve in curves if curve.cuts[0].recovery is None}
    names = _series_of_chains(every)
    origin = {curve.name: _origin(curve.cuts[0], names) for curve in curves if curve.cuts[0].recovery is not None}
    recovered = {curve.name: _origin(curve.cuts[-1], names) for curve in recoveries(found)}
    return Palette([*sorted(plain & first), *sorted(plain - first)], origin | recovered)


def _series_of_chains(found: Iterable[Cut]) -> dict[str, str]:
    names: dict[str, str] = {}
    for cut in found:
        names.setdefault(cut.chain, cut.series)
    return names


def _origin(cut: Cut, names: Mapping[str, str]) -> str:
    """The series that a recovered cut belonged to before its recovery."""
    return names.get(cut.cut, cut.method or cut.series)


def _split(found: Sequence[Cut]) -> tuple[list[Series], list[Series]]:
    """Curves over the share removed without recovery, and those with it that have more than one cut."""
    curves = series(found)
    return (
        [curve for curve in curves if curve.cuts[0].recovery is None],
        [curve for curve in curves if curve.cuts[0].recovery is not None and len(curve.cuts) > 1],
    )


def _loss_section(losses: Sequence[Cut], palette: Palette) -> Section | None:
    plain, recovered = _split(losses)
    if not figures.reducing([*plain, *recovered]):
        return None
    corpora = sorted({corpus_of(cut.setting.measure) or cut.setting.measure for cut in losses})
    return Section(
        name="loss",
        title="Loss against the share removed",
        short="Loss",
        text=(
            f"Mean negative log-likelihood on {', '.join(corpora)}. The share counts all parameters of the dense "
            "model, embeddings included; zeroed ones count as removed though they are still stored."
        ),
        figure=figures.loss_figure(plain, recovered, palette),
        caption=_HOW,
    )


def _facts_section(
    records: Sequence[Record], facts: Sequence[Cut], heldout: Sequence[Cut], palette: Palette, main_hash: str | None
) -> Section | None:
    plain, recovered = _split(facts)
    views = {"Facts known": plain, "Held-out phrasings": _split(heldout)[0], "After recovery": recovered}
    views = {name: curves for name, curves in views.items() if figures.reducing(curves)}
    relations = tables.relation_tables(records, main_hash)
    if not views:
        return None
    return Section(
        name="facts",
        title="Facts known against the share removed",
        short="Facts",
        text="Share of facts whose answer the model ranks first.",
        figure=figures.facts_figure(views, palette),
        caption=_HOW,
        tables=[relations] if relations else [],
    )


def _task_metrics(records: Sequence[Record]) -> list[str]:
    """The metrics of tasks, their mean first."""
    names = own_metrics(record for record in records if kind_of(record.measure) == "tasks")
    return sorted(names, key=lambda name: name != "accuracy")


def _tasks_section(records: Sequence[Record], tasks: Mapping[str, Sequence[Cut]], palette: Palette) -> Section | None:
    names = {_MEAN if metric == "accuracy" else metric: metric for metric in tasks}
    left_out = list(names)[MOST_TASKS + 1 :]
    views: dict[tuple[str, str], Sequence[Series]] = {}
    for name in (name for name in names if name not in left_out):
        views[name, "Cut"], views[name, "After recovery"] = _split(tasks[names[name]])
    if not any(figures.reducing(curves) for curves in views.values()):
        return None
    text = "Share of multiple-choice questions answered rightly; the mean gives every task the same weight."
    if left_out:
        text += f" Left out of the figure: {len(left_out)} tasks, whose numbers are in the table."
    return Section(
        name="tasks",
        title="Accuracy against the share removed",
        short="Tasks",
        text=text,
        figure=figures.tasks_figure(views, _chances(records), names, palette),
        caption=f"{_HOW} The lower dashed line is chance.",
    )


def _chances(records: Sequence[Record]) -> dict[tuple[Setting, str], float]:
    """The accuracy of guessing by setting and metric, as the records state it; the mean's where every task has one."""
    found: dict[tuple[Setting, str], float] = {}
    done: set[tuple[str, str]] = set()
    for record in records:
        if kind_of(record.measure) != "tasks" or (record.model_hash, record.measure) in done:
            continue
        done.add((record.model_hash, record.measure))
        stated = {**cast("Mapping[str, Any]", record.protocol.get("tasks") or {}), **record.details}
        chances = {
            name: float(cast("Mapping[str, Any]", value)["chance"])
            for name, value in stated.items()
            if isinstance(value, Mapping) and isinstance(cast("Mapping[str, Any]", value).get("chance"), int | float)
        }
        setting = setting_of(record)
        found |= {(setting, name): chance for name, chance in chances.items()}
        scored = [name for name in _task_metrics([record]) if name != "accuracy"]
        if scored and all(name in chances for name in scored):
            found[setting, "accuracy"] = sum(chances[name] for name in scored) / len(scored)
    return found


def _speed_section(fast: Mapping[str, Sequence[Cut]], palette: Palette) -> Section | None:
    views = {part: series(found) for part, found in fast.items()}
    if not any(figures.reducing(curves) for curves in views.values()):
        return None
    table = tables.speed_table(fast)
    return Section(
        name="speed",
        title="Speed against the share removed",
        short="Speed",
        text="S is how many times as fast as the dense model the cut one runs, measured in turn with it: above 1 is "
        "faster. Prefill reads a prompt, decode writes one token after the other.",
        figure=figures.speed_figure(views, palette),
        caption="Marks are medians, upright strokes their 95 % intervals: one that holds 1 is inside the noise. "
        "Strokes may end beyond the frame. Point at a mark for its chain and verdict; press a series to hide it.",
        tables=[table] if table else [],
    )


def _recovery_section(
    losses: Sequence[Cut], tasks: Mapping[str, Sequence[Cut]], facts: Sequence[Cut], palette: Palette
) -> Section | None:
    accuracies = tasks.get("accuracy", [])
    views = {"Loss": recoveries(losses), "Accuracy": recoveries(accuracies), "Facts known": recoveries(facts)}
    views = {name: curves for name, curves in views.items() if curves}
    if not views:
        return None
    text = "The same cut, trained on more and more tokens: how much of the damage comes back."
    table = None
    if figures.many_recoveries(views):
        text += (
            " One line for each amount cut; choose method and training corpus. The loss is that on the test corpus of "
            "the same name, where there is one. What the other test corpora say is left out of the figure: the table "
            "below sums it up, and all numbers are in the store."
        )
        table = tables.repair_table(losses, accuracies, [*facts, *tasks.get("facts", [])])
    return Section(
        name="recovery",
        title="Recovery against tokens",
        short="Recovery",
        text=text,
        figure=figures.recovery_figure(views, palette),
        caption=_HOW,
        tables=[table] if table else [],
    )


def _law_sections(laws: Sequence[LawReport]) -> list[Section]:
    many = len(laws) > MOST_LAWS
    shown: list[Table] = [tables.law_summary(laws)] if many else []
    for law in laws:
        shown.append(tables.holdout_table(law, fold=many))
        fit = tables.fit_table(law, ALLOWANCE, fold=many)
        shown += [fit] if fit else []
    notes = list(dict.fromkeys(note for law in laws for fit in law.fits for note in fit.notes))
    return (
        [
            Section(
                name="laws",
                title="Laws, judged by what they did not see",
                short="Laws",
                text="A law earns trust by forecasting the next cuts better than naive rules do. Cuts that were "
                "recovered or quantized are not among them.",
                tables=shown,
                notes=notes,
            )
        ]
        if shown
        else []
    )


def _claim_sections(records: Sequence[Record], papers: Sequence[str]) -> list[Section]:
    """What each paper says and what the records say of it."""
    return [
        Section(
            name=f"claims-{name}",
            title=f"What {paper.title} says, and what these models say",
            short="Claims",
            text="A verdict is on these models and this text alone. Intervals are 95 % bootstrap intervals; where one "
            "allows both answers, the verdict is that the question is not settled.",
            tables=[tables.claim_table(paper.claims(records))],
        )
        for name in papers
        for paper in [cast("Paper", PAPERS.find(name)())]
    ]


def _notes(records: Sequence[Record], failures: Sequence[Failure], laws: Sequence[LawReport]) -> list[str]:
    notes: list[str] = []
    if of_testbed(records):
        notes.append(
            "The testbed is synthetic: tiny models in a made-up language, trained for this purpose. It shows how "
            "methods and laws behave, not how a real model would."
        )
    if any(record.zeroed > 0 for record in records):
        notes.append(
            "Unstructured pruning zeroes weights and keeps their place: by itself it saves neither memory nor time."
        )
    notes.append(
        f"Shares within {signed_share(ALLOWANCE, 0)} loss are read off straight lines between measured cuts, which lie "
        "above curves that bend upwards; nothing is claimed below the mildest cut or beyond the strongest."
    )
    if len({record.seed for record in records}) == 1:
        notes.append("One seed only: how much of a difference is chance cannot be told.")
    if failures:
        notes.append(f"{len(failures)} experiment{'s' * (len(failures) > 1)} failed and left no record; listed above.")
    if any(law.fits and not law.calibrated for law in laws):
        notes.append("The laws' intervals are not calibrated: too few independent series to check what they cover.")
    return notes


def of_testbed(records: Sequence[Record]) -> bool:
    """Whether some of the models are the testbed's, which are made up."""
    return any(record.model.startswith("testbed/") for record in records)

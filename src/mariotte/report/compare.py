"""The page of a comparison: what one model lost against another, in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mariotte.report.page import render, save
from mariotte.report.sections import Section
from mariotte.report.series import quantity, share, signed_share
from mariotte.report.table import MINUS, Cell, Table

BADGES = {"better": "yes", "worse": "no"}

MOST_SHOWN = 2_000
"""Facts of one list: beyond, a page is no longer a page; the JSON has them all."""

LARGE = 1e4
"""From here on numbers are whole, with commas."""

Json = Mapping[str, Any]


def build(comparison: Json) -> str:
    """A comparison as one HTML page.

    Parameters
    ----------
    comparison : what ``mariotte compare --json`` prints

    Returns
    -------
    HTML that needs nothing else
    """
    base, other = (cast(Json, comparison[side]) for side in ("base", "other"))
    rows = cast("Sequence[Json]", comparison["rows"])
    found = [
        _conditions(cast("Sequence[Json]", comparison["conditions"])),
        _measured([row for row in rows if row["measure"] != "size"]),
        _facts(cast("Mapping[str, Json]", comparison["facts"])),
        _answers(cast("Mapping[str, Mapping[str, Json]]", comparison["answers"])),
        _sizes([row for row in rows if row["measure"] == "size"]),
        _models(comparison, base, other),
    ]
    return render(
        f"{other['name']} against {base['name']}",
        [section for section in found if section is not None],
        sentences=sentences(comparison),
        eyebrow="Comparison on the same items",
        synthetic=str(base["name"]).startswith("testbed/"),
    )


def write(comparison: Json, path: str | Path) -> Path:
    """Write the page of a comparison to `path`; see `build`.

    Returns
    -------
    the path, absolute

    Raises
    ------
    MariotteError
        When the file cannot be written.
    """
    return save(build(comparison), path)


def sentences(comparison: Json) -> list[str]:
    """What to take away: whether a condition failed, then loss, facts and accuracy, and what it was for: the size."""
    rows = cast("Sequence[Json]", comparison["rows"])
    found: list[str] = []
    sizes: list[str] = []
    for row in rows:
        measure, metric = str(row["measure"]), str(row["metric"])
        on = measure.partition(":")[2].partition("(")[0] or measure
        if (measure, metric) == ("size", "params"):
            change = float(row["relative"] or 0)
            many = f"{share(abs(change), 1)} {'fewer' if change < 0 else 'more'}" if change else "as many"
            names = (str(cast(Json, comparison[side])["name"]) for side in ("other", "base"))
            sizes.append(f"{{}} has {many} parameters {'than' if change else 'as'} {{}}.".format(*names))
        elif measure.startswith("loss:") and metric == "loss" and row["relative"] is not None:
            found.append(f"The loss on {on} changes by {signed_share(row['relative'])}{_sure(row)}.")
        elif measure.startswith("knowledge:") and metric == "top1" and row["lost"] is not None:
            known = row["kept"] + row["lost"]
            found.append(
                f"Of {known:,} facts of {on} that were known, {row['lost']:,} are lost, and {row['gained']:,} others "
                f"are gained{_sure(row)}."
            )
        elif measure.startswith("tasks:") and metric == "accuracy":
            points = f"{100 * row['difference']:+.1f}".replace("-", MINUS)
            found.append(f"Accuracy on {on} changes by {points} percentage points{_sure(row)}.")
    if comparison["failed"]:
        failed = [str(one["text"]) for one in comparison["conditions"] if one["failed"]]
        found.insert(0, f"Failed: {', '.join(failed)}.")
    return found + sizes


def _sure(row: Json) -> str:
    return ", which is inside the noise" if row["verdict"] == "inside the noise" else ""


def _number(value: float, sign: str = "") -> str:
    text = f"{value:{sign},.0f}" if abs(value) >= LARGE else f"{value:{sign}.4g}" if value else "0"
    return text.replace("-", MINUS)


def _signed(value: float) -> str:
    return _number(value, "+")


def _interval(row: Json) -> str:
    return "" if row["lo"] is None or row["hi"] is None else f"{_signed(row['lo'])} … {_signed(row['hi'])}"


def _conditions(judged: Sequence[Json]) -> Section | None:
    if not judged:
        return None
    rows = tuple(
        (
            Cell(text=str(one["text"])),
            Cell(text=_signed(one["change"]) + (f"\u202f{one['unit']}" if one["unit"] else "")),
            Cell(text="fails" if one["failed"] else "passes", badge="no" if one["failed"] else "yes"),
        )
        for one in judged
    )
    return Section(
        name="conditions",
        title="What was not to happen",
        short="Conditions",
        tables=[Table(columns=("fail if", "#change", "outcome"), rows=rows)],
    )


def _measured(rows: Sequence[Json]) -> Section | None:
    if not rows:
        return None
    cells = tuple(
        (
            Cell(text=str(row["metric"]), below=str(row["measure"])),
            Cell(
                text=_signed(row["difference"]),
                below="" if row["relative"] is None else signed_share(row["relative"]),
                strong=True,
            ),
            Cell(text=str(row["verdict"]), badge=BADGES.get(str(row["verdict"]), "open") if row["verdict"] else ""),
            Cell(text=_number(row["base"])),
            Cell(text=_number(row["other"])),
            Cell(text=_interval(row), below=_of(row)),
            Cell(text="" if row["lost"] is None else f"{MINUS}{row['lost']} +{row['gained']}"),
            Cell(text="" if row["p"] is None else f"{row['p']:.2g}"),
        )
        for row in rows
    )
    # What is asked for first comes first: on a phone the others are scrolled to.
    columns = ("metric", "#difference", "verdict", "#base", "#other", "#95 % interval", "#flips", "#p")
    return Section(
        name="measures",
        title="Measured on the same items",
        short="Measures",
        text="Differences are the other model's number less the base's. Intervals are of a paired bootstrap over the "
        "items, or over the rounds in which both took turns; where answers are right or wrong, p is of McNemar's exact "
        "test on the flips, and decides what is inside the noise; of means over several tasks or relations the "
        "interval does.",
        tables=[Table(columns=columns, rows=cells)],
    )


def _of(row: Json) -> str:
    return "" if not row["items"] else f"{row['items']:,} {row['per']}{'s' * (row['items'] != 1)}"


def _facts(facts: Mapping[str, Json]) -> Section | None:
    tables: list[Table] = []
    for measure, changed in facts.items():
        for what in ("lost", "gained", "kept"):
            names = [str(name) for name in changed[what]]
            if not names:
                continue
            rest = len(names) - MOST_SHOWN
            rows = [
                (Cell(text=relation), Cell(text=", ".join(some))) for relation, some in _grouped(names[:MOST_SHOWN])
            ]
            title = f"{len(names):,} facts {what} · {measure}" + (f" (without the last {rest:,})" if rest > 0 else "")
            caption, fold = (title, "") if what == "lost" else ("", title)
            tables.append(Table(columns=("relation", "subjects"), rows=tuple(rows), caption=caption, fold=fold))
    if not tables:
        return None
    return Section(
        name="facts",
        title="Facts lost, gained and kept",
        short="Facts",
        text="A fact is known when its answer is ranked first.",
        tables=tables,
    )


def _grouped(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Ids such as ``birthplace/ada-abel`` by what is before the first slash."""
    found: dict[str, list[str]] = {}
    for name in names:
        relation, slash, subject = name.partition("/")
        found.setdefault(relation if slash else "", []).append(subject if slash else relation)
    return sorted(found.items())


def _answers(answers: Mapping[str, Mapping[str, Json]]) -> Section | None:
    rows = tuple(
        (
            Cell(text=name, below=measure),
            *(Cell(text=f"{len(changed[what]):,}") for what in ("kept", "lost", "gained")),
            Cell(text=", ".join(str(place) for place in changed["lost"]) or "none"),
        )
        for measure, tasks in answers.items()
        for name, changed in tasks.items()
    )
    if not rows:
        return None
    return Section(
        name="answers",
        title="Questions that flipped",
        short="Questions",
        text="Answered rightly by both, by the base alone, by the other alone; and the places, from 0, of those lost.",
        tables=[
            Table(columns=("task", "#kept", "#lost", "#gained", "places of those lost"), rows=rows, fold="By task")
        ],
    )


def _sizes(rows: Sequence[Json]) -> Section:
    cells = tuple(
        (
            Cell(text=str(row["metric"]).replace("_", " ")),
            Cell(text=quantity(row["base"])),
            Cell(text=quantity(row["other"])),
            Cell(text="" if row["relative"] is None else signed_share(row["relative"]), strong=True),
        )
        for row in rows
    )
    return Section(
        name="size",
        title="Size",
        short="Size",
        text="Counted from the shapes; bytes in the checkpoint's own dtype. Weights that are zero count as any other.",
        tables=[Table(columns=("", "#base", "#other", "#change"), rows=cells)],
    )


def _models(comparison: Json, base: Json, other: Json) -> Section:
    def said(side: Json) -> list[Cell]:
        steps = cast("Sequence[str]", side["steps"])
        done = " | ".join(steps) or "nothing was done to it"
        return [
            Cell(text=str(side["name"]), below=str(side["fingerprint"])),
            Cell(text=done, below=f"stored in {side['stored']}, computed in {side['dtype']} on {side['device']}"),
        ]

    return Section(
        name="models",
        title="What was compared",
        short="Models",
        lines=[("base", said(base)), ("other", said(other))],
        notes=cast("Sequence[str]", comparison["notes"]),
    )

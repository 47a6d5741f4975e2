"""Tables of how the numbers came about: what was run, what failed, what it cost, on what and by which protocol."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from mariotte.chain import print_number
from mariotte.report.series import (
    flatten,
    quantity,
    setting_of,
    span,
    tokens_text,
)
from mariotte.report.table import Cell, Table, row_of
from mariotte.store.record import Failure, Record


def what_was_run(records: Sequence[Record], failures: Sequence[Failure]) -> list[tuple[str, list[Cell]]]:
    """Models, methods with amounts, recovery, measures with corpora, seeds and counts."""
    models = {r.model: r for r in records}
    amounts: dict[str, set[float]] = defaultdict(set)
    families: dict[str, str] = {}
    for r in records:
        if r.method is not None:
            amounts[r.method] |= {r.amount} if r.amount is not None else set()
            families[r.method] = f"{r.family or ''}, {r.unit or ''}".strip(", ")
    tokens: dict[str, set[int]] = defaultdict(set)
    for r in records:
        if r.recovery is not None:
            tokens[r.recovery].add(r.recovery_tokens)
    measures = Counter(r.measure for r in records)
    experiments = {r.experiment for r in records}
    created = sorted(r.created for r in records if r.created)
    lines: list[tuple[str, list[Cell]]] = [
        (
            "Models",
            [
                Cell(text=name, below=f"{quantity(r.base_params)} parameters · {r.model_type}")
                for name, r in sorted(models.items(), key=lambda item: item[1].base_params)
            ],
        ),
        (
            "Methods",
            [
                Cell(
                    text=name,
                    below=" · ".join(
                        filter(None, (families[name], ", ".join(print_number(a) for a in sorted(values))))
                    ),
                )
                for name, values in sorted(amounts.items())
            ],
        ),
        (
            "Recovery",
            [
                Cell(text=name, below=", ".join(tokens_text(t) for t in sorted(values)) + " tokens")
                for name, values in sorted(tokens.items())
            ],
        ),
        ("Measures", [Cell(text=name, below=f"{count} records") for name, count in sorted(measures.items())]),
        ("Seeds", [Cell(text=span(r.seed for r in records))]),
        (
            "Experiments",
            [
                Cell(
                    text=f"{len(experiments):,}",
                    below=f"{len(records):,} records, {len(failures)} failure{'s' * (len(failures) != 1)}",
                )
            ],
        ),
        ("Measured", [Cell(text=_period(created))] if created else []),
    ]
    return [(term, cells) for term, cells in lines if cells]


def _period(created: Sequence[str]) -> str:
    first, last = created[0][:10], created[-1][:10]
    return first if first == last else f"{first} to {last}"


def failure_table(failures: Sequence[Failure]) -> Table | None:
    """Experiments that left no record, with the reason."""
    if not failures:
        return None
    rows = tuple(row_of(f.model, f.chain, str(f.seed), f.stage, f.error) for f in failures)
    return Table(
        columns=("Model", "Chain", "#Seed", "Stage", "Reason"), rows=rows, caption="Experiments without a record."
    )


def cost_table(records: Sequence[Record]) -> Table | None:
    """Seconds and peak bytes by stage."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.cost.items():
            values[name].append(value)
    rows: list[tuple[Cell, ...]] = []
    for name, found in values.items():
        if "byte" in name:
            rows.append(
                row_of(_stage(name), "", _bytes(statistics.median(found)), _bytes(max(found)), f"{len(found):,}")
            )
        else:
            rows.append(
                row_of(
                    _stage(name),
                    _seconds(sum(found)),
                    _seconds(statistics.median(found)),
                    _seconds(max(found)),
                    f"{len(found):,}",
                )
            )
    if not rows:
        return None
    return Table(
        columns=("Stage", "#Sum", "#Median", "#Largest", "#Records"),
        rows=tuple(rows),
        caption="As each record was charged; work that several records share may be charged to each of them.",
    )


def _stage(name: str) -> str:
    return name.removesuffix("_s").removesuffix("_seconds").replace("_", " ").replace("bytes", "memory")


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.1f} h"


def _bytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def run_table(runs: Iterable[Mapping[str, Any]]) -> Table | None:
    """What each invocation did: models loaded, steps prepared, trunks trained ... as its counters say."""
    runs = list(runs)
    counters = [cast("Mapping[str, Any]", run["counters"]) for run in runs if isinstance(run.get("counters"), Mapping)]
    names = list(dict.fromkeys(name for found in counters for name in found))
    if not names:
        return None
    rows = [
        row_of(
            str(run.get("started", ""))[:16].replace("T", " "),
            str(run.get("study", "")),
            *(_count(found.get(name)) for name in names),
        )
        for run, found in zip((run for run in runs if isinstance(run.get("counters"), Mapping)), counters, strict=True)
    ]
    heads = tuple(f"#{name.replace('_', ' ').capitalize()}" for name in names)
    return Table(
        columns=("Started, UTC", "Study", *heads),
        rows=tuple(rows),
        caption="What each run had to do: shared work is done once.",
    )


def _count(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def environment_table(records: Sequence[Record]) -> Table | None:
    """Versions and hardware; several values where records differ."""
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for name, value in flatten(record.environment).items():
            values[name][value] += 1
    if not values:
        return None
    rows = tuple(
        row_of(
            name, ", ".join(value if len(found) == 1 else f"{value} ({n} records)" for value, n in found.most_common())
        )
        for name, found in values.items()
    )
    return Table(columns=("What", "Value"), rows=rows, fold="Versions and hardware")


def protocol_table(records: Sequence[Record]) -> Table:
    """What every protocol hash on the page stands for."""
    protocols: dict[tuple[str, str], tuple[dict[str, str], set[str]]] = {}
    for record in records:
        setting = setting_of(record)
        entry = protocols.setdefault((setting.measure, setting.protocol), (flatten(record.protocol), set()))
        entry[1].add(record.model)
    rows = tuple(
        row_of(
            protocol,
            Cell(text=measure, below=", ".join(sorted(models))),
            "; ".join(
                f"{name} {value[:12] + '…' if len(value) >= 40 and ' ' not in value else value}"
                for name, value in values.items()
            ),
        )
        for (measure, protocol), (values, models) in sorted(protocols.items())
    )
    return Table(columns=("Protocol", "Measure and models", "Settings"), rows=rows, fold="Protocols")

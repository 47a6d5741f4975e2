"""Points from our own records and from tables of other people's measurements.

A table of published numbers has one row a number, with at least the columns model, method, ratio, metric, base_value
and value; the optional ones are source, family, ratio_kind, recovery_tokens, stderr, bits, chance, protocol, params_b.
A table exported from a store has a record's fields besides, its chain among them, and gives the points of that store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from mariotte import chain
from mariotte.errors import FitError, unknown
from mariotte.laws.base import Point, metric_kind
from mariotte.laws.names import chance_of, family_of
from mariotte.store.tables import REQUIRED, SUFFIXES

if TYPE_CHECKING:
    from pandas import DataFrame

    from mariotte.store.record import Record


class NoPointsError(FitError):
    """A metric that no compressed model has."""


Covariate = Literal["removed", "ratio", "amount", "obtained", "sparsity"]

_RATIO_KIND: Mapping[str, str] = {
    "removed": "parameters removed or zeroed ÷ dense parameters",
    "ratio": "parameters removed ÷ dense parameters",
    "amount": "amount asked, in {unit}",
    "obtained": "amount obtained, in {unit}",
    "sparsity": "zeros ÷ weights in the scope of the step",
}

# "(= 6.51% of all parameters)" converts the ratio of that row; the kind is what stands before it.
_CONVERSION = re.compile(r"\s*\(=.*\)$")

# "log_ppl" and "ln perplexity" are logarithms already; "logiqa_ppl" is not.
_LOGARITHM = re.compile(r"(?<![a-z])(log|ln)(?=ppl|perplexity|[^a-z]|$)")

_EXPORTED = ("measure", "protocol", "unit", "family", "recovery_tokens", "base_params")
"""Columns that a table with a chain has besides `REQUIRED`, as `records_table` writes them."""


_DENSE = "of the dense model"
_RECOVERED = "without compression, only recovered"
_NO_RECOVERY = ("", "0", "0.0")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read.

    Parameters
    ----------
    points : of one metric
    metric : its name
    skipped : reason to number of rows or records left out for it
    """

    points: tuple[Point, ...]
    metric: str
    skipped: Mapping[str, int]


def read(source: str, *, metric: str | None = None, covariate: str | None = None) -> Reading:
    """The points of one metric in a table (CSV, Parquet) or a store (path or URL).

    Parameters
    ----------
    source : a file name ending in .csv, .parquet or .json, or what `mariotte.store.open_store` opens
    metric : None takes ``loss`` where there is one, or the only metric
    covariate : what the ratio of a record is, see `from_records`; a table states its own

    Raises
    ------
    FitError
        When the metric or the covariate does not exist, or no points are left.
    StoreError
        When the table or the store cannot be read.
    """
    if source.lower().endswith(SUFFIXES):
        from mariotte.store.tables import read_table

        return from_table(read_table(source), metric=metric, covariate=covariate)
    from mariotte.store.sql import open_store

    with open_store(source) as store:
        return from_records(store.records(), metric=metric, covariate=covariate or "removed")


def read_all(source: str) -> list[Point]:
    """The points of every metric in a table or a store; see `read`.

    Raises
    ------
    FitError
        When a row is not what its table says.
    StoreError
        When the table or the store cannot be read.
    """
    found: list[Point] = []
    if source.lower().endswith(SUFFIXES):
        from mariotte.store.tables import read_table

        table = read_table(source)
        cells = cast("list[object]", table["metric"].tolist())
        names = sorted({cell for cell in cells if isinstance(cell, str) and cell})
        for name in names:
            with contextlib.suppress(NoPointsError):  # of one metric of several that is no reason to refuse the others
                found += from_table(table, metric=name).points
        return found
    from mariotte.store.sql import open_store

    with open_store(source) as store:
        records = list(store.records())
    errors = {f"{name}_se" for r in records for name in r.metrics}
    for name in sorted({name for r in records for name in r.metrics} - errors):
        with contextlib.suppress(NoPointsError):
            found += from_records(records, metric=name).points
    return found


def from_records(records: Iterable[Record], *, metric: str | None = None, covariate: str = "removed") -> Reading:
    """The points of one metric among records.

    Parameters
    ----------
    records : of any measures; those of the dense model are left out, as they are the base of the others
    metric : None takes ``loss`` where there is one, or the only metric
    covariate : ``removed``: parameters removed or zeroed ÷ dense ones; ``ratio``: removed alone; ``amount``,
        ``obtained``: in the step's own unit; ``sparsity``: zeros ÷ weights in scope

    Raises
    ------
    FitError
        When the metric or the covariate does not exist, or no points are left.
    """
    _check_covariate(covariate)
    records = list(records)
    # "loss_se" is the standard error of "loss", no metric of its own.
    errors = {f"{name}_se" for r in records for name in r.metrics}
    metric = _choose_metric({name for r in records for name in r.metrics} - errors, metric)
    points: list[Point] = []
    skipped: dict[str, int] = {}
    for record in records:
        if metric not in record.metrics:
            continue
        if record.method is None:
            _count(skipped, _DENSE if record.chain == "dense" else _RECOVERED)
        elif metric not in record.base:
            _count(skipped, "no dense value")
        elif (ratio := getattr(record, covariate)) is None:
            _count(skipped, f"no {covariate}")
        else:
            points.append(
                _own_point(
                    vars(record),
                    metric=metric,
                    value=record.metrics[metric],
                    base=record.base[metric],
                    se=record.metrics.get(f"{metric}_se"),
                    ratio=float(ratio),
                    covariate=covariate,
                )
            )
    return _reading(points, metric, skipped)


def from_table(table: DataFrame, *, metric: str | None = None, covariate: str | None = None) -> Reading:
    """The points of one metric in a table: of published numbers, or exported from a store (it has a column chain).

    Perplexities become losses by their logarithm. A family or a chance that a published table does not say is that of
    the method's or the task's name, where these are known. Rows without a dense value are left out, and so are
    quantised ones (bits below 16), which no law of the ratio describes.

    Parameters
    ----------
    table : see the head of this file
    metric : None takes ``loss`` where there is one, or the only metric
    covariate : of an exported table as in `from_records`; published ones state their own ratio

    Raises
    ------
    FitError
        When a column is missing, the metric does not exist, or no points are left.
    """
    exported = "chain" in table.columns
    if missing := [c for c in (*REQUIRED, *(_EXPORTED if exported else ())) if c not in table.columns]:
        raise FitError(
            f"a table needs the columns {', '.join(REQUIRED)}; {', '.join(missing)} is missing: rename or add it"
            + (" (a column 'chain' marks an exported store, which has it)" if exported else "")
        )
    if covariate is not None and not exported:
        raise FitError(f"a table of published numbers states its own ratio, got covariate {covariate!r}: leave it out")
    covariate = covariate or ("removed" if exported else "ratio")
    _check_covariate(covariate)
    # Empty cells are None, NaN or pandas' NA, by column: make them None, all of them.
    plain = table.astype(object).where(table.notna(), None)
    rows = cast("list[dict[str, Any]]", plain.to_dict(orient="records"))
    metric = _choose_metric({_text(row["metric"]) for row in rows} - {""}, metric)
    points: list[Point] = []
    skipped: dict[str, int] = {}
    for row in rows:
        if not _text(row["metric"]):
            _count(skipped, "without the name of a metric")
        if _text(row["metric"]) != metric:
            continue
        bits, ratio = _number(row.get("bits")), _number(row.get(covariate))
        base, value = _number(row["base_value"]), _number(row["value"])
        # A ratio of 0 is an own record's fact (quantisation removes nothing) but a published table's dense row.
        if not _text(row["method"]) if exported else ratio == 0:
            dense = row["chain"] == "dense" if exported else _text(row.get("recovery_tokens")) in _NO_RECOVERY
            _count(skipped, _DENSE if dense else _RECOVERED)
        elif base is None or value is None:
            _count(skipped, "no dense value" if base is None else "no value")
        elif ratio is None:
            _count(skipped, f"no {covariate}")
        elif exported:
            own = _exported_fields(row)
            se = _number(row.get("stderr"))
            point = _own_point(own, metric=metric, value=value, base=base, se=se, ratio=ratio, covariate=covariate)
            points.append(point)
        elif bits is not None and bits < 16:
            _count(skipped, "quantised")
        else:
            points.append(row_point(row, metric=metric, base=base, value=value, ratio=ratio, bits=bits))
    return _reading(points, metric, skipped)


def where(points: Iterable[Point], conditions: Mapping[str, str]) -> list[Point]:
    """Points whose fields equal the given texts, or begin with them where none is equal.

    Raises
    ------
    FitError
        When points have no such field, or none is left.
    """
    kept = list(points)
    known = sorted(f.name for f in dataclasses.fields(Point))
    for name, wanted in conditions.items():
        if name not in known:
            raise FitError(str(unknown("field of a point", name, known)))
        texts = {p: _text(getattr(p, name)) for p in kept}
        found = [p for p in kept if texts[p] == wanted] or [p for p in kept if texts[p].startswith(wanted)]
        if not found:
            there = sorted(set(texts.values()))
            raise FitError(f"no point has {name} {wanted!r}: there is {', '.join(map(repr, there[:6]))}")
        kept = found
    return kept


def is_perplexity(metric: str) -> bool:
    """Whether a metric is a perplexity, which enters as its logarithm; not one whose name says that it is one."""
    name = metric.lower()
    return any(word in name for word in ("ppl", "perplexity")) and not _LOGARITHM.search(name)


def _exported_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's fields as a record has them; texts that a table's file made of them are read back."""
    try:
        protocol = json.loads(row["protocol"])
        numbers = {name: float(row[name]) for name in ("recovery_tokens", "base_params")}
    except (TypeError, ValueError, RecursionError) as error:
        protocol, numbers, why = None, {}, str(error)
    else:
        why = "its protocol is no JSON object"
    if not isinstance(protocol, dict):
        raise FitError(
            f"the row of chain {_text(row['chain'])!r} and metric {_text(row['metric'])!r} is not as 'mariotte export' "
            f"wrote it ({why}): export the table again"
        )
    texts = {name: _text(row[name]) for name in ("model", "chain", "measure", "unit", "family")}
    return {**texts, **numbers, "protocol": cast("dict[str, Any]", protocol)}


def _own_point(
    fields: Mapping[str, Any],
    *,
    metric: str,
    value: float,
    base: float,
    se: float | None,
    ratio: float,
    covariate: str,
) -> Point:
    """The point of a record, from its fields by name."""
    from mariotte.store.record import digest

    links = chain.parse(fields["chain"]).links
    if not links:
        raise FitError(f"a record of {fields['model']!r} has a method and the chain of the dense model: correct it")
    first, *rest = links
    return Point(
        value=_logarithm(metric, value),
        base=_logarithm(metric, base),
        ratio=ratio,
        ratio_kind=_RATIO_KIND[covariate].format(unit=fields["unit"]),
        metric=metric,
        # The measure for people, the digest for what the measure's text leaves unsaid (corpus and tokenizer hashes).
        protocol=f"{fields['measure']}#{digest(dict(fields['protocol']))[:8]}",
        tokens=float(fields["recovery_tokens"]),
        params=float(fields["base_params"]),
        se=se,
        chance=_chance(fields["protocol"], metric),
        model=fields["model"],
        method=str(dataclasses.replace(first, amount=None)),
        family=_text(fields["family"]) or None,
        recovery=" | ".join(map(str, rest)),
    )


def _chance(protocol: Mapping[str, Any], metric: str) -> float | None:
    """What a guesser scores, as the protocol says: ``chance_top1`` is that of ``top1`` and of ``heldout_top1``."""
    for name, value in protocol.items():
        scored = name.removeprefix("chance_")
        if scored != name and (metric == scored or metric.endswith(f"_{scored}")):
            return _number(value)
    return None


def row_point(
    row: Mapping[str, Any], *, metric: str, base: float, value: float, ratio: float, bits: float | None
) -> Point:
    """The point of one row of a table of published numbers; perplexities become losses by their logarithm.

    Where the row does not say them, the family is that of the method's name and chance that of the task's.
    """
    recovery = _text(row.get("recovery_tokens"))
    tokens = _number(row.get("recovery_tokens"))
    se = _number(row.get("stderr"))
    params_b = _number(row.get("params_b"))
    return Point(
        value=_logarithm(metric, value),
        base=_logarithm(metric, base),
        ratio=ratio,
        ratio_kind=_CONVERSION.sub("", _text(row.get("ratio_kind"))),
        metric=metric,
        protocol=_text(row.get("protocol")),
        # "50k samples" and the like cannot be a number of tokens: the text keeps such series apart.
        tokens=tokens if tokens is not None else 0.0,
        params=None if params_b is None else params_b * 1e9,
        bits=bits,
        se=None if se is None else (se / value if is_perplexity(metric) else se),
        chance=chance_of(metric) if (chance := _number(row.get("chance"))) is None else chance,
        cluster=_text(row.get("cluster")) or None,
        model=_text(row["model"]),
        method=_text(row["method"]),
        family=_text(row.get("family")) or family_of(_text(row["method"])),
        recovery="" if tokens == 0 else recovery,
        source=_text(row.get("source")),
    )


def _reading(points: list[Point], metric: str, skipped: Mapping[str, int]) -> Reading:
    if not points:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "nothing has it"
        raise NoPointsError(f"no compressed model with {metric!r} to fit ({why}): run a study or choose another metric")
    return Reading(points=tuple(points), metric=metric, skipped=dict(skipped))


def _check_covariate(covariate: str) -> None:
    if covariate not in get_args(Covariate):
        raise FitError(str(unknown("covariate", covariate, get_args(Covariate))))


def _choose_metric(known: set[str], metric: str | None) -> str:
    if not known:
        raise FitError("there is nothing to fit, the table or store is empty: run a study or give another file")
    if metric is not None:
        if metric not in known:
            raise FitError(str(unknown("metric", metric, known)))
        return metric
    if "loss" in known:
        return "loss"
    if len(known) == 1:
        return next(iter(known))
    raise FitError(f"there are {len(known)} metrics ({', '.join(sorted(known))}): choose one with --metric")


def _logarithm(metric: str, value: float) -> float:
    if not is_perplexity(metric):
        return value
    if value <= 0:
        raise FitError(f"a perplexity must be above 0, got {value:g} for {metric!r}: correct the table")
    assert metric_kind(metric) == "loss", metric
    return math.log(value)


def _number(value: object) -> float | None:
    """A cell as a finite number, None when it is empty or a text."""
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(cast("Any", value))
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _text(value: object) -> str:
    """A cell as text; an empty cell is the empty text."""
    return "" if value is None else str(value)


def _count(skipped: dict[str, int], reason: str) -> None:
    skipped[reason] = skipped.get(reason, 0) + 1

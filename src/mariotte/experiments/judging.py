"""How two models beside each other are judged: rows with intervals, flips and verdicts, and conditions on them.

It knows what was measured of both, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mariotte.data.lama import WHOLE
from mariotte.errors import ChainError
from mariotte.evaluate import conditions, paired
from mariotte.evaluate.base import Measure, Measurement
from mariotte.evaluate.conditions import Condition
from mariotte.evaluate.facts import Told
from mariotte.experiments import identity

Array = NDArray[np.float64]

SIZE = "size"
"""What the metrics of a model's size are said to be measured by."""

SIZES = ("params", "params_non_embedding", "bytes", "flops_per_token")
"""What they are."""

FOLLOWED: Mapping[str, tuple[str, float]] = {"kl": ("loss", 0.0), "token_agreement": ("score", 1.0)}
"""What is found beside the loss of two causal models: the kind of each, and what it is of a model with itself."""

NOISE = 0.05
"""Probability below which flipped answers are not put down to chance."""

ROUNDING = 1e-3
"""Relative difference up to which a metric and what its items give are the same number, rounded for storing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of both models.

    Parameters
    ----------
    measure, metric : such as ``knowledge:testbed`` and ``top1``
    kind : loss, score, speed, size: what is better
    base, other : its values
    difference : other - base
    relative : difference over the base's absolute value; None where that is 0
    lo, hi : 95 % interval of the difference; None for a metric without items
    items, per : how many items there were, and what one is
    kept, lost, gained, p : answers that stayed right, that flipped, and McNemar's exact p; None where nothing is
        answered right or wrong
    pooled : p is of all items together, though the metric is a mean over tasks or relations; the interval decides then
    verdict : better, worse, same, ``inside the noise``; empty where that cannot be told
    """

    measure: str
    metric: str
    kind: str
    base: float
    other: float
    difference: float
    relative: float | None
    lo: float | None = None
    hi: float | None = None
    items: int | None = None
    per: str = ""
    kept: int | None = None
    lost: int | None = None
    gained: int | None = None
    p: float | None = None
    pooled: bool = False
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Facts by their ids, or questions by their places from 0, that both know, and that only one does."""

    kept: tuple[str | int, ...]
    lost: tuple[str | int, ...]
    gained: tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A condition with the change that was found, in its unit, and whether it failed the comparison."""

    text: str
    measure: str
    metric: str
    change: float
    unit: str
    failed: bool


def check_prefix(condition: Condition, asked: Mapping[str, Measure]) -> None:
    """Refuse what names no measure before any model is loaded."""
    known = {SIZE, *(name for text, one in asked.items() for name in (text, identity.measure_name(one)))}
    prefix, dot, _ = condition.metric.rpartition(".")
    if dot and prefix not in known:
        raise ChainError(
            f"{condition.text!r} asks for a metric of {prefix!r}, which is not measured: measured are "
            f"{', '.join(sorted(known))}"
        )


@dataclass(frozen=True)
class _Metric:
    """A metric that conditions may be on, as far as it is known: its kind, and its value of the base."""

    kind: str
    base: float | None = None


def check_conditions(wanted: Sequence[Condition], asked: Mapping[str, Measure], *, causal: bool = True) -> None:
    """Refuse, before anything is measured, conditions that cannot be judged.

    A condition on what a measure does not say beforehand is left for later.
    """
    known: dict[tuple[str, str], _Metric] = {(SIZE, name): _Metric("size") for name in SIZES}
    open_ = False
    for text, one in asked.items():
        finds = one.finds
        open_ = open_ or finds is None
        kinds = one.metrics if finds is None else finds
        known |= {(text, name): _Metric(kind) for name, kind in kinds.items()}
        known |= _followed_metrics(text, one, causal=causal)
    for condition in wanted:
        if not open_ or any(condition.metric in conditions.names_of(*names) for names in known):
            _check_unit(condition, known)


def check_found(
    wanted: Sequence[Condition],
    asked: Mapping[str, Measure],
    befores: Mapping[str, Measurement],
    sizes: Sequence[Row],
    *,
    causal: bool,
) -> None:
    """Refuse conditions that cannot be judged now that the base is measured."""
    known = {(row.measure, row.metric): _Metric(row.kind, row.base) for row in sizes}
    for text, before in befores.items():
        for name, value in before.metrics.items():
            if not name.endswith("_se"):
                known[text, name] = _Metric(_kind(name, asked[text]), float(value))
        known |= _followed_metrics(text, asked[text], causal=causal)
    for condition in wanted:
        _check_unit(condition, known)


def _followed_metrics(text: str, measure: Measure, *, causal: bool) -> dict[tuple[str, str], _Metric]:
    if not (causal and identity.measure_name(measure) == "loss"):
        return {}
    return {(text, name): _Metric(kind, itself) for name, (kind, itself) in FOLLOWED.items()}


def _check_unit(condition: Condition, known: Mapping[tuple[str, str], _Metric]) -> None:
    place = [*known][conditions.find(condition, known)]
    metric, found = place[1], known[place]
    if condition.unit == "pp" and found.kind != "score":
        raise ChainError(
            f"{condition.text!r} counts in percentage points, and {metric} is no share: write % or nothing"
        )
    if condition.unit == "%" and found.base == 0:
        unit = "pp for percentage points" if found.kind == "score" else "nothing"
        raise ChainError(
            f"{condition.text!r} counts in percent of the base's {metric}, which is 0, and of 0 there are none: write "
            f"{unit} after the number"
        )


def row_of(measure: str, metric: str, kind: str, base: float, other: float, **more: Any) -> Row:
    """One metric of both models, with its verdict."""
    difference = other - base
    relative = difference / abs(base) if base else None
    row = Row(
        measure=measure,
        metric=metric,
        kind=kind,
        base=base,
        other=other,
        difference=difference,
        relative=relative,
        **more,
    )
    return replace(row, verdict=_verdict(row))


def _verdict(row: Row) -> str:
    known = row.lo is not None and row.hi is not None
    if row.kind not in ("loss", "score", "speed") or not (known or row.p is not None):
        return ""
    if row.difference == 0 and (row.lo or 0) == (row.hi or 0) == 0:
        return "same"
    if row.pooled and not known:  # all answers together may be a sign of nothing, but not of the mean's direction
        return "inside the noise" if (row.p or 0) >= NOISE else ""
    by_interval = row.p is None or row.pooled
    chance = (row.lo or 0) <= 0 <= (row.hi or 0) if by_interval else (row.p or 0) >= NOISE
    if chance:
        return "inside the noise"
    return "worse" if (row.difference > 0) == (row.kind == "loss") else "better"


@dataclass(frozen=True)
class _Items:
    """What both models made of the same items."""

    base: Array
    other: Array
    per: str
    weights: Array | None = None
    strata: NDArray[np.int64] | None = None
    shares: tuple[float, ...] | None = None
    answers: bool = False


def measured(
    text: str,
    measure: Measure,
    before: Measurement,
    after: Measurement,
    told: tuple[Sequence[Told], Sequence[Told]] | None = None,
) -> list[Row]:
    """Every metric that both have; standard errors give way to the intervals of the differences."""
    known = {**_items(before, after), **(_ranked(before, *told) if told else {})}
    found: list[Row] = []
    for metric in (name for name in before.metrics if name in after.metrics and not name.endswith("_se")):
        a, b = float(before.metrics[metric]), float(after.metrics[metric])
        kind = _kind(metric, measure)
        items = known.get(metric)
        more = _interval_of_rounds(metric, after) if items is None else _paired(items, a, b)
        found.append(row_of(text, metric, kind, a, b, **more))
    return found


def _kind(metric: str, measure: Measure) -> str:
    """The kind of a metric; of one that a measure does not declare that of all which it does, where they are of one."""
    if metric in measure.metrics:
        return measure.metrics[metric]
    one: set[str] = {*measure.metrics.values()}
    return one.pop() if len(one) == 1 else "speed" if metric.startswith("speedup") else ""


def _paired(items: _Items, base: float, other: float) -> dict[str, Any]:
    """Flips of a metric's items, and its interval where it is what they make up: ties may count in part elsewhere."""
    found = paired.bootstrap(items.base, items.other, items.weights, items.strata, items.shares)
    more: dict[str, Any] = {}
    if math.isclose(found.base, base, rel_tol=ROUNDING, abs_tol=ROUNDING) and math.isclose(
        found.other, other, rel_tol=ROUNDING, abs_tol=ROUNDING
    ):
        more = {"lo": found.lo, "hi": found.hi, "items": found.items, "per": items.per}
    if items.answers:
        flips = paired.flips(items.base > 0, items.other > 0)
        pooled = items.strata is not None and len(np.unique(items.strata)) > 1
        more |= {"kept": len(flips.kept), "lost": len(flips.lost), "gained": len(flips.gained), "p": flips.p}
        more |= {"pooled": pooled}
    return more


def _interval_of_rounds(metric: str, after: Measurement) -> dict[str, Any]:
    """The interval that a measure found itself by taking turns, as speed does."""
    part = metric.removeprefix("speedup_")
    found = after.details.get(part) if part != metric else None
    if not isinstance(found, Mapping) or "interval" not in found:
        return {}
    lo, hi = (float(end) - 1 for end in cast("Sequence[float]", found["interval"]))
    more: dict[str, Any] = {"lo": lo, "hi": hi} if math.isfinite(lo) and math.isfinite(hi) else {}
    return {**more, "items": after.details.get("rounds"), "per": "round"}


def _items(before: Measurement, after: Measurement) -> dict[str, _Items]:
    """Per-item values by metric, from what the measures keep of them."""
    found: dict[str, _Items] = {}
    documents = before.details.get("documents"), after.details.get("documents")
    if all(isinstance(one, Mapping) and {"nll", "tokens", "bytes"} <= {*one} for one in documents):
        a, b = (cast("Mapping[str, Sequence[float]]", one) for one in documents)
        nll = np.asarray(a["nll"], np.float64), np.asarray(b["nll"], np.float64)
        for metric, weights in (("loss", a["tokens"]), ("bits_per_byte", a["bytes"])):
            weights_N = np.asarray(weights, np.float64) * (math.log(2) if metric == "bits_per_byte" else 1)
            kept_N = weights_N > 0
            if kept_N.any():
                found[metric] = _Items(nll[0][kept_N], nll[1][kept_N], "document", weights_N[kept_N])
    if (facts := _known(before, after)) is not None:
        known, now, count = facts
        parts = _relations(before, count)
        columns = [_marks(known, now, prefix, n) for prefix, n, _ in parts]
        found["top1"] = _Items(
            np.concatenate([a_N for a_N, _ in columns]),
            np.concatenate([b_N for _, b_N in columns]),
            "fact",
            strata=np.repeat(np.arange(len(parts)), [n for _, n, _ in parts]),
            shares=tuple(share for *_, share in parts),
            answers=True,
        )
    tasks = _right(before, after)
    for name, (a_N, b_N) in tasks.items():
        found[name] = _Items(a_N, b_N, "question", answers=True)
    if tasks and "accuracy" in before.metrics:
        strata = np.concatenate([np.full(len(a_N), place) for place, (a_N, _) in enumerate(tasks.values())])
        found["accuracy"] = _Items(
            np.concatenate([a_N for a_N, _ in tasks.values()]),
            np.concatenate([b_N for _, b_N in tasks.values()]),
            "question",
            strata=strata,
            answers=True,
        )
    return found


def _known(before: Measurement, after: Measurement) -> tuple[set[str], set[str], int] | None:
    """Facts that each knows, and how many were asked."""
    if not ("known" in before.details and "lost" in after.details and "n_facts" in before.protocol):
        return None
    known = {str(one) for one in before.details["known"]}
    now = known - {str(one) for one in after.details["lost"]} | {str(one) for one in after.details["gained"]}
    return known, now, int(before.protocol["n_facts"])


def _by_rank(ranks_N: Array) -> dict[str, Array]:
    """What facts count in each metric that is a mean of something of their answers' ranks."""
    tops = {f"top{k}": (ranks_N <= k).astype(np.float64) for k in (1, 5, 10)}
    return {**tops, "mrr": 1 / ranks_N}


def _ranked(before: Measurement, base: Sequence[Told], other: Sequence[Told]) -> dict[str, _Items]:
    """Facts as items of the metrics that are means of something of their ranks, in both of the testbed's wordings.

    Where ties count in part, ranks do not make up the metric, which then has no interval.
    """
    found: dict[str, _Items] = {}
    for wording, prefix in (("main", ""), ("heldout", "heldout_")):
        asked = [pair for pair in zip(base, other, strict=True) if pair[0].wording == wording]
        if not asked:
            continue
        parts = _relations(before, len(asked))
        strata: dict[str, int] = {relation.removesuffix("/"): i for i, (relation, *_) in enumerate(parts)}
        strata_N = np.array([0 if len(parts) == 1 else strata[one.relation] for one, _ in asked], np.int64)
        a, b = (_by_rank(np.array([pair[side].rank for pair in asked], np.float64)) for side in (0, 1))
        for metric in a:
            found[prefix + metric] = _Items(
                a[metric],
                b[metric],
                "fact",
                strata=strata_N,
                shares=tuple(share for *_, share in parts),
                answers=metric == "top1",
            )
    return found


def _marks(known: set[str], now: set[str], prefix: str, count: int) -> tuple[Array, Array]:
    """1 for each fact of a relation that is known and 0 for each that is not, before and now."""
    every = sorted(one for one in known | now if one.startswith(prefix))
    rest = np.zeros(count - len(every))
    a_N, b_N = (np.concatenate(([one in of for one in every], rest)).astype(np.float64) for of in (known, now))
    return a_N, b_N


def _relations(before: Measurement, count: int) -> list[tuple[str, int, float]]:
    """What facts are averaged over: how ids begin, how many there are, and what they count in the mean.

    LAMA averages over the relations of a subset, or over its facts where it is sentences, and then over subsets.
    """
    relations, subsets = (cast("Mapping[str, Any]", before.details.get(name, {})) for name in ("relations", "subsets"))
    if not subsets:
        return [("", count, 1.0)]
    of = {label: label.partition("/")[0] for label in relations}
    found: list[tuple[str, int, float]] = []
    for label, part in relations.items():
        members = [one for one in relations if of[one] == of[label]]
        within = part["n"] / sum(relations[one]["n"] for one in members) if of[label] in WHOLE else 1 / len(members)
        found.append((f"{label}/", int(part["n"]), within / len(subsets)))
    return found


def _right(before: Measurement, after: Measurement) -> dict[str, tuple[Array, Array]]:
    """Of each task which questions each model answers rightly."""
    found: dict[str, tuple[Array, Array]] = {}
    for name, one in before.details.items():
        two = after.details.get(name)
        if not (isinstance(one, Mapping) and isinstance(two, Mapping) and "correct" in one and "correct" in two):
            continue
        a_N, b_N = (
            np.asarray([mark == "1" for mark in str(part["correct"])], np.float64)
            for part in (cast("Mapping[str, Any]", one), cast("Mapping[str, Any]", two))
        )
        if len(a_N) == len(b_N) > 0:
            found[name] = (a_N, b_N)
    return found


def changed_facts(before: Measurement, after: Measurement) -> Changed | None:
    """Facts kept, lost and gained; None of a measure that asks for none."""
    found = _known(before, after)
    if found is None:
        return None
    known, now, _ = found
    return Changed(kept=tuple(sorted(known & now)), lost=tuple(sorted(known - now)), gained=tuple(sorted(now - known)))


def changed_answers(before: Measurement, after: Measurement) -> dict[str, Changed]:
    """Questions kept, lost and gained, by task."""
    found: dict[str, Changed] = {}
    for name, (a_N, b_N) in _right(before, after).items():
        flips = paired.flips(a_N > 0, b_N > 0)
        found[name] = Changed(kept=flips.kept, lost=flips.lost, gained=flips.gained)
    return found


def judge(condition: Condition, rows: Sequence[Row]) -> Judged:
    """Whether a condition holds of what was found."""
    row = rows[conditions.find(condition, [(one.measure, one.metric) for one in rows])]
    # Of speed, both numbers are found anew side by side; the others are those that were checked.
    _check_unit(condition, {(row.measure, row.metric): _Metric(row.kind, row.base)})
    return Judged(
        text=condition.text,
        measure=row.measure,
        metric=row.metric,
        change=condition.change(row.base, row.other),
        unit=condition.unit,
        failed=condition.holds(row.base, row.other),
    )

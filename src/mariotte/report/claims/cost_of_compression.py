"""The Cost of Compression: Parametric Knowledge (arXiv 2312.00960): what it says, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.report.claim import Claim, Paper, Verdict, grouped, interval, missing
from mariotte.store.record import Record

__all__ = ["CostOfCompression"]

_QUANTIZED = "quantization"
_LEAST = 0.05
"""Share of the facts that a dense model has to know, for a share of them to be lost; chosen by us."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What one chain without recovery left of a model's knowledge under one measure, mean over seeds.

    Parameters
    ----------
    model, measure : what is asked, and what for
    steps : name, scope and amount of each step, in order
    quantized : whether each step quantizes
    rows : whether the first step takes whole rows of a matrix
    zeroed : zeros ÷ dense parameters
    lost : share of the dense model's top-1 that is gone; negative where more is known
    """

    model: str
    measure: str
    steps: tuple[tuple[str, str, float], ...]
    quantized: tuple[bool, ...]
    rows: bool
    zeroed: float
    lost: float

    @property
    def subject(self) -> str:
        """What cuts have to share to be compared."""
        return f"{self.model} {self.measure}"

    @property
    def scope(self) -> str:
        """Of the only step."""
        return self.steps[0][1]

    @property
    def amount(self) -> float:
        """Of the first step."""
        return self.steps[0][2]


class CostOfCompression(Paper):
    """The paper's sentences, of the share of facts that is lost: (dense top-1 - top-1) ÷ dense top-1.

    Notes
    -----
    Amounts are nominal, shares of the weights in a step's scope. Intervals are 95 % bootstrap intervals over models.
    Models that know less than 5 % of the facts have nothing to lose and are left out.

    References
    ----------
    [namburi2023cost]_.
    """

    title: ClassVar[str] = "The Cost of Compression"
    reference: ClassVar[str] = "namburi2023cost"

    @override
    def claims(self, records: Sequence[Record]) -> list[Claim]:
        found = cuts(records)
        pruned = [cut for cut in found if len(cut.steps) == 1 and not cut.quantized[0] and cut.scope != "head"]
        return [
            _together(pruned),
            _past_half(pruned),
            _milder(pruned, "Pruning attention alone costs fewer facts than pruning the feed-forward layers alone."),
            _milder(
                [cut for cut in found if len(cut.steps) == 1 and cut.quantized[0]],
                "Quantizing attention alone costs fewer facts than quantizing the feed-forward layers alone.",
            ),
            _holds_facts(pruned),
            _adds(found),
            _final_layer(found),
        ]


def cuts(records: Sequence[Record]) -> list[Cut]:
    """What every chain without recovery left of the knowledge of every model."""
    by: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        known = record.base.get("top1", 0.0)
        if record.measure.startswith("knowledge") and record.recovery is None and record.steps and known >= _LEAST:
            by.setdefault((record.model, record.measure, record.chain), []).append(record)
    found: list[Cut] = []
    for (model, measure, _), seeds in by.items():
        steps = seeds[0].steps
        found.append(
            Cut(
                model=model,
                measure=measure,
                steps=tuple((step["name"], step["scope"], float(step["amount"])) for step in steps),
                quantized=tuple(step["family"] == _QUANTIZED for step in steps),
                rows=steps[0].get("facts", {}).get("by") == "row",
                zeroed=fmean(record.zeroed for record in seeds),
                lost=fmean(1 - record.metrics["top1"] / record.base["top1"] for record in seeds),
            )
        )
    return found


def _by_scope(found: Sequence[Cut]) -> list[tuple[str, Mapping[str, Cut]]]:
    """Cuts that differ in scope alone, side by side, with the model that they are of."""
    by: dict[tuple[str, str, float], dict[str, Cut]] = {}
    for cut in found:
        by.setdefault((cut.subject, cut.steps[0][0], cut.amount), {})[cut.scope] = cut
    return [(next(iter(scopes.values())).model, scopes) for scopes in by.values()]


def _mean(some: Sequence[tuple[str, float]]) -> float:
    return fmean(value for _, value in some)


def _stated(values: Sequence[tuple[str, float]]) -> tuple[float, float, float, int]:
    """Mean, interval over models, and their number."""
    clusters = list(grouped(values, lambda pair: pair[0]).values())
    low, high = interval(clusters, _mean)
    return _mean(values), low, high, len(clusters)


def _sign(low: float, high: float) -> Verdict:
    """Whether an interval lies above zero."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "not settled"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _difference(
    sentence: str,
    pairs: Sequence[tuple[str, float]],
    said: Callable[[str, str, str], str],
    what: str,
    verdict: Callable[[float, float], Verdict] = _sign,
) -> Claim:
    if len({model for model, _ in pairs}) < 2:
        return missing(sentence, what)
    mean, low, high, models = _stated(pairs)
    text = said(_points(mean), _points(low), _points(high))
    return Claim(
        sentence=sentence,
        statistic=f"{text}, {len(pairs)} comparisons on {models} models",
        verdict=verdict(low, high),
    )


def _together(pruned: Sequence[Cut]) -> Claim:
    sentence = "At the same share of weights, pruning all modules together costs the most facts."
    pairs = [
        (model, scopes["all"].lost - max(scopes["attention"].lost, scopes["ffn"].lost))
        for model, scopes in _by_scope(pruned)
        if {"all", "attention", "ffn"} <= set(scopes)
    ]
    most = f"most in {fmean(value > 0 for _, value in pairs):.0%}; " if pairs else ""
    return _difference(
        sentence,
        pairs,
        lambda mean, low, high: f"{most}all together lose {mean} points ({low} to {high}) beyond the worse of the two",
        "cuts of all modules, attention and feed-forward layers on two models",
    )


def _past_half(pruned: Sequence[Cut]) -> Claim:
    sentence = "Beyond half of the weights, knowledge falls faster than before."
    pairs: list[tuple[str, float]] = []
    for some in grouped([cut for cut in pruned if cut.scope == "all"], lambda cut: cut.subject).values():
        for curve in grouped(some, lambda cut: cut.steps[0][0]).values():
            lost = {cut.amount: cut.lost for cut in curve}
            if {0.3, 0.5, 0.7} <= set(lost):
                pairs.append((some[0].model, lost[0.7] - 2 * lost[0.5] + lost[0.3]))
    return _difference(
        sentence,
        pairs,
        lambda mean, low, high: f"from 50 to 70 % costs {mean} points ({low} to {high}) more than from 30 to 50 %",
        "cuts of all modules at 30, 50 and 70 % on two models",
    )


def _milder(found: Sequence[Cut], sentence: str) -> Claim:
    pairs = [
        (model, scopes["ffn"].lost - scopes["attention"].lost)
        for model, scopes in _by_scope(found)
        if {"attention", "ffn"} <= set(scopes)
    ]
    return _difference(
        sentence,
        pairs,
        lambda mean, low, high: f"the feed-forward layers cost {mean} points ({low} to {high}) more",
        "pairs of cuts of attention and of feed-forward layers on two models",
    )


def _holds_facts(pruned: Sequence[Cut]) -> Claim:
    sentence = "The feed-forward layers hold the facts: as many zeros cost more there than in attention."
    pairs: list[tuple[str, float]] = []
    for some in grouped(pruned, lambda cut: cut.subject).values():
        for curve in grouped(some, lambda cut: cut.steps[0][0]).values():
            lines = {
                scope: sorted((cut.zeroed, cut.lost) for cut in curve if cut.scope == scope)
                for scope in ("attention", "ffn")
            }
            if not all(lines.values()):
                continue
            zeroed, lost = zip((0.0, 0.0), *lines["ffn"], strict=True)
            for count, value in lines["attention"]:
                if count <= zeroed[-1]:
                    pairs.append((some[0].model, float(np.interp(count, zeroed, lost)) - value))
    return _difference(
        sentence,
        pairs,
        lambda mean, low, high: f"at equal zeros the feed-forward layers cost {mean} points ({low} to {high}) more",
        "cuts of attention and of feed-forward layers on two models",
    )


def _adds(found: Sequence[Cut]) -> Claim:
    sentence = "The damages of pruning and of quantization add up."
    alone = {(cut.subject, cut.steps): cut.lost for cut in found if len(cut.steps) == 1}
    pairs: list[tuple[str, float]] = []
    for cut in found:
        if cut.quantized != (False, True):
            continue
        parts = [alone.get((cut.subject, (step,))) for step in cut.steps]
        if all(part is not None for part in parts):
            pairs.append((cut.model, cut.lost - sum(part or 0.0 for part in parts)))
    return _difference(
        sentence,
        pairs,
        lambda mean, low, high: f"together they cost {mean} points ({low} to {high}) more than the sum of both",
        "chains of pruning and quantization with both alone on two models",
        lambda low, high: "holds" if low <= 0 <= high else "does not hold",
    )


def _final_layer(found: Sequence[Cut]) -> Claim:
    sentence = "In the final dense layer, taking whole rows costs more facts than as many single weights."
    head = [cut for cut in found if len(cut.steps) == 1 and not cut.quantized[0] and cut.scope == "head"]
    pairs: list[tuple[str, float]] = []
    kinds: dict[str, list[tuple[float, float]]] = {"at random": [], "by size": []}
    for same in grouped(head, lambda cut: f"{cut.subject} {cut.amount} {_drawn(cut)}").values():
        rows, single = ([cut.lost for cut in same if cut.rows == whole] for whole in (True, False))
        if rows and single:
            kinds["at random" if _drawn(same[0]) else "by size"].append((fmean(rows), fmean(single)))
            pairs.append((same[0].model, fmean(rows) - fmean(single)))
    each = "; ".join(
        f"{kind}, rows cost {fmean(rows for rows, _ in both):.1%} of the facts and weights "
        f"{fmean(single for _, single in both):.1%}"
        for kind, both in kinds.items()
        if both
    )
    return _difference(
        sentence,
        pairs,
        lambda mean, low, high: f"rows cost {mean} points ({low} to {high}) more; {each}",
        "cuts of the final layer by rows and by weights, chosen alike, on two models",
    )


def _drawn(cut: Cut) -> bool:
    """Whether what is taken is drawn at random."""
    return cut.steps[0][0] == "random"

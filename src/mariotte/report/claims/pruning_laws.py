"""Pruning Laws (arXiv 2504.04342, second version): what it says, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.report.claim import Array, Claim, Curve, Paper, curves, grouped, interval, missing, power
from mariotte.store.record import Record

__all__ = ["PruningLaws"]

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "reasoning": ("agreement", "reverse"),
    "language modelling": ("loss",),
    "question answering": ("facts", "paraphrase", "places"),
}
"""The paper's categories of tasks, in the order of its exponents, by the testbed's names; `events` is in none."""


class PruningLaws(Paper):
    """The second version's sentences.

    Notes
    -----
    As there, the law L = L0 P0 (1 - r)^α is of a score that rises as a model improves: the accuracy of a task, or one
    over the loss in nats (1 / ln perplexity). r is nominal. Errors are root mean squares of the score. Intervals are
    95 % bootstrap intervals over clusters of model and method.

    References
    ----------
    [pruninglaws2026]_ second version.
    """

    title: ClassVar[str] = "Pruning Laws"
    reference: ClassVar[str] = "pruninglaws2026"

    @override
    def claims(self, records: Sequence[Record]) -> list[Claim]:
        found = _scores(records)
        errors = _transferred(found)
        return [_rolling(found), _categories(found), _zero_shot(errors), _one_shot(errors)]


def _scores(records: Sequence[Record]) -> list[Curve]:
    """Every curve as a score: losses as 1 / nats, accuracies as they are."""
    losses = [
        replace(curve, base=1 / curve.base, value_M=1 / curve.value_M)
        for curve in curves(records, "loss")
        if np.all(curve.value_M > 0)
    ]
    tasks = sorted({task for r in records for task in r.metrics if r.measure.startswith("tasks")} - {"accuracy"})
    return losses + [
        curve
        for task in tasks
        if not task.endswith("_se")
        for curve in curves(records, "tasks", task)
        if curve.base > 0
    ]


def _rmse(error_M: Array) -> float:
    return float(np.sqrt(np.mean(error_M**2)))


def _upto(curve: Curve, count: int) -> Curve:
    return replace(curve, amount_M=curve.amount_M[:count], value_M=curve.value_M[:count])


def _predicted(curve: Curve, level: float, alpha: float, amount_M: Array) -> Array:
    return curve.base * np.exp(level + alpha * np.log1p(-amount_M))


def _rolling(found: Sequence[Curve]) -> Claim:
    sentence = "Fitted on the milder ratios, the law predicts the stronger ones with an error below .07 of a score."
    long = [curve for curve in found if len(curve.amount_M) >= 4]
    if len({curve.cluster for curve in long}) < 2:
        return missing(sentence, "curves of four ratios on two models")

    def errors(curve: Curve) -> tuple[float, float]:
        law: list[float] = []
        last: list[float] = []
        for count in range(2, len(curve.amount_M)):
            test_M, value_M = curve.amount_M[count:], curve.value_M[count:]
            law.append(_rmse(_predicted(curve, *power(_upto(curve, count)), test_M) - value_M))
            last.append(_rmse(curve.value_M[count - 1] - value_M))
        return float(np.mean(law)), float(np.mean(last))

    scored = [[errors(curve) for curve in some] for some in grouped(long, lambda curve: curve.cluster).values()]
    everything = [pair for some in scored for pair in some]

    def mean(some: Sequence[tuple[float, float]]) -> float:
        return float(np.mean([law for law, _ in some]))

    low, high = interval(scored, mean)
    last = float(np.mean([error for _, error in everything]))
    return Claim(
        sentence=sentence,
        statistic=f"{mean(everything):.3f} ({low:.3f} to {high:.3f}), {len(everything)} curves in {len(scored)} "
        f"clusters; repeating the last measured score errs by {last:.3f}",
        verdict="holds" if high < 0.07 else "does not hold" if low > 0.07 else "not settled",
    )


def _categories(found: Sequence[Curve]) -> Claim:
    sentence = (
        "Reasoning suffers least, question answering most: α = .22 for reasoning, .73 for language modelling, 2.42 for "
        "question answering."
    )
    clusters = {
        name: [
            some
            for some in grouped((c for c in found if c.metric in metrics), lambda curve: curve.cluster).values()
            if len(some[0].amount_M) >= 2
        ]
        for name, metrics in CATEGORIES.items()
    }
    if any(len(some) < 2 for some in clusters.values()):
        return missing(sentence, "curves of all three categories of tasks on two models")

    # Fitted once: a bootstrap draws the same curves a thousand times.
    alphas = {name: [[power(curve)[1] for curve in cluster] for cluster in some] for name, some in clusters.items()}

    def mean(some: Sequence[float]) -> float:
        return float(np.mean(some))

    values = {name: mean([alpha for cluster in some for alpha in cluster]) for name, some in alphas.items()}
    spans = {name: interval(some, mean) for name, some in alphas.items()}
    rising = list(values.values())
    ends = list(spans.values())
    apart = all(first[1] < second[0] for first, second in pairwise(ends))
    return Claim(
        sentence=sentence,
        statistic="; ".join(
            f"{name} {value:.2f} ({spans[name][0]:.2f} to {spans[name][1]:.2f})" for name, value in values.items()
        ),
        verdict="holds" if apart else "not settled" if rising == sorted(rising) else "does not hold",
    )


def _transferred(found: Sequence[Curve]) -> dict[str, list[tuple[float, float]]]:
    """By cluster, the zero-shot and the one-shot error of every curve whose method and task other models have too."""
    result: dict[str, list[tuple[float, float]]] = {}
    for some in grouped(found, lambda curve: f"{curve.method} {curve.measure} {curve.metric}").values():
        if len({curve.model for curve in some}) < 2:
            continue
        fitted = [power(curve) for curve in some]
        for curve in some:
            others = [fitted[j] for j, other in enumerate(some) if other.model != curve.model]
            level, alpha = np.mean(others, axis=0)
            test_M = curve.amount_M[1:]
            if not len(test_M):
                continue
            zero = _rmse(_predicted(curve, level, alpha, test_M) - curve.value_M[1:])
            # One measurement, the mildest cut, sets P0; the exponent is the other models'.
            first = np.log(max(curve.value_M[0], 1e-9) / curve.base) - alpha * np.log1p(-curve.amount_M[0])
            one = _rmse(_predicted(curve, float(first), alpha, test_M) - curve.value_M[1:])
            result.setdefault(curve.cluster, []).append((zero, one))
    return result


def _zero_shot(errors: Mapping[str, Sequence[tuple[float, float]]]) -> Claim:
    sentence = (
        "With coefficients of other models the law predicts a model that was never pruned with an error of .09 to .12."
    )
    if len(errors) < 2:
        return missing(sentence, "curves of one method and task on two models")

    def mean(some: Sequence[tuple[float, float]]) -> float:
        return float(np.mean([zero for zero, _ in some]))

    everything = [pair for some in errors.values() for pair in some]
    low, high = interval(list(errors.values()), mean)
    return Claim(
        sentence=sentence,
        statistic=f"{mean(everything):.3f} ({low:.3f} to {high:.3f}), every model held out in turn, {len(everything)} "
        "curves",
        verdict="holds" if high <= 0.12 else "does not hold" if low > 0.12 else "not settled",
    )


def _one_shot(errors: Mapping[str, Sequence[tuple[float, float]]]) -> Claim:
    sentence = "One pruned measurement of the new model makes the transfer better."
    if len(errors) < 2:
        return missing(sentence, "curves of one method and task on two models")

    def gain(some: Sequence[tuple[float, float]]) -> float:
        return float(np.mean([one - zero for zero, one in some]))

    everything = [pair for some in errors.values() for pair in some]
    low, high = interval(list(errors.values()), gain)
    better = float(np.mean([one < zero for zero, one in everything]))
    return Claim(
        sentence=sentence,
        statistic=f"change of the error {gain(everything):+.3f} ({low:+.3f} to {high:+.3f}); better on {better:.0%} of "
        f"{len(everything)} curves",
        verdict="holds" if high < 0 else "does not hold" if low > 0 else "not settled",
    )

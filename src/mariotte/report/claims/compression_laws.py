"""Compression Laws for Large Language Models (arXiv 2504.04342, first version): what it says, checked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.report.claim import (
    Array,
    Claim,
    Curve,
    Paper,
    Verdict,
    below,
    contains,
    curves,
    exponent,
    grouped,
    interval,
    missing,
)
from mariotte.store.record import Record

__all__ = ["CompressionLaws"]

_SIGMA = 0.8
"""The share of the dense accuracy whose critical ratio the paper tabulates."""

_NEAR = 0.2
"""Two cut models count as equally large when their parameters differ by less; chosen by us."""


class CompressionLaws(Paper):
    """The paper's research questions.

    Notes
    -----
    Ratios are nominal, in the unit of the method, as in the paper. Intervals are 95 % bootstrap intervals over clusters
    of model and method, as cuts of one model are not independent.

    References
    ----------
    [compressionlaws2025]_ sections 4 and 5, tables 2 and 3, figure 4.
    """

    title: ClassVar[str] = "Compression Laws for Large Language Models"
    reference: ClassVar[str] = "compressionlaws2025"

    @override
    def claims(self, records: Sequence[Record]) -> list[Claim]:
        loss, accuracy = curves(records, "loss"), curves(records, "tasks", "accuracy")
        return [
            _shape(
                _free(loss), "The loss grows quadratically with the ratio: β = 2.0 in L0^α (1 + r)^β.", 2.0, "losses"
            ),
            _shape(
                _free(accuracy),
                "The accuracy of tasks falls linearly with the ratio: β = -1.0 in L0^α (1 + r)^β.",
                -1.0,
                "accuracies of tasks",
            ),
            _recovery(records),
            _speed(records),
            _critical(_free(accuracy)),
            _calibration(loss),
            _small_or_large(loss),
        ]


def _free(found: Sequence[Curve]) -> Sequence[Curve]:
    """The curves of pruning without calibration, which the paper's coefficients are of; all where there are none."""
    return [curve for curve in found if curve.method in ("prunenet-random", "prunenet")] or found


def _shape(found: Sequence[Curve], sentence: str, published: float, what: str) -> Claim:
    if len({curve.cluster for curve in found}) < 2:
        return missing(sentence, f"{what} of two models without recovery")
    clusters = list(grouped(found, lambda curve: curve.cluster).values())
    low, high = interval(clusters, exponent)
    return Claim(
        sentence=sentence,
        statistic=f"β = {exponent(found):.2f} ({low:.2f} to {high:.2f}), {len(found)} curves in {len(clusters)} "
        f"clusters; damage itself grows as r to the power {_damage(found)}",
        verdict=contains(low, high, published),
    )


def _damage(found: Sequence[Curve]) -> str:
    """The exponent p of |L - L0| = c r^p with a c of its own for each curve, and its interval."""

    def slope(some: Sequence[Curve]) -> float:
        x: list[Array] = []
        y: list[Array] = []
        for curve in some:
            damage_M = np.abs(curve.value_M - curve.base)
            worse_M = (np.sign(curve.value_M - curve.base) == np.sign(curve.value_M[-1] - curve.base)) & (damage_M > 0)
            if worse_M.sum() >= 2:
                ln_r, ln_d = np.log(curve.amount_M[worse_M]), np.log(damage_M[worse_M])
                x.append(ln_r - ln_r.mean())
                y.append(ln_d - ln_d.mean())
        x_M, y_M = np.concatenate(x), np.concatenate(y)
        return float(x_M @ y_M / (x_M @ x_M))

    low, high = interval(list(grouped(found, lambda curve: curve.cluster).values()), slope)
    return f"{slope(found):.2f} ({low:.2f} to {high:.2f})"


def _recovery(records: Sequence[Record]) -> Claim:
    sentence = "Recovery by fine-tuning takes away up to 55 % of the loss of the cut model."
    before = {
        (r.model, r.chain, r.seed, r.measure): r.metrics["loss"]
        for r in records
        if "loss" in r.metrics and r.recovery is None
    }
    gains: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        if "loss" not in r.metrics or r.recovery is None:
            continue
        cut = before.get((r.model, r.chain.rpartition(" | ")[0], r.seed, r.measure))
        if cut is not None:
            damage = cut - r.base["loss"]
            repaired = (cut - r.metrics["loss"]) / damage if damage > 0.01 else float("nan")
            gains.setdefault(f"{r.model} {r.method}", []).append((1 - r.metrics["loss"] / cut, repaired))
    if len(gains) < 2:
        return missing(sentence, "recovered losses of two models")
    clusters = list(gains.values())
    everything = [gain for cluster in clusters for gain in cluster]

    def most(some: Sequence[tuple[float, float]]) -> float:
        return max(gain for gain, _ in some)

    low, high = interval(clusters, most)
    worse = sum(gain < 0 for gain, _ in everything) / len(everything)
    repaired = float(np.nanmedian([share for _, share in everything]))
    return Claim(
        sentence=sentence,
        statistic=f"at most {most(everything):.0%} ({low:.0%} to {high:.0%}), median "
        f"{float(np.median([gain for gain, _ in everything])):.0%}, of {len(everything)} recoveries; the median one "
        f"repairs {repaired:.0%} of the damage, and {worse:.0%} of them made the loss worse",
        verdict="holds" if low <= 0.55 <= high or most(everything) >= 0.55 else "does not hold",
    )


def _speed(records: Sequence[Record]) -> Claim:
    sentence = "At a ratio of 90 % a model is up to 60 % faster, and the smaller ones at most 35 %."
    found: dict[str, tuple[int, list[tuple[float, float]]]] = {}
    for r in records:
        if r.amount == 0.9 and r.recovery is None and "speedup_decode" in r.metrics:
            _, speeds = found.setdefault(r.model, (r.base_params, []))
            for part in ("prefill", "decode"):
                error = r.metrics.get(f"speedup_{part}_se", 0.0)
                speeds.append((r.metrics[f"speedup_{part}"], error))
    if len(found) < 4:
        return missing(sentence, "speeds at 90 % of four models")
    by_size = sorted(found.values())
    half = len(by_size) // 2
    small = max(speed for _, speeds in by_size[:half] for speed in speeds)
    large = max(speed for _, speeds in by_size[half:] for speed in speeds)
    fast = large[0] + 2 * large[1] >= 1.6
    modest = small[0] - 2 * small[1] <= 1.35
    return Claim(
        sentence=sentence,
        statistic=f"fastest of the larger half {large[0] - 1:+.0%} (± {2 * large[1]:.0%}), of the smaller half "
        f"{small[0] - 1:+.0%} (± {2 * small[1]:.0%}), prefill or decode, whichever gains more; {len(found)} models, of "
        f"{by_size[0][0]:,} to {by_size[-1][0]:,} parameters",
        verdict="holds" if fast and modest else "does not hold",
    )


def _critical(found: Sequence[Curve]) -> Claim:
    sentence = (
        "The critical ratio, from which no recovery keeps 80 % of the accuracy, falls with the size of the model: 0.42 "
        "for 0.5B parameters, 0.16 for 14B."
    )
    families = [
        family for family in grouped(found, lambda curve: curve.model_type).values() if len(_sizes(family)) >= 3
    ]
    if not families:
        return missing(sentence, "accuracies of three models of a family")
    said: list[str] = []
    concordance: list[float] = []
    everything: list[tuple[Array, Array]] = []
    for family in families:
        sizes: list[float] = []
        critical: list[float] = []
        for size, some in sorted(_sizes(family).items()):
            beta = exponent(some)
            ratio = float(np.expm1(np.log(_SIGMA) / beta)) if beta < 0 else 1.0
            sizes.append(size)
            critical.append(min(ratio, 1.0))
        everything.append((np.array(sizes), np.array(critical)))
        concordance.append(_kendall(everything[-1]))
        said.append(f"{family[0].model_type} {', '.join(f'{c:.2f}' for c in critical)}")
    observed = float(np.mean(concordance))
    return Claim(
        sentence=sentence,
        statistic=f"from the smallest model to the largest: {'; '.join(said)}; mean rank correlation with size "
        f"{observed:+.2f}, p = {_chance_of(everything, observed):.2f} by permutation",
        verdict=_by_chance(observed, _chance_of(everything, observed)),
    )


def _sizes(family: Sequence[Curve]) -> dict[int, list[Curve]]:
    found: dict[int, list[Curve]] = {}
    for curve in family:
        found.setdefault(curve.base_params, []).append(curve)
    return found


def _kendall(pair: tuple[Array, Array]) -> float:
    x_M, y_M = pair
    upper = np.triu_indices(len(x_M), 1)
    signs = np.sign(np.subtract.outer(x_M, x_M)) * np.sign(np.subtract.outer(y_M, y_M))
    return float(signs[upper].mean())


def _chance_of(families: Sequence[tuple[Array, Array]], observed: float) -> float:
    """How often models in random order agree as much with the claim, or with its contrary; every order is tried."""
    null = np.array([0.0])
    for x_M, y_M in families:
        orders = np.array([_kendall((x_M, y_M[list(order)])) for order in permutations(range(len(y_M)))])
        null = np.add.outer(null, orders / len(families)).ravel()
    return float((np.abs(null) >= abs(observed) - 1e-9).mean())


def _by_chance(observed: float, p: float) -> Verdict:
    if p > 0.05:
        return "not settled"
    return "holds" if observed < 0 else "does not hold"


def _calibration(found: Sequence[Curve]) -> Claim:
    sentence = (
        "Pruning with calibration is less sensitive to the ratio than pruning without: a lower β of the loss (1.40 "
        "against 1.93 on the Llamas)."
    )
    by_model = grouped(found, lambda curve: curve.model)
    pairs = [
        (with_text, without)
        for some in by_model.values()
        if (with_text := [c for c in some if c.method == "slicegpt"])
        and (without := [c for c in some if c.method == "prunenet-random"])
    ]
    if len(pairs) < 2:
        return missing(sentence, "losses of slicegpt and prunenet-random on two models")

    def difference(some: Sequence[tuple[list[Curve], list[Curve]]]) -> float:
        calibrated = [curve for pair in some for curve in pair[0]]
        free = [curve for pair in some for curve in pair[1]]
        return exponent(calibrated) - exponent(free)

    low, high = interval([[pair] for pair in pairs], difference)
    gaps = [gap for calibrated, free in pairs for gap in _gaps(calibrated, free)]
    beta = difference(pairs)
    same_size = (
        f"; at equal parameters removed its loss differs by {np.median(gaps):+.2f} nats (median)" if gaps else ""
    )
    return Claim(
        sentence=sentence,
        statistic=f"difference of β {beta:+.2f} ({low:+.2f} to {high:+.2f}), {len(pairs)} models{same_size}",
        verdict=below(low, high, 0.0),
    )


def _gaps(calibrated: Sequence[Curve], free: Sequence[Curve]) -> list[float]:
    """Loss with calibration minus loss without, where both removed equally much, by linear interpolation."""
    found: list[float] = []
    for a in calibrated:
        for b in (curve for curve in free if curve.measure == a.measure):
            inside = (a.removed_M >= b.removed_M[0]) & (a.removed_M <= b.removed_M[-1])
            found += [*(a.value_M[inside] - np.interp(a.removed_M[inside], b.removed_M, b.value_M))]
    return found


def _small_or_large(found: Sequence[Curve]) -> Claim:
    sentence = "A small model cut lightly is better than a large one cut heavily to the same size."
    wins: dict[str, list[bool]] = {}
    for some in grouped(found, lambda curve: f"{curve.model_type} {curve.method} {curve.measure}").values():
        for small in some:
            light = small.amount_M <= 0.3
            for large in (curve for curve in some if curve.base_params > small.base_params):
                for params, value in zip(small.params_M[light], small.value_M[light], strict=True):
                    heavy = large.amount_M >= 0.5
                    near = heavy & (np.abs(large.params_M / params - 1) < _NEAR)
                    pair = f"{small.model} {large.model}"
                    wins.setdefault(pair, []).extend(bool(value < other) for other in large.value_M[near])
    wins = {pair: some for pair, some in wins.items() if some}
    if len(wins) < 2:
        return missing(sentence, "models that are equally large after a light and a heavy cut")

    def share(some: Sequence[bool]) -> float:
        return float(np.mean(some))

    everything = [won for some in wins.values() for won in some]
    low, high = interval(list(wins.values()), share)
    return Claim(
        sentence=sentence,
        statistic=f"in {share(everything):.0%} ({low:.0%} to {high:.0%}) of {len(everything)} pairs of cuts of "
        f"{len(wins)} pairs of models, at most 30 % of the small one and at least 50 % of the large one removed",
        verdict="holds" if low > 0.5 else "does not hold" if high < 0.5 else "not settled",
    )

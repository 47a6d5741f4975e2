"""When recoveries that choose their amount stop, and when they should have stopped.

python benchmarks/recovery_stopping.py

The curves are those of benchmarks/results/recovery_doublings.csv, which `recovery_doublings.py` makes: 4k to 128k
tokens of LoRA by doublings. A rule sees the held-out losses so far and stops or doubles, at most to the end of the
curve. What it is learned from never is of the model that it is judged on.

Regret. Who asks for a gain of g per doubling pays g for each: an amount costs ln(test loss) + g · doublings, the oracle
is the amount that costs least, and regret is what the rule's amount costs beyond that, in percent of the loss. Tokens
are those of the amount stopped at, beside the oracle's; then the test loss there against the oracle's, lower where more
was trained than the gain asked for.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from recovery_curves import testbed

from mariotte.gains import Array, Stopping, continued
from mariotte.laws.recovery import Curve, learn_tail

DOUBLINGS = Path(__file__).parent / "results" / "recovery_doublings.csv"
GAINS = (0.002, 0.005, 0.01, 0.02, 0.05)
LEVELS = (0.5, 0.7, 0.8, 0.9)

Rule = Callable[[Array, Array], float]
"""What a rule compares with the gain asked for, of amounts and losses so far."""


def read() -> tuple[list[Curve], dict[str, Array]]:
    """Held-out curves, and the test losses of each by its name."""
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    with DOUBLINGS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            numbers = (float(row["tokens"]), float(row["held_loss"]), float(row["test_loss"]))
            found.setdefault((row["model"], row["cut"]), []).append(numbers)
    curves: list[Curve] = []
    tests: dict[str, Array] = {}
    for (model, cut), rows in found.items():
        tokens_M, held_M, test_M = np.array(sorted(rows)).T
        curves.append(Curve(f"{model} {cut}", model, tokens_M, held_M))
        tests[curves[-1].name] = test_M
    return curves, tests


def before(tokens_M: Array, loss_M: Array) -> float:
    """The rule of before: a quarter of what the curve of one shape through all amounts, none among them, predicts."""
    expected = continued(tokens_M, loss_M, np.array([2 * tokens_M[-1]]), 2.5 * float(tokens_M[1]), 1.2)[0]
    return 0.25 * float((loss_M[-1] - expected) / loss_M[-1])


def last_two(tokens_M: Array, loss_M: Array) -> float:
    """No law: what the better of the last two doublings brought."""
    gains = (loss_M[1:-1] - loss_M[2:]) / loss_M[1:-1]
    return float(np.max(gains[-2:]))


def tails(curves: Sequence[Curve]) -> dict[str, Stopping]:
    """By model, the law learned from the others."""
    found: dict[str, Stopping] = {}
    for model in {curve.cluster for curve in curves}:
        tail = learn_tail([curve for curve in curves if curve.cluster != model])
        found[model] = Stopping(exponent=tail.exponent, spread=tail.spread, level=0.8)
    return found


def possible(law: Stopping, level: float) -> Rule:
    """The gain of the next doubling that is not exceeded with a probability."""
    at = replace(law, level=level)
    return lambda tokens_M, loss_M: at.possible(tokens_M, loss_M, 2 * float(tokens_M[-1]))


def stopped(curve: Curve, rule: Rule, gain: float) -> int:
    """Which amount of a curve a rule stops at."""
    for k in range(2, len(curve.tokens_M) - 1):
        if rule(curve.tokens_M[: k + 1], curve.value_M[: k + 1]) < gain:
            return k
    return len(curve.tokens_M) - 1


def judged(curves: Sequence[Curve], tests: dict[str, Array], rule_of: Callable[[str], Rule]) -> Iterable[str]:
    """Mean and largest regret, mean tokens beside the oracle's, and more loss, one text a gain."""
    for gain in GAINS:
        regrets: list[float] = []
        tokens: list[tuple[float, float]] = []
        more: list[float] = []
        for curve in curves:
            test_M = tests[curve.name]
            cost = np.array([math.inf, *(math.log(x) + gain * k for k, x in enumerate(test_M[1:]))])
            oracle, at = int(np.argmin(cost)), stopped(curve, rule_of(curve.cluster), gain)
            regrets.append(100 * float(cost[at] - cost[oracle]))
            tokens.append((curve.tokens_M[at] / 1e3, curve.tokens_M[oracle] / 1e3))
            more.append(100 * float(test_M[at] / test_M[oracle] - 1))
        asked, best = np.mean(tokens, axis=0)
        regret = f"{np.mean(regrets):.2f} (largest {np.max(regrets):.1f})"
        yield f"{regret}; {asked:.0f}k of {best:.0f}k; {np.mean(more):+.1f} %"


def main() -> None:
    curves, tests = read()
    laws = tails(curves)
    models = sorted({curve.cluster for curve in curves})
    print(f"{len(curves)} curves of {len(models)} models, {len(curves[0].tokens_M)} amounts each, none among them.\n")
    print("Regret in % of the loss (largest); tokens stopped at, of the oracle's; test loss against the oracle's.\n")
    print("| rule | " + " | ".join(f"gain={gain:.1%}" for gain in GAINS) + " |")
    print("|---|" + "---|" * len(GAINS))
    rules: dict[str, Callable[[str], Rule]] = {
        "before: a quarter of the curve": lambda model: before,
        "no law: the better of the last two doublings": lambda model: last_two,
    }
    for level in LEVELS:
        rules[f"tail, level {level:g}"] = lambda model, level=level: possible(laws[model], level)
    for name, rule_of in rules.items():
        print(f"| {name} | " + " | ".join(judged(curves, tests, rule_of)) + " |")
    print("\nMeasured gains of doublings that are not above what is possible at a level, each model held out:\n")
    for level in LEVELS:
        inside = [
            (curve.value_M[k] - curve.value_M[k + 1]) / curve.value_M[k]
            <= possible(laws[curve.cluster], level)(curve.tokens_M[: k + 1], curve.value_M[: k + 1])
            for curve in curves
            for k in range(2, len(curve.tokens_M) - 1)
        ]
        print(f"* level {level:g}: {np.mean(inside):.0%} of {len(inside)}")
    print("\nWhat is learned:\n")
    for model in models:
        print(f"* without {model}: κ {laws[model].exponent:.3f}, spread {laws[model].spread:.3f}")
    tail = learn_tail(curves)
    print(f"* from all: κ {tail.exponent:.3f}, spread {tail.spread:.3f}, {tail.steps} steps of {tail.clusters} models")
    tail = learn_tail([c for study in ("recovery", "compression-laws") for c in testbed(study) if _of_its_text(c)])
    print(
        f"* from the shipped studies, losses on the text trained on, 4k, 16k, 64k tokens: κ {tail.exponent:.3f}, "
        f"spread {tail.spread:.3f}, {tail.steps} steps of {tail.clusters} models"
    )


def _of_its_text(curve: Curve) -> bool:
    *_, recovery, measure = curve.name.split(" | ")
    return recovery.partition("corpus=")[2].rstrip(")") in measure


if __name__ == "__main__":
    main()

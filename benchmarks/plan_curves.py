"""Which prior predicts a held-out model's damages better: the plan's curves, or the family law.

    python benchmarks/plan_curves.py      writes results/plan_curves.md

The shipped losses of the testbed's decoders, three texts; each model is left out in turn. Of each curve are
known no point, the one nearest to 1.5 % of the dense loss, and that and the one nearest to 15 %; the others between .3
and 35 % are predicted. Errors are of the logarithm of the damage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mariotte.laws.base import Inputs, Point, values
from mariotte.laws.forms.family import Family
from mariotte.laws.learning import Pool
from mariotte.laws.published import points as published
from mariotte.plan.candidates import CUTS
from mariotte.plan.curves import Sample, Scale, learn
from mariotte.plan.pool import shipped, usable
from mariotte.plan.quality import own_samples
from mariotte.testbed.zoo import NAMES

RESULTS = Path(__file__).parent / "results"
TEXTS = tuple(f"loss:testbed/{text}(rows=160)" for text in ("encyclopedia", "news", "instructions"))
SCALE = Scale(kind="loss")

Predict = Callable[[Sequence[Sample], Sequence[Sample]], tuple[list[float], list[float]]]
"""Means and standard deviations of the logarithm of the damage at samples, given own ones of the same curve."""


def of_curves(others: Sequence[Sample]) -> Predict:
    curves = learn(others, SCALE)

    def predict(asked: Sequence[Sample], own: Sequence[Sample]) -> tuple[list[float], list[float]]:
        belief = curves.posterior(asked[0].params, [(s.method, s.amount) for s in asked], own)
        return belief.mean_Q.tolist(), belief.sd.tolist()

    return predict


def of_family(others: Sequence[Sample], more: Sequence[Point] = ()) -> Predict:
    law = Family(Pool([*more, *map(point, others)]).priors())

    def predict(asked: Sequence[Sample], own: Sequence[Sample]) -> tuple[list[float], list[float]]:
        x, known = Inputs.of([point(s) for s in asked]), [point(s) for s in own]
        found = law.estimate(Inputs.of(known), values(known)) if known else law.before(x)
        assert found.covariance is not None
        rises = law.f(found.theta, x) - x.base_M
        sd = law.deviation(found.theta, found.covariance, x)
        return [SCALE.ceiled(max(float(d), 1e-6)) for d in rises], sd.tolist()

    return predict


def point(s: Sample) -> Point:
    return Point(
        value=s.value,
        base=s.base,
        ratio=s.amount,
        ratio_kind="own",
        metric="loss",
        protocol="testbed",
        params=s.params,
        model=s.model,
        method=s.method,
        family=s.method,
    )


def samples(text: str) -> dict[str, list[Sample]]:
    """By model."""
    entries = [e for e in shipped() if e.metric == "loss" and e.measure == text and usable(e) and not e.dense]
    found = {name: [e for e in entries if e.model == name] for name in (f"testbed/{name}" for name in NAMES)}
    return {
        name: [s for s in own_samples(some, some[0].params) if s.method in CUTS] for name, some in found.items() if some
    }


def errors(learned: Callable[[Sequence[Sample]], Predict]) -> dict[int, list[tuple[float, float]]]:
    """By own points, errors and what was believed of them."""
    found: dict[int, list[tuple[float, float]]] = {0: [], 1: [], 2: []}
    for text in TEXTS:
        by_model = samples(text)
        for name, own in by_model.items():
            predict = learned([s for other, some in by_model.items() if other != name for s in some])
            for method in CUTS:
                curve = sorted((s for s in own if s.method == method), key=lambda s: s.amount)
                if len(curve) < 4:
                    continue
                shares = [(s.value - s.base) / s.base for s in curve]
                nearest = [
                    min(range(len(curve)), key=lambda i: abs(math.log(max(shares[i], 1e-3) / share)))
                    for share in (0.015, 0.15)
                ]
                for shots in found:
                    known = [curve[i] for i in list(dict.fromkeys(nearest))[:shots]]
                    asked = [
                        s for s, share in zip(curve, shares, strict=True) if s not in known and 0.003 < share < 0.35
                    ]
                    if not asked:
                        continue
                    for s, mean, sd in zip(asked, *predict(asked, known), strict=True):
                        found[shots].append((SCALE.ceiled(s.value - s.base) - mean, sd))
    return found


def main() -> None:
    laws: dict[str, Callable[[Sequence[Sample]], Predict]] = {
        "the plan's curves": of_curves,
        "family law, the testbed's priors": of_family,
        "family law, the testbed's and published": lambda others: of_family(others, published()),
    }
    lines = [
        "# Which prior predicts a held-out model better?",
        "",
        "Logarithms of damages of eight decoders of the testbed, each left out in turn; three texts, five methods.",
        "The log score is of the law's own standard deviations, before any calibration (higher is better).",
        "",
        "| prior | own points | predictions | RMSE | mean log score |",
        "|---|---|---|---|---|",
    ]
    for name, learned in laws.items():
        for shots, pairs in errors(learned).items():
            error, sd = np.array(pairs).T
            score = np.mean(-0.5 * (error / sd) ** 2 - np.log(sd * math.sqrt(2 * math.pi)))
            lines.append(f"| {name} | {shots} | {len(error)} | {np.sqrt(np.mean(error**2)):.3f} | {score:.3f} |")
            print(lines[-1], flush=True)
    (RESULTS / "plan_curves.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

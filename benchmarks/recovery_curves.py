"""Recovery curves: the first three amounts of data are seen, the further ones predicted.

python benchmarks/recovery_curves.py

* NVIDIA's published token curves (accuracies, 2.5 to 100 billion tokens of distillation; they ship with the package).
  Their amounts begin at 2.5 billion: what the cut alone did is not in the tables.
* The shipped records of two testbed studies (losses, nats): none, 4k, 16k and 64k tokens, so that three are seen and
  one is predicted. None counts as an amount: it is the model that was only cut.

A curve is one model, cut and recovered in one way, on one metric; every shape is learned from curves of other models.
persist: what the last amount gave goes on. v1: the D term of the compression law, fitted to the curve. curve: L = L∞ +
(Lcut - L∞)(1 + D/Dc)^-κ with Dc, κ and the share of the gain that is believed learned from other models. Errors are the
root mean square over a curve's further amounts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mariotte.laws.published import measurements
from mariotte.laws.recovery import Curve, HeldOutCurve, hold_out
from mariotte.store.tables import read_table

STUDIES = Path(__file__).resolve().parents[1] / "studies" / "testbed"


def nvidia() -> list[Curve]:
    """The published token curves; both recipes of one model are one cluster."""
    values: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for row in measurements("nvidia_minitron_distill"):
        try:
            tokens = float(row["recovery_tokens"])
        except ValueError:  # "100 iterations": no amount of tokens
            continue
        if tokens > 0:
            key = (row["model"], row["method"], row["metric"])
            values.setdefault(key, {}).setdefault(tokens, []).append(float(row["value"]))
    return _curves({(model, f"{model} | {rest}"): v for (model, *rest), v in values.items()})


def testbed(study: str) -> list[Curve]:
    """The losses of a shipped study, by model, cut, recovery with its corpus, and measure; seeds are averaged."""
    table = read_table(str(STUDIES / f"{study}.parquet"))
    table = table[(table["metric"] == "loss") & table["method"].notna()]
    cut: dict[tuple[str, str, str], list[float]] = {}
    values: dict[tuple[str, str], dict[float, list[float]]] = {}
    rows = list(
        zip(table["model"], table["chain"], table["measure"], table["recovery_tokens"], table["value"], strict=True)
    )
    for model, chain, measure, tokens, value in rows:
        if tokens == 0:
            cut.setdefault((model, chain, measure), []).append(value)
    for model, chain, measure, tokens, value in rows:
        first, _, then = chain.partition(" | ")
        if tokens > 0 and (model, first, measure) in cut:
            how, _, options = then.partition("@")
            name = f"{model} | {first} | {how}{options[options.find('(') :]} | {measure}"
            curve = values.setdefault((model, name), {0.0: cut[model, first, measure]})
            curve.setdefault(float(tokens), []).append(value)
    return _curves(values)


def _curves(values: dict[tuple[str, str], dict[float, list[float]]]) -> list[Curve]:
    return [
        Curve(name, cluster, np.array(sorted(points)), np.array([np.mean(points[d]) for d in sorted(points)]))
        for (cluster, name), points in values.items()
    ]


def table(found: list[HeldOutCurve]) -> Iterable[str]:
    """Mean and median error of every predictor, and in how many curves it is the best, as Markdown."""
    yield "| predictor | mean error | median error | best in |"
    yield "|---|---|---|---|"
    for name in found[0].errors:
        errors = [f.errors[name] for f in found]
        wins = sum(min(f.errors, key=lambda n: f.errors[n]) == name for f in found)
        yield f"| {name} | {np.mean(errors):.4f} | {np.median(errors):.4f} | {wins} of {len(found)} |"


def main() -> None:
    for title, curves in (
        ("NVIDIA, accuracies (fractions)", nvidia()),
        ("testbed/recovery, losses (nats)", testbed("recovery")),
        ("testbed/compression-laws, losses (nats)", testbed("compression-laws")),
    ):
        found = hold_out(curves)
        levels = sorted({len(f.curve.tokens_M) for f in found})
        clusters = {f.curve.cluster for f in found}
        print(
            f"\n## {title}\n\n{len(found)} curves of {len(clusters)} models, "
            f"{levels[0]} to {levels[-1]} amounts each.\n"
        )
        print("\n".join(table(found)))
        print()
        for cluster in sorted(clusters):
            shape = next(f.shape for f in found if f.curve.cluster == cluster)
            print(
                f"* {cluster}: Dc {shape.scale:.3g}, κ {shape.exponent:g}, {shape.share:.0%} of the gain believed, "
                f"from {shape.curves} curves of {shape.clusters} other models"
            )


if __name__ == "__main__":
    main()

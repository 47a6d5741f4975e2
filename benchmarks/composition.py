"""Prune, then quantise: which rule gives the damage of both from the damages of each, on the published joint grids.

python benchmarks/composition.py

Three grids of LLaMA-2-7B on WikiText-2 that ship with the package, each of a pruning method and several precisions. A
cell is predicted from the pruned model at full precision and the dense model at that precision. Two grids lack one of
the two: SparseGPT has no dense quantised model, whose damage is taken from the 10 % row; ASVD none at 16 bits, where 8
bits stand in.
Errors in nats of ln perplexity, over cells of at most twice the dense loss, and over all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from mariotte.laws.base import COLLAPSE
from mariotte.laws.compose import RULES, composed
from mariotte.laws.published import measurements

GRIDS = {
    "Wanda × GGUF": ("Wanda", 16.0, 0.0),
    "SparseGPT × GPTQ": ("SparseGPT", 16.0, 0.1),
    "ASVD × RTN": ("ASVD", 8.0, 0.0),
}
"""Grid to the beginning of its methods, the bits of its reference precision, and the ratio of its reference model."""


def cells(method: str) -> tuple[float, dict[tuple[float, float], float]]:
    """The dense loss, and (ratio, bits) to loss, in nats, of one grid."""
    rows = [
        row
        for row in measurements("mpt_joint_prune_quant")
        if row["method"].startswith(method) and row["metric"] == "wikitext2_ppl"
    ]
    found = {(float(r["ratio"]), float(r["bits"])): math.log(float(r["value"])) for r in rows}
    return math.log(float(rows[0]["base_value"])), found


def misses(grid: str, *, all_cells: bool = False) -> dict[str, list[float]]:
    """Rule to its errors over the cells of a grid that are both pruned and quantised, collapsed ones only if asked."""
    method, reference_bits, reference_ratio = GRIDS[grid]
    dense, found = cells(method)
    # The loss of the reference model at the reference precision: the dense one where the grid has it.
    corner = found.get((reference_ratio, reference_bits), dense)
    errors: dict[str, list[float]] = {rule: [] for rule in RULES}
    for (ratio, bits), value in found.items():
        if bits == reference_bits or ratio <= reference_ratio or (value > COLLAPSE * dense and not all_cells):
            continue
        pruned, quantised = found[ratio, reference_bits], found[reference_ratio, bits]
        for rule in RULES:
            errors[rule].append(composed(corner, [pruned, quantised], rule) - value)
    return errors


def table() -> Iterable[str]:
    """The rows of the table, as Markdown."""
    yield "| grid | rule | cells | median error | RMSE | cells with collapsed ones | median error | RMSE |"
    yield "|---|---|---|---|---|---|---|---|"
    for grid in GRIDS:
        every = misses(grid, all_cells=True)
        for rule, errors in misses(grid).items():
            numbers = " | ".join(f"{len(e)} | {_median(e):.3f} | {_rmse(e):.3f}" for e in (errors, every[rule]))
            yield f"| {grid} | {rule} | {numbers} |"


def _median(errors: list[float]) -> float:
    return float(np.median(np.abs(errors)))


def _rmse(errors: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


if __name__ == "__main__":
    print("\n".join(table()))

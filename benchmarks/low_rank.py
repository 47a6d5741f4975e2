"""modegpt and svd-llm beside ffn and heads at equal parameters, nothing recovered, with 10 to 40 % of a model gone.

python benchmarks/low_rank.py qwen2-2m
python benchmarks/low_rank.py stories260K --data SHARED_DATA

The protocol is that of benchmarks/equal_parameters.py, whose head says it. As there, each model's section of
benchmarks/results/low_rank.md is replaced when the model is run, and --cache FOLDER keeps what was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from equal_parameters import SHORT, Case, Found, arguments, cached, cases, cell, dense_of, heading, paired, run, write

from mariotte import __version__

RESULTS = Path(__file__).parent / "results" / "low_rank.md"
RATIOS = (0.1, 0.2, 0.25, 0.3, 0.4)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads": ("heads", {}),
    "ffn": ("ffn", {}),
    "modegpt": ("modegpt", {}),
    "all alike": ("modegpt", {"allocation": "uniform"}),
    "queries=0": ("modegpt", {"queries": 0.0}),
    "as published": ("modegpt", {"queries": 1.0, "neurons": "leverage", "compensate": False}),
    "svd-llm": ("svd-llm", {}),
    "svd-llm, sequential": ("svd-llm", {"sequential": True}),
}
"""What is compared: a method and its fields. All alike: every block loses the same; as published: of our defaults only
the temperature's unit."""


def against(found: dict[str, Found], ratio: float, name: str) -> str:
    """How modegpt stands against another method that removed as much, with twice the paired standard error."""
    other = found.get(name)
    if other is None or other.removed < ratio - SHORT:
        return "alone"
    mean, noise = paired(found["modegpt"], other)
    said = "within noise" if abs(mean) <= noise else "better" if mean < 0 else "worse"
    return f"{mean:+.5f} ± {noise:.5f}: {said}"


def section(name: str, case: Case, ratios: Sequence[float], cache: Path | None) -> str:
    """The table of one model."""
    dense = dense_of(case)
    by_name: dict[str, list[Found | str]] = {}
    for label, (method, fields) in VARIANTS.items():

        def work(method: str = method, fields: dict[str, Any] = fields) -> list[Found | str]:
            return run(case, method, ratios, dense, **fields)

        by_name[label] = cached(cache, f"low-rank-{name}-{label.replace(' ', '-').replace(',', '')}", work)
    lines = heading(name, case, dense, [*VARIANTS, "modegpt against ffn", "against heads"])
    for i, ratio in enumerate(ratios):
        cells: list[str] = []
        at: dict[str, Found] = {}
        for label, results in by_name.items():
            result = results[i]
            if isinstance(result, str):
                cells.append("cannot")
                continue
            at[label] = result
            cells.append(cell(result, dense, ratio, loss=".4f", facts=".1%"))
        lines.append(
            f"| {ratio:.0%} | {' | '.join(cells)} | {against(at, ratio, 'ffn')} | {against(at, ratio, 'heads')} |"
        )
    return "\n".join([*lines, ""])


HEAD = f"""# modegpt and svd-llm beside ffn and heads, at equal parameters

Loss on test text and, for testbed models, the share of the dense model's facts that are kept, after a share of all
parameters (a tied embedding once) was removed, nothing recovered. Made by `benchmarks/low_rank.py`; the protocol is
that of `benchmarks/equal_parameters.py`. The last columns are differences of the mean loss with twice the standard
error of the paired difference over test rows; below zero modegpt is better. All alike: `allocation=uniform`; as
published: `queries=1, neurons=leverage, compensate=false`; both of modegpt. Mariotte {__version__}, torch
{torch.__version__}, 2026-11-22.
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cache", type=Path, help="folder for what was done")
    given = parser.parse_args()
    for name, case in cases(parser, given):
        text = section(name, case, RATIOS, given.cache)
        print(text)
        write(name, text, RESULTS, HEAD)


if __name__ == "__main__":
    main()

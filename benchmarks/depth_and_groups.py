"""sleb, laco, llm-pruner and flap beside shortgpt, ffn and heads: 25 % of all parameters gone, nothing recovered.

python benchmarks/depth_and_groups.py MODEL ... --data SHARED_DATA

MODEL is stories260K, which needs --data, or the name of a testbed model. The protocol is that of equal_parameters.py.
Prints a table for each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from equal_parameters import Found, known_facts, row_losses, run, stories, testbed

RATIO = 0.25
ASKED: tuple[tuple[str, dict[str, object]], ...] = (
    ("shortgpt", {}),
    ("sleb", {}),
    ("laco", {}),
    ("laco", {"rule": "last"}),
    ("ffn", {}),
    ("heads", {}),
    ("llm-pruner", {}),
    ("llm-pruner", {"taylor": "param_mix"}),
    ("llm-pruner", {"scope": "ffn"}),
    ("flap", {}),
    ("flap", {"uniform": True}),
    ("flap", {"compensate": False}),
    ("flap", {"scope": "ffn"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.models:
        if name == "stories260K" and given.data is None:
            parser.error("stories260K needs --data")
        case = stories(given.data) if name == "stories260K" else testbed(name)
        dense = Found("dense", 0.0, row_losses(case.model, case.test_NT), known_facts(case, case.model), 0.0)
        print(f"\n## {name}: {case.model.counts.n_params:,} parameters, dense loss {dense.loss:.4f}. {case.text}\n")
        print("| chain | removed | loss | facts kept | seconds |\n|---|---|---|---|---|")
        for method, asked in ASKED:
            (found,) = run(case, method, [RATIO], dense, **asked)
            if isinstance(found, str):
                print(f"| {method} | {found} | | | |")
                continue
            kept = "" if found.known is None or not dense.known else f"{len(found.known) / len(dense.known):.0%}"
            print(
                f"| `{found.chain}` | {found.removed:.1%} | {found.loss:.4f} | {kept} | {found.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

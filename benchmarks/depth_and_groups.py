"""sleb, laco, llm-pruner and flap beside shortgpt, ffn and heads: 25 % of all parameters gone, nothing recovered.

python benchmarks/depth_and_groups.py MODEL ... --data SHARED_DATA

MODEL is stories260K, which needs --data, or the name of a testbed model. The protocol is that of equal_parameters.py.
Prints a table for each.
"""

from __future__ import annotations

from equal_parameters import arguments, cases, dense_of, run

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
    parser = arguments(__doc__)
    for name, case in cases(parser, parser.parse_args()):
        dense = dense_of(case)
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

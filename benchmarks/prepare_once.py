"""What nine amounts cost over one, prepared once.

python benchmarks/prepare_once.py [MODEL] [--rows 256] [--block 64] [--repeat 3]

For each method: the time of one preparation and one amount, of the same preparation and nine amounts, and their ratio,
all from the same run: each preparation is timed together with the nine amounts that follow it, and the fastest of some
repetitions of each part counts, since other work on the machine can only add to a time. Calibration tokens are random:
no part of the work depends on what they say.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.slice import Slice
from mariotte.errors import MariotteError
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.step import Context, Step

AMOUNTS = tuple(n / 10 for n in range(1, 10))
GOAL = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="testbed/qwen2-1m", help="testbed/NAME, a folder or a hub id")
    parser.add_argument("--rows", type=int, default=256, help="rows of calibration text")
    parser.add_argument("--block", type=int, default=64, help="tokens in a row")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions, of which the fastest counts")
    options = parser.parse_args()
    try:
        model = load(options.model)
    except (MariotteError, FileNotFoundError) as error:
        parser.exit(2, f"no model to time: {error}; name another, such as a folder with a small Llama\n")
    tokens = torch.randint(
        0, model.shape.vocab, (options.rows, options.block), generator=torch.Generator().manual_seed(0)
    )
    print(f"{model.name}: {model.counts.n_params:,} parameters, {tokens.numel():,} calibration tokens, ", end="")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{'method':8} {'prepare s':>10} {'amount s':>9} {'one s':>7} {'nine s':>7} {'nine / one':>11}")
    for step in (Slice(), FFN()):
        prepare, amounts = fastest(step, model, tokens, options.repeat)
        one, nine = prepare + statistics.mean(amounts), prepare + sum(amounts)
        verdict = "" if nine / one <= GOAL else f"  above the goal of {GOAL}"
        print(
            f"{step.name():8} {prepare:10.3f} {one - prepare:9.4f} {one:7.3f} {nine:7.3f} {nine / one:11.2f}{verdict}"
        )


def fastest(step: Step, model: Model, tokens: torch.Tensor, repeat: int) -> tuple[float, list[float]]:
    """Seconds of the preparation and of each amount."""
    runs: list[list[float]] = []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(dense=model, scratch=Path(scratch), calibration=tokens)
            marks = [time.perf_counter()]
            prepared = step.prepare(model, context, AMOUNTS)
            marks.append(time.perf_counter())
            for amount in AMOUNTS:
                step.apply(model, prepared, amount, context)
                marks.append(time.perf_counter())
        runs.append([after - before for before, after in itertools.pairwise(marks)])
    prepare, *amounts = (min(part) for part in zip(*runs, strict=True))
    return prepare, amounts


if __name__ == "__main__":
    main()

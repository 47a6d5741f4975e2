"""Recovery by doublings, on which rules of stopping are judged: 4k to 128k tokens of LoRA after cuts of testbed models.

python benchmarks/recovery_doublings.py

Each line of benchmarks/results/recovery_doublings.csv is one model, cut and amount, none among the amounts: the loss on
the 64 rows of the validation split by which recoveries decide, and on 160 rows of the test split, in nats a token.
Text of calibration and recovery: testbed/all; seed 0; one thread. Curves that the file has are not made again. Half an
hour. `recovery_stopping.py` reads it.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import torch

from mariotte.data import corpora, tokens
from mariotte.experiments.pipeline import compress_model
from mariotte.models.load import load
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Counters, prepare_once
from mariotte.recover.methods.lora import LoRA
from mariotte.recover.stopping import HELD_ROWS
from mariotte.recover.stream import find_source

RESULTS = Path(__file__).parent / "results" / "recovery_doublings.csv"
COLUMNS = ("model", "cut", "tokens", "held_loss", "test_loss")
MODELS = ("qwen2-113k", "llama-146k", "llama-483k", "qwen2-345k", "qwen2-46k", "qwen2-1m", "llama-1m")
CUTS = ("slice@0.3", "prunenet-random@0.3", "ffn@0.5", "prunenet-random@0.7")
AMOUNTS = tuple(4_000 * 2**k for k in range(6))
CORPUS, ROWS, TEST_ROWS, BLOCK = "testbed/all", 256, 160, 64


def curve(model: str, cut: str) -> list[tuple[int, float, float]]:
    """Tokens, held-out loss and test loss of every amount."""
    dense = load(f"testbed/{model}")
    start = compress_model(dense, cut, calibration=CORPUS, rows=ROWS)
    step = LoRA()
    held_NT = find_source("lora", CORPUS, start).held_out(BLOCK, HELD_ROWS)
    test_NT = tokens.blocks(corpora.find(CORPUS), "test", dense.tokenizer, BLOCK)[:TEST_ROWS]
    with tempfile.TemporaryDirectory() as folder:
        context = Context(dense=dense, scratch=Path(folder), seed=0, corpus=CORPUS, block=BLOCK, counters=Counters())
        prepared = prepare_once(step, start, context, list(AMOUNTS))
        found = {0: start} | {amount: step.apply(start, prepared, amount, context) for amount in AMOUNTS}
    return [
        (amount, token_nll(m, held_NT).double().mean().item(), token_nll(m, test_NT).double().mean().item())
        for amount, m in found.items()
    ]


def main() -> None:
    torch.set_num_threads(1)
    done: set[tuple[str, str]] = set()
    if RESULTS.exists():
        with RESULTS.open(encoding="utf-8", newline="") as file:
            done = {(row["model"], row["cut"]) for row in csv.DictReader(file)}
    else:
        RESULTS.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    for cut in CUTS:
        for model in MODELS:
            if (model, cut) in done:
                continue
            rows = curve(model, cut)
            with RESULTS.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(
                    [model, cut, amount, f"{held:.6f}", f"{test:.6f}"] for amount, held, test in rows
                )
            print(model, cut, " ".join(f"{held:.4f}" for _, held, _ in rows), flush=True)


if __name__ == "__main__":
    main()

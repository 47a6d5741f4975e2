"""The loss of stories260K, a real model of 260,032 parameters trained on TinyStories, after slice, ffn and magnitude.

python benchmarks/stories260k.py SHARED_DATA

SHARED_DATA holds models/stories260K and tinystories/tinystories_sample.txt. The file is one token stream without
special tokens, cut into windows of 256: the first 128 calibrate, the last 200 test. Each loss is the mean over all
tokens of a window but its first. The model was trained on this text: losses of fit, not of generalisation.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.slice import Slice
from mariotte.models.load import load, load_tokenizer
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Step, prepare_once

WINDOW, CALIBRATION, TEST = 256, 128, 200
QUARTER = 68 / 172
"""Of the neurons: 65,280 weights in five blocks, 25.1 % of all parameters."""


def windows(data: Path) -> torch.Tensor:
    text = (data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(data / "models" / "stories260K")
    assert tokenizer is not None
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with models/ and tinystories/")
    data = parser.parse_args().data
    model = load(data / "models" / "stories260K")
    rows = windows(data)
    calibration, test = rows[:CALIBRATION], rows[-TEST:]
    dense = model.counts.n_params
    plan: list[tuple[Step, tuple[float, ...]]] = [
        (Slice(), (0.125, 0.25, 0.375, 0.5)),
        (Slice(compensate=False), (0.125, 0.25, 0.375, 0.5)),
        (FFN(), (QUARTER,)),
        (FFN(criterion="activation"), (QUARTER,)),
        (FFN(criterion="norm"), (QUARTER,)),
        (FFN(criterion="wanda"), (QUARTER,)),
        (FFN(criterion="taylor"), (QUARTER,)),
        (FFN(sequential=True, correct=0.0), (QUARTER,)),
        (FFN(sequential=True), (QUARTER,)),
        (FFN(sequential=True, correct=1.0), (QUARTER,)),
        (FFN(criterion="obs", compensate=False), (QUARTER,)),
        (FFN(criterion="activation", compensate=False), (QUARTER,)),
        (FFN(criterion="norm", compensate=False), (QUARTER,)),
        (Magnitude(), (0.25, 0.5)),
    ]
    print(f"{'chain':60} {'parameters':>10} {'ratio':>7} {'loss':>7}")
    print(f"{'dense':60} {dense:10,} {0:7.1%} {loss(model, test):7.3f}")
    for step, amounts in plan:
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(dense=model, scratch=Path(scratch), calibration=calibration)
            prepared = prepare_once(step, model, context, amounts)
            for amount in amounts:
                cut = step.apply(model, prepared, amount, context)
                left = cut.counts.n_params
                print(f"{step.link(round(amount, 4))!s:60} {left:10,} {1 - left / dense:7.1%} {loss(cut, test):7.3f}")


def loss(model: Model, test: torch.Tensor) -> float:
    return float(token_nll(model, test, batch=8).mean())


if __name__ == "__main__":
    main()

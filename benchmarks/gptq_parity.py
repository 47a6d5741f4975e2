"""Weights of gptq beside the published code on the same layers and inputs, and what quantizers cost in loss.

    python benchmarks/gptq_parity.py stories260K SHARED_DATA [--gptq CHECKOUT]
    python benchmarks/gptq_parity.py testbed/llama-1m [--gptq CHECKOUT]

The checkout holds IST-DASLab/gptq. Without it, only losses are printed. Models, calibration and test rows are those of
``unstructured_parity.py``.

The published class (``GPTQ`` of gptq.py, with the grid of quant.py) runs unchanged, in this process, on every matrix of
the dense model and what it reads of the calibration rows; our function gets the same matrix and the mean of the same
products. It expects CUDA: its synchronisation does nothing here. It computes in float32, ours in float64: the table
shows it as it is, and once more with its ``float()`` read as ``double()``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from unstructured_parity import loss, subject

from mariotte.compress.calibration import observe, outer
from mariotte.compress.methods.fp8 import FP8
from mariotte.compress.methods.gptq import GPTQ, gptq
from mariotte.compress.methods.int8 import Int8
from mariotte.compress.methods.rtn import RTN
from mariotte.models.model import Model
from mariotte.models.step import Context, Step, prepare_once

CASES: list[tuple[int, int | None, bool]] = [
    (4, None, False),
    (3, None, False),
    (2, None, False),
    (3, None, True),
    (3, 16, False),
    (3, 16, True),
]
"""Bits, group, act_order."""

LADDER: list[tuple[Step, int]] = [
    (Int8(), 8),
    (FP8(), 8),
    (RTN(), 4),
    (GPTQ(), 4),
    (GPTQ(act_order=True), 4),
    (RTN(), 3),
    (GPTQ(), 3),
    (GPTQ(act_order=True), 3),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="stories260K, or a Llama-shaped model such as testbed/llama-1m")
    parser.add_argument("data", type=Path, nargs="?", help="for stories260K: folder with models/ and tinystories/")
    parser.add_argument("--gptq", type=Path, help="checkout of IST-DASLab/gptq")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, calibration, test = subject(arguments.model, arguments.data)
    dense = loss(model, test)
    print(f"dense {arguments.model}: {model.counts.n_params:,} parameters, {model.counts.n_bytes:,} bytes, {dense:.4f}")
    print("| chain | loss | more than dense | bytes packed |\n|---|---|---|---|")
    for step, bits in LADDER:
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(dense=model, scratch=Path(scratch), calibration=calibration)
            found = step.apply(model, prepare_once(step, model, context, [bits]), bits, context)
        now = loss(found, test)
        print(f"| `{step.link(bits)}` | {now:.4f} | {now - dense:+.4f} | {found.counts.n_bytes:,} |", flush=True)
    if arguments.gptq is not None:
        compare(model, calibration, arguments.gptq)


def compare(model: Model, calibration: Tensor, checkout: Path) -> None:
    """Print the shares of weights that are equal."""
    sys.path.insert(0, str(checkout))
    torch.cuda.synchronize = lambda *_: None  # pyright: ignore
    theirs: Any = importlib.import_module("gptq")
    quant: Any = importlib.import_module("quant")
    inputs: dict[str, list[Tensor]] = {}
    paths = model.paths("all")
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(dense=model, scratch=Path(scratch), calibration=calibration)
        groups = {path: [matrix] for path, matrix in paths.items()}
        observe(model, context, "gptq", groups, lambda name, x_MI: inputs.setdefault(name, []).append(x_MI))
    print("| bits | group | act_order | float32: equal | worst matrix | float64: equal | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for bits, group, act_order in CASES:
        equal, count, worst, exact, largest = 0, 0, 1.0, 0, 0.0
        for path, matrix in paths.items():
            x_MI = torch.cat(inputs[path])
            weight_OI = matrix.weight.detach()
            moment_II = outer(x_MI.double()) / len(x_MI)
            ours = gptq(weight_OI.double(), moment_II, bits, torch.float64, group=group, act_order=act_order)
            for wide in (False, True):
                with published(wide):
                    layer = nn.Linear(*reversed(weight_OI.shape), bias=False)
                    layer.weight.data = weight_OI.double() if wide else weight_OI.clone()
                    runner = theirs.GPTQ(layer)
                    runner.quantizer = quant.Quantizer()
                    runner.quantizer.configure(bits, perchannel=True, sym=False, mse=False)
                    runner.add_batch(x_MI.double() if wide else x_MI, None)
                    # Blocks of whole groups: a group's scale is then that of weights which are up to date, as ours is.
                    size = group or -1
                    runner.fasterquant(
                        blocksize=group or 128, groupsize=size, actorder=act_order, static_groups=act_order
                    )
                same = torch.isclose(ours, layer.weight.data.double(), rtol=1e-4, atol=1e-6)
                if wide:
                    exact += int(same.sum())
                    largest = max(largest, float((ours - layer.weight.data).abs().max()))
                else:
                    equal, count = equal + int(same.sum()), count + same.numel()
                    worst = min(worst, float(same.double().mean()))
        cells = [bits, group or "row", act_order, f"{equal / count:.3%}", f"{worst:.3%}", f"{exact / count:.4%}"]
        print(f"| {' | '.join(map(str, cells))} | {largest:.1e} |", flush=True)


@contextlib.contextmanager
def published(wide: bool) -> Generator[None]:
    """While it lasts the published code is silent, and if asked computes in float64."""
    narrow = torch.Tensor.float
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        if wide:
            torch.set_default_dtype(torch.float64)
            torch.Tensor.float = torch.Tensor.double  # pyright: ignore
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            torch.Tensor.float = narrow  # pyright: ignore


if __name__ == "__main__":
    main()

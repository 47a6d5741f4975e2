"""Zeros, weights and loss of wanda and sparsegpt beside the published code, on the same model and calibration tokens.

    python benchmarks/unstructured_parity.py stories260K SHARED_DATA [--wanda CHECKOUT --sparsegpt CHECKOUT]
    python benchmarks/unstructured_parity.py testbed/llama-483k [--wanda CHECKOUT --sparsegpt CHECKOUT]

The checkouts hold locuslab/wanda and IST-DASLab/sparsegpt. Without them, only our side is printed. stories260K is
calibrated on 128 and tested on 200 windows of 256 tokens, those of ``stories260k.py``; a model of the testbed on 128
rows of its calibration text and 200 of its test text.

The published loops over blocks (``prune_wanda`` and ``prune_sparsegpt`` in wanda's lib/prune.py, the latter with the
class of sparsegpt.py itself) run unchanged, in this process, on our tokens. Newer transformers give blocks the rotary
angles, of which these loops know nothing: a hook adds them. They expect CUDA: its synchronisation does nothing here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import math
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mariotte.compress.methods.sparsegpt import SparseGPT
from mariotte.compress.methods.wanda import Wanda
from mariotte.data import corpora, tokens
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Step, prepare_once

ROWS, TEST = 128, 200
PLAN: list[tuple[type, float, str | None]] = [
    (Wanda, 0.5, None),
    (Wanda, 0.5, "2:4"),
    (Wanda, 0.7, None),
    (SparseGPT, 0.5, None),
    (SparseGPT, 0.5, "2:4"),
    (SparseGPT, 0.7, None),
]


def subject(name: str, data: Path | None) -> tuple[Model, Tensor, Tensor]:
    """A model with its calibration and test rows."""
    if name == "stories260K":
        from stories260k import windows

        assert data is not None, "stories260K needs the folder with models/ and tinystories/"
        rows = windows(data)
        return load(data / "models" / "stories260K"), rows[:ROWS], rows[-TEST:]
    model, corpus = load(name), corpora.find("testbed/all")
    assert model.tokenizer is not None
    calibration, test = (
        tokens.blocks(corpus, split, model.tokenizer, 64, count)
        for split, count in (("calibration", ROWS), ("test", TEST))
    )
    return model, calibration, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="stories260K, or a Llama-shaped model such as testbed/llama-483k")
    parser.add_argument("data", type=Path, nargs="?", help="for stories260K: folder with models/ and tinystories/")
    parser.add_argument("--wanda", type=Path, help="checkout of locuslab/wanda")
    parser.add_argument("--sparsegpt", type=Path, help="checkout of IST-DASLab/sparsegpt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, calibration, test = subject(arguments.model, arguments.data)
    published = Published(arguments.wanda, arguments.sparsegpt) if arguments.wanda and arguments.sparsegpt else None
    print(f"dense {arguments.model}: {model.counts.n_params:,} parameters, loss {loss(model, test):.4f}")
    columns = ["chain", "zeros", "loss", "seconds"]
    if published is not None:
        columns += ["published: zeros", "loss", "seconds", "equal mask", "worst matrix", "weights differ"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for method, amount, nm in PLAN:
        step: Step = method(nm=nm)
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(dense=model, scratch=Path(scratch), calibration=calibration)
            started = time.perf_counter()
            ours = step.apply(model, prepare_once(step, model, context, [amount]), amount, context)
            seconds = time.perf_counter() - started
        row = f"| `{step.link(amount)}` | {ours.zeros():,} | {loss(ours, test):.4f} | {seconds:.1f}"
        if published is not None:
            started = time.perf_counter()
            theirs = published.run(step.name(), model, calibration, amount, nm)
            seconds = time.perf_counter() - started
            row += f" | {theirs.zeros():,} | {loss(theirs, test):.4f} | {seconds:.1f} | {agreement(ours, theirs)}"
        print(f"{row} |", flush=True)


@torch.no_grad()
def agreement(ours: Model, theirs: Model) -> str:
    """Shares of equal mask entries, in all and in the worst matrix, and the relative difference of the weights."""
    equal, count, worst, squared, size = 0, 0, 1.0, 0.0, 0.0
    for mine, other in zip(ours.matrices("all"), theirs.matrices("all"), strict=True):
        same = (mine.weight == 0) == (other.weight == 0)
        equal, count = equal + int(same.sum()), count + same.numel()
        worst = min(worst, float(same.double().mean()))
        squared += float((mine.weight.double() - other.weight.double()).square().sum())
        size += float(other.weight.double().square().sum())
    return f"{equal / count:.3%} | {worst:.3%} | {math.sqrt(squared / size):.1e}"


def loss(model: Model, test: Tensor) -> float:
    return float(token_nll(model, test, batch=8).mean())


class Published:
    """The loops of the published code, with what they import and we lack in its place."""

    def __init__(self, wanda: Path, sparsegpt: Path) -> None:
        sys.path[:0] = [str(wanda), str(sparsegpt)]
        for name in ("datasets",):  # for corpora that are not read here
            if importlib.util.find_spec(name) is None:
                stub: Any = types.ModuleType(name)
                stub.load_dataset = None
                sys.modules[name] = stub
        torch.cuda.synchronize = lambda *_: None  # pyright: ignore
        self.prune: Any = importlib.import_module("lib.prune")
        original: Any = importlib.import_module("sparsegpt").SparseGPT

        class Layer(original):
            """The class of the original, under the argument names of the loop."""

            def fasterprune(self, sparsity: float, prune_n: int, prune_m: int, percdamp: float, blocksize: int) -> None:
                super().fasterprune(sparsity, prune_n, prune_m, blocksize, percdamp)

        self.prune.SparseGPT = Layer

    @torch.no_grad()
    def run(self, name: str, model: Model, rows: Tensor, amount: float, nm: str | None) -> Model:
        """The model pruned by the published code, called by the name of our method."""
        pruned = model.copy()
        hf: Any = pruned.hf
        hf.seqlen, hf.hf_device_map = rows.shape[1], {}
        angles = hf.model.rotary_emb(pruned.embeddings(rows[:1]), torch.arange(rows.shape[1])[None])
        hooks = [
            block.module.register_forward_pre_hook(
                lambda _module, arguments, beside: (arguments, {**beside, "position_embeddings": angles}),
                with_kwargs=True,
            )
            for block in pruned.blocks
        ]
        self.prune.get_loaders = lambda *_, **__: ([(row[None], None) for row in rows], None)
        arguments = types.SimpleNamespace(nsamples=len(rows), seed=0, sparsity_ratio=amount, use_variant=False)
        n, m = map(int, nm.split(":")) if nm else (0, 0)
        with contextlib.redirect_stdout(io.StringIO()):
            loop = self.prune.prune_wanda if name == "wanda" else self.prune.prune_sparsegpt
            loop(arguments, hf, None, torch.device("cpu"), prune_n=n, prune_m=m)
        for hook in hooks:
            hook.remove()
        return pruned


if __name__ == "__main__":
    main()

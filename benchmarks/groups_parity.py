"""LLM-Pruner and FLAP: our importances and choices beside those of the authors' code, on the same model and tokens.

python benchmarks/groups_parity.py LLM_PRUNER_CHECKOUT FLAP_CHECKOUT

The checkouts are of https://github.com/horseee/LLM-Pruner and https://github.com/CASIA-IVA-Lab/FLAP. Two models:
testbed llama-483k, whose heads have a key-value head each, as both programs expect, and a random Llama with heads 128
wide.

LLM-Pruner: its ``TaylorImportance`` is called with the groups that it would find: rows of gate and up with columns of
down; rows of query, key and value with columns of output, which are then summed over each head as its pruner does.
Gradients are left by one backward pass, squared ones by one a row, as in its ``hf_prune.py``.

FLAP: its ``prune_flap`` is run. Replaced around it: what loads the text, what cuts the model (its masks are kept), and
two things of today's transformers: blocks are handed rotary embeddings, and attention has no ``num_heads``. Its head
width, 128, stands in its source; for the testbed model the source is read with that model's. It is run as it is, and
with the variance of the paper's equation 5 in place of its running estimate, which leaves out the first row, takes each
row's deviations from the mean of the rows so far and weighs early rows less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from mariotte.compress.methods.flap import FLAP
from mariotte.compress.methods.llm_pruner import TAYLOR, LLMPruner
from mariotte.data import corpora, tokens
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step, prepare_once
from mariotte.testing.tiny import random_tokens, tiny

RATIOS = (0.2, 0.5)


def cases() -> list[tuple[str, Model, torch.Tensor]]:
    """Models and their calibration rows."""
    trained = load("testbed/llama-483k")
    rows = tokens.blocks(corpora.find("testbed/all"), "calibration", trained.tokenizer, 64, 64)
    wide = tiny("llama", layers=4, hidden=192, heads=6, kv_heads=6, head_dim=128, ffn=384)
    return [("llama-483k", trained, rows), ("random, heads 128 wide", wide, random_tokens(64, 64))]


def prepared(step: Step, model: Model, rows: torch.Tensor, scratch: str) -> list[dict[str, torch.Tensor]]:
    """What a step finds, block by block."""
    context = Context(dense=model, scratch=Path(scratch), calibration=rows)
    found: Prepared = prepare_once(step, model, context, [0.5])
    return [found.get(f"block-{index}") for index in range(len(model.blocks))]


def off(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference, in shares of the largest value of the block."""
    return max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def llm_pruner(checkout: Path, model: Model, rows: torch.Tensor, taylor: str) -> tuple[list[Any], list[Any]]:
    """Importances of heads and of neurons by the reference's own class, of every block."""
    for name in ("LLMPruner", "LLMPruner.pruner"):  # without what they import for other families
        package = sys.modules.setdefault(name, types.ModuleType(name))
        package.__path__ = [str(checkout / name.replace(".", "/"))]
    from LLMPruner.pruner import hf_llama_pruner as theirs  # pyright: ignore[reportMissingImports]

    hf = model.hf
    hf.zero_grad()
    for row in rows:
        hf(input_ids=row[None], labels=row[None]).loss.backward()
        for parameter in hf.parameters():
            square = parameter.grad * parameter.grad / len(rows)
            parameter.acc_grad = square + getattr(parameter, "acc_grad", 0)
        hf.zero_grad()
    hf(input_ids=rows, labels=rows).loss.backward()
    importance = theirs.TaylorImportance(group_reduction="sum", taylor=taylor)
    pruner = theirs.hf_linear_pruner

    def group(outputs: list[Any], inputs: Any) -> Any:
        handlers = [(m, pruner.prune_out_channels) for m in outputs] + [(inputs, pruner.prune_in_channels)]
        idxs = list(range(inputs.in_features))
        return [(SimpleNamespace(target=SimpleNamespace(module=m), handler=h), list(idxs)) for m, h in handlers]

    heads, neurons = [], []
    for block in model.blocks:
        of_rows = importance(group([block.query, block.key, block.value], block.output))
        heads.append(of_rows.view(model.shape.heads, -1).sum(1).detach())
        neurons.append(importance(group([block.gate, block.up], block.down)).detach())
    for parameter in hf.parameters():
        parameter.grad = None
        del parameter.acc_grad
    return heads, neurons


class Ran(SimpleNamespace):
    """Metrics and masks of the reference, by block."""

    attention: list[torch.Tensor]
    ffn: list[torch.Tensor]
    heads: list[torch.Tensor]
    neurons: list[torch.Tensor]


class Variance:
    """In place of the reference's statistics of inputs: their mean, and their variance times the tokens of a row."""

    def __init__(self, layer: Any, _metric: str) -> None:
        self.seen: list[torch.Tensor] = []

    def add_batch(self, x: torch.Tensor, _out: Any) -> None:
        """Keep the inputs of some rows."""
        self.seen.append(x.double())

    @property
    def baseline_inp(self) -> torch.Tensor:
        """Their mean."""
        return torch.cat(self.seen).flatten(0, -2).mean(0)

    @property
    def fluc_inp(self) -> torch.Tensor:
        """Their variance, as a sum over the tokens of a row."""
        x = torch.cat(self.seen)
        return x.flatten(0, -2).var(0, correction=0) * x.shape[-2]

    def free(self) -> None:
        """Let go of them."""
        self.seen.clear()


@torch.no_grad()
def flap(checkout: Path, model: Model, rows: torch.Tensor, structure: str, ratio: float, *, running: bool) -> Ran:
    """What the authors' code finds and chooses, with its running estimate of the variance, or with the variance."""
    width = model.shape.head_dim
    sys.modules.setdefault("datasets", types.ModuleType("datasets")).__dict__.setdefault("load_dataset", None)
    package = types.ModuleType("flap_lib")
    package.__path__ = [str(checkout / "lib")]
    sys.modules["flap_lib"] = package
    source = (checkout / "lib" / "prune.py").read_text(encoding="utf-8")
    source = source.replace("-1, 128)", f"-1, {width})").replace("512.0 / 3", f"{4 * width}.0 / 3")
    theirs: Any = types.ModuleType("flap_lib.prune")
    theirs.__package__ = "flap_lib"
    exec(compile(source, "prune.py", "exec"), theirs.__dict__)  # the file of the checkout that was named
    ran = Ran(attention=[], ffn=[], heads=[], neurons=[])
    own = theirs.metrics["WIFV"]

    def metric(wrapped: Any, subset: Any, name: str) -> Any:
        found = own(wrapped, subset, name)
        (ran.attention if name == "self_attn.o_proj" else ran.ffn).append(found.clone())
        return found

    def kept(_layer: Any, heads: Any, neurons: Any, *_a: Any, **_k: Any) -> None:
        ran.heads += [] if heads is None else [heads]
        ran.neurons += [] if neurons is None else [neurons]

    theirs.metrics["WIFV"], theirs.compress = metric, kept
    if not running:
        theirs.BiasGPT = Variance
    theirs.get_loaders = lambda *_a, **_k: ([(row[None], None) for row in rows], None)
    hf: Any = model.copy().hf
    hf.seqlen = rows.shape[1]
    for layer in hf.model.layers:
        forward = layer.forward
        layer.self_attn.num_heads = model.shape.heads

        def with_angles(x: Any, position_ids: Any = None, forward: Any = forward, **given: Any) -> Any:
            given.setdefault("position_embeddings", hf.model.rotary_emb(x, position_ids))
            return forward(x, position_ids=position_ids, **given)

        layer.forward = with_angles
    torch.Tensor.cuda = lambda self, *_: self  # sorting is done there
    arguments = SimpleNamespace(
        nsamples=len(rows),
        seed=0,
        metrics="WIFV",
        structure=structure,
        pruning_ratio=ratio,
        remove_heads=-1,
        unstr=False,
    )
    theirs.prune_flap(arguments, hf, None, torch.device("cpu"))
    return ran


def masks_differ(step: FLAP, model: Model, found: list[Any], theirs: Ran, ratio: float) -> tuple[int, int]:
    """Heads and neurons on which the two disagree."""
    shape = model.shape
    if step.uniform:
        count, width = (n - int(ratio * n) for n in (shape.heads, shape.ffn))
        heads = [f["attention"].view(shape.heads, -1).sum(1).argsort(descending=True)[:count].tolist() for f in found]
        neurons = [f["ffn"].argsort(descending=True)[:width].tolist() for f in found]
    else:
        heads, neurons = step._adaptive(model, found, ratio)
    differ = [0, 0]
    for index in range(shape.layers):
        for place, (ours, mask) in enumerate(((heads, theirs.heads), (neurons, theirs.neurons))):
            differ[place] += len(set(ours[index]) ^ set(mask[index].nonzero().flatten().tolist()))
    return differ[0], differ[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llm_pruner", type=Path)
    parser.add_argument("flap", type=Path)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, float32")
    for name, model, rows in cases():
        shape = model.shape
        print(
            f"\n{name}: {shape.layers} blocks of {shape.heads} heads and {shape.ffn} neurons, {rows.numel():,} tokens"
        )
        for taylor in TAYLOR:
            with tempfile.TemporaryDirectory() as scratch:
                ours = prepared(LLMPruner(taylor=taylor, first=0, last=0), model, rows, scratch)
            heads, neurons = llm_pruner(given.llm_pruner, model, rows, taylor)
            print(
                f"llm-pruner, {taylor}: heads {off([f['attention'] for f in ours], heads):.1e}, "
                f"neurons {off([f['ffn'] for f in ours], neurons):.1e}"
            )
        for structure, uniform in (("AL-AM", False), ("UL-UM", True)):
            step = FLAP(uniform=uniform, round_to=1)
            with tempfile.TemporaryDirectory() as scratch:
                ours = prepared(step, model, rows, scratch)
            for ratio, running in ((ratio, running) for running in (True, False) for ratio in RATIOS):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    theirs = flap(given.flap, model, rows, structure, ratio, running=running)
                # A sum over the tokens of a row there, a mean here; of attention ours is squared already.
                scale = rows.shape[1]
                differences = (
                    off([f["attention"].sqrt() * scale for f in ours], theirs.attention),
                    off([f["ffn"] * scale for f in ours], theirs.ffn),
                )
                gone = [sum(int((~mask).sum()) for mask in masks) for masks in (theirs.heads, theirs.neurons)]
                heads_off, neurons_off = masks_differ(step, model, ours, theirs, ratio)
                how = "as it is" if running else "variance"
                print(
                    f"flap, {structure}, {ratio:.0%}, {how}: metric of attention {differences[0]:.1e}, of MLPs "
                    f"{differences[1]:.1e}; {gone[0]} heads and {gone[1]} neurons go, masks differ in {heads_off} and "
                    f"{neurons_off}"
                )


if __name__ == "__main__":
    main()

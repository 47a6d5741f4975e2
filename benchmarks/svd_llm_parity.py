"""The factors of svd-llm beside those of the published code, on the same model and tokens.

python benchmarks/svd_llm_parity.py CHECKOUT SHARED_DATA

CHECKOUT holds https://github.com/AIoT-MLSys-Lab/SVD-LLM; what it imports besides torch is replaced, as its functions
that find the whitening and factor the matrices need none of it. They run in this process, in float32 on the CPU.
SHARED_DATA holds models/stories260K and tinystories/tinystories_sample.txt, whose first 128 windows of 256 tokens
calibrate and whose last 200 test; the tiny model is a random llama of two layers, width 32, and its tokens are random.

Compared are what each factored matrix gives on the calibration text, in shares of the norm of what both give, and the
loss of the dense model with the products in place of its matrices.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from equal_parameters import stories
from stand_ins import stand_ins
from torch import Tensor

from mariotte.compress.calibration import second_moments
from mariotte.compress.methods.svd_llm import SVDLLM
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, prepare_once
from mariotte.testing.tiny import random_tokens, tiny

AMOUNTS = (0.2, 0.4, 0.6)


def published(checkout: Path) -> Any:
    """The published module, with stand-ins for what it imports and does not need here."""
    unused = {
        "utils.data_utils": (),
        "evaluater": (),
        "component.svd_mistral": ("SVD_MistralAttention", "SVD_MistralMLP"),
        "component.svd_opt": ("SVDOPTDecoderLayer",),
    }
    sys.path.insert(0, str(checkout))
    spec = importlib.util.spec_from_file_location("published_svd_llm", checkout / "SVDLLM.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with stand_ins(unused):
        spec.loader.exec_module(module)
    return module


def theirs(module: Any, model: Model, tokens_NT: Tensor, amount: float) -> list[dict[str, Tensor]]:
    """The products of the published factors, by the path of the matrix in each block, and the ranks."""
    hf = copy.deepcopy(model.hf)
    whitening = module.profle_svdllm("llama", hf, [{"input_ids": rows} for rows in tokens_NT.split(16)], "cpu")
    module.whitening("llama", hf, whitening, 1 - amount, "cpu")
    found: list[dict[str, Tensor]] = []
    for layer in hf.model.layers:
        products: dict[str, Tensor] = {}
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            held = getattr(layer, part)
            for name in names:
                second, first = getattr(held, f"{name}_u_proj").weight, getattr(held, f"{name}_v_proj").weight
                products[f"{part}.{name}_proj"] = (second @ first).detach()
                assert len(first) == second.shape[1]
        found.append(products)
    return found


@torch.no_grad()
def with_products(model: Model, products: list[dict[str, Tensor]]) -> Model:
    """The dense model with these matrices in place of its own."""
    changed = model.copy()
    for block, some in zip(changed.blocks, products, strict=True):
        for path, product in some.items():
            block.module.get_submodule(path).weight.copy_(product)
    return changed


@torch.no_grad()
def rows(module: Any, name: str, model: Model, calibration_NT: Tensor, test_NT: Tensor) -> list[str]:
    """The table of one model."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(dense=model, scratch=Path(scratch), calibration=calibration_NT)
        prepared = prepare_once(SVDLLM(), model, context, AMOUNTS)
        moments = [
            second_moments(model, context, "parity", {path: [block.module.get_submodule(path)] for path in paths})
            for block in model.blocks
            for paths in [(*block.entry.attention_paths, *block.entry.ffn_paths)]
        ]
        for amount in AMOUNTS:
            cut = SVDLLM().apply(model, prepared, amount, context)
            reference = theirs(module, model, calibration_NT, amount)
            apart: list[float] = []
            for block, some, moment in zip(cut.blocks, reference, moments, strict=True):
                for path, product in some.items():
                    (_, first), (_, second) = block.factors(path)
                    ours = second.weight.double() @ first.weight.double()
                    missing, gram = ours - product.double(), moment[path]
                    share = ((missing @ gram) * missing).sum() / ((ours @ gram) * ours).sum()
                    apart.append(float(share.clamp(min=0).sqrt()))
            losses = [
                float(token_nll(m, test_NT, batch=8).double().mean()) for m in (cut, with_products(model, reference))
            ]
            lines.append(
                f"| {name} | {amount:.0%} | {cut.counts.n_params:,} | {max(apart):.1e} | {losses[0]:.6f} | "
                f"{losses[1]:.6f} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    module = published(given.checkout)
    print("| model | amount | parameters | outputs apart, at most | loss, ours | loss, published |")
    print("|---|---|---|---|---|---|")
    for heads in (4, 2):
        model = tiny("llama", kv_heads=heads)
        rows(
            module,
            f"tiny llama, {heads} of 4 key-value heads",
            model,
            random_tokens(64, 24),
            random_tokens(64, 24, seed=1),
        )
    case = stories(given.data)
    rows(module, "stories260K", case.model, case.calibration_NT, case.test_NT)


if __name__ == "__main__":
    main()

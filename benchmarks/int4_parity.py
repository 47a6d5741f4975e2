"""int4 beside torchao's layer of four-bit integers for CPUs: weights to the bit, losses and logits in bfloat16.

    python benchmarks/int4_parity.py [--models qwen2-1m qwen2-2m] [--group 32]

torchao's ``Int4WeightOnlyConfig``, whose layout `int4` packs, runs on NVIDIA GPUs alone. Its layer for CPUs
(``Int4OpaqueTensor``) has the same levels and another layout: each matrix in scope is packed by it and multiplied with
the unit vectors, which gives what its kernel computes with. Compared are weights rounded once, and those of `int4`, of
which packing gives the same again; then the whole model, its layers exchanged, on 100 rows of the testbed.
"""

from __future__ import annotations

import argparse
import platform

import torch
from torch import Tensor, nn
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

from mariotte.data import corpora, tokens
from mariotte.models import packed
from mariotte.models.load import load
from mariotte.models.nll import token_nll

ROWS, BLOCK = 100, 64


def held(weight_OI: Tensor, group: int) -> Int4OpaqueTensor:
    """A matrix as torchao's layer for CPUs holds it."""
    return Int4OpaqueTensor.from_hp(weight_OI, [1, group])


def read_back(weight_OI: Tensor, group: int) -> Tensor:
    """What its kernel computes with, (O, I)."""
    unit = torch.eye(weight_OI.shape[1], dtype=torch.bfloat16)
    return nn.functional.linear(unit, held(weight_OI, group)).T


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen2-1m", "qwen2-2m"])
    parser.add_argument("--group", type=int, default=32)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}; group={arguments.group}\n")
    columns = "matrices | weights | once: equal | int4: packed again equal | groups that moved | loss dense | int4"
    print(f"| model | {columns} | by torchao's layers | largest logit difference |\n|{'---|' * 10}")
    for name in arguments.models:
        model = load(f"testbed/{name}", dtype="bfloat16")
        rows = tokens.blocks(corpora.find("testbed/all"), "test", model.tokenizer, BLOCK, ROWS)
        ours, theirs = model.copy(), model.copy()
        equal = again = total = moved = groups = 0
        for path, matrix in model.paths("all").items():
            weight_OI, group = matrix.weight.detach(), arguments.group
            once = packed.int4_values(*packed.int4_levels(weight_OI.reshape(-1, group))).view(weight_OI.shape)
            settled = packed.round_int4(weight_OI, group)
            equal += int((once == read_back(weight_OI, group)).sum())
            again += int((settled == read_back(settled, group)).sum())
            total += weight_OI.numel()
            moved += int((once != settled).view(-1, group).any(1).sum())
            groups += weight_OI.numel() // group
            ours.hf.get_submodule(path).weight.copy_(settled)
            theirs.hf.get_submodule(path).weight = nn.Parameter(held(settled, group), requires_grad=False)
        losses = [float(token_nll(each, rows).double().mean()) for each in (model, ours, theirs)]
        expected, found = (each.logits(rows[:8]).float() for each in (ours, theirs))
        worst = float((found - expected).abs().max() / expected.abs().max())
        print(
            f"| {name} | {len(model.paths('all'))} | {total:,} | {equal / total:.4%} | {again / total:.4%} | "
            f"{moved / groups:.1%} | {' | '.join(f'{loss:.4f}' for loss in losses)} | {worst:.2g} |"
        )


if __name__ == "__main__":
    main()

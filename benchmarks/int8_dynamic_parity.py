"""int8-dynamic beside torch's own dynamic quantization on the testbed's encoders: logits, loss, choices and facts.

    python benchmarks/int8_dynamic_parity.py [--models bert-181k bert-459k]

Test sentences are 400 of the testbed, each word of each masked in its turn; a choice is the likeliest of four words,
the masked one and three drawn at random; facts are the testbed's 2,560, asked through patterns that were seen in
training and through held-out ones. torch's side is ``torch.ao.quantization.quantize_dynamic`` on the linear layers in
scope, its int8 kernels included. Its scale serves a whole batch: both sides read the same batches. "moved" is torch's
own with embeddings moved by 1e-7 of their size: how much rounding makes of a difference that is none. "one layer" is
the largest difference of a single layer of scheme=torch that is given what torch's own reads, relative to its largest
output.
"""

from __future__ import annotations

import argparse
import copy
import platform
import warnings

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from mariotte.compress.methods.int8_dynamic import round_whole_matrix
from mariotte.compress.quantize import round_absmax
from mariotte.models.dynamic import wrap_
from mariotte.testbed import zoo
from mariotte.testbed.world import Row, World
from mariotte.training.cloze import gap_logits, padded
from mariotte.training.zoo import facts_known

SENTENCES = 400
BATCH = 500


def each_word_hidden(rows: list[Row], world: World) -> tuple[Tensor, Tensor]:
    """Every sentence as often as it has words, another of them hidden each time, as ``~id``; and the hidden ids."""
    ids = [[*row.ids[:i], ~row.ids[i], *row.ids[i + 1 :]] for row in rows for i in range(1, len(row.ids))]
    tokens_NT = padded(ids, world)
    return tokens_NT, ~tokens_NT[tokens_NT < 0]


def layers(hf: nn.Module, scope: str) -> list[str]:
    """Paths of the linear layers in scope."""
    if scope == "head":
        return ["cls.predictions.decoder"]
    linear = [
        name for name, module in hf.named_modules() if isinstance(module, nn.Linear) and name.startswith("bert.encoder")
    ]
    return [name for name in linear if scope == "all" or (scope == "attention") == (".attention." in name)]


@torch.no_grad()
def ours(dense: nn.Module, names: list[str], scheme: str) -> nn.Module:
    hf = copy.deepcopy(dense)
    for name in names:
        weight = hf.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(round_whole_matrix(weight) if scheme == "torch" else round_absmax(weight, 8, torch.float32))
    wrap_(hf, names, scheme)
    return hf


def theirs(dense: nn.Module, names: list[str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), set(names), dtype=torch.qint8)


@torch.no_grad()
def moved(hf: nn.Module) -> nn.Module:
    """The same model with embeddings moved by 1e-7 of their size."""
    weight = hf.get_input_embeddings().weight
    weight.mul_(1 + 1e-7 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return hf


@torch.no_grad()
def one_layer(reference: nn.Module, other: nn.Module, names: list[str], tokens_NT: Tensor, world: World) -> float:
    """Largest difference of a layer of `other` that reads what that of `reference` does, by its largest output."""
    worst = 0.0

    def compare(name: str, given: tuple[Tensor, ...], expected: Tensor) -> None:
        nonlocal worst
        off = (other.get_submodule(name)(*given) - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(off))

    hooks = [
        reference.get_submodule(name).register_forward_hook(lambda _, given, out, name=name: compare(name, given, out))
        for name in names
    ]
    gap_logits(reference, tokens_NT, world)
    for hook in hooks:
        hook.remove()
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[name for name in zoo.shipped() if name.startswith("bert")])
    arguments = parser.parse_args()
    world = World()
    facts = world.facts()
    tokens_NT, answers_N = each_word_hidden(world.sentences("all", "test", SENTENCES), world)
    drawn_N3 = torch.randint(len(world.vocabulary), (len(answers_N), 3), generator=torch.Generator().manual_seed(1))
    choices_N4 = torch.cat([answers_N[:, None], drawn_N3], 1)
    engine = torch.backends.quantized.engine
    print(f"torch {torch.__version__}, engine {engine}, {platform.machine()}; {len(answers_N)} masked words")
    for model in arguments.models:
        dense = AutoModelForMaskedLM.from_pretrained(zoo.path(model), dtype=torch.float32).eval()
        # The final layer rounds by itself, and the embeddings that it was tied to do not.
        decoder = dense.get_output_embeddings()
        decoder.weight = nn.Parameter(decoder.weight.detach().clone())
        columns = (
            "scope | model | loss | top-1 | choice | facts seen | held out | largest logit difference from torch's"
        )
        print(f"\n{model}\n\n| {columns} | median | top-1 as torch's |\n|{'---|' * 10}")
        alone: list[str] = []
        for scope in ("all", "attention", "ffn", "head"):
            names = layers(dense, scope)
            sides = {
                "dense": dense,
                "torch's own": theirs(dense, names),
                "moved": moved(theirs(dense, names)),
                "scheme=torch": ours(dense, names, "torch"),
                "scheme=token": ours(dense, names, "token"),
            }
            reference_NV = gap_logits(sides["torch's own"], tokens_NT, world)
            for side, module in sides.items():
                found_NV = gap_logits(module, tokens_NT, world)
                known = facts_known(module, world, facts)
                gap_NV = (found_NV - reference_NV).abs()
                measured = (
                    f"{nn.functional.cross_entropy(found_NV, answers_N):.5f}",
                    f"{(found_NV.argmax(1) == answers_N).double().mean():.4f}",
                    f"{(found_NV.gather(1, choices_N4).argmax(1) == 0).double().mean():.4f}",
                    f"{known['seen']:.4f}",
                    f"{known['heldout']:.4f}",
                    f"{gap_NV.max():.2g}",
                    f"{gap_NV.median():.2g}",
                    f"{(found_NV.argmax(1) == reference_NV.argmax(1)).double().mean():.4f}",
                )
                print(f"| {scope} ({len(names)} layers) | {side} | {' | '.join(measured)} |")
            off = one_layer(sides["torch's own"], sides["scheme=torch"], names, tokens_NT[:BATCH], world)
            alone.append(f"{scope} {off:.1g}")
        print(f"\none layer: {', '.join(alone)}")


if __name__ == "__main__":
    main()

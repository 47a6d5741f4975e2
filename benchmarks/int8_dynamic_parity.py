"""int8-dynamic beside torch's own dynamic quantization on a tiny BERT: logits, loss and choices on the same rows.

    python benchmarks/int8_dynamic_parity.py [--steps 1500]

The BERT (64 wide, 3 blocks) is made here and trained for some seconds on the testbed's text, so that it has something
to lose. Test rows are 200 of the testbed, in which every sixth word is masked; a choice is the likeliest of four words,
the masked one and three drawn at random. torch's side is ``torch.ao.quantization.quantize_dynamic`` on the linear
layers in scope, its int8 kernels included. Its scale serves a whole batch: both sides read the same batches of 20 rows.
"""

from __future__ import annotations

import argparse
import copy
import platform
import warnings

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from mariotte.compress.methods.int8_dynamic import round_whole_matrix
from mariotte.compress.quantize import round_absmax
from mariotte.models.dynamic import wrap_
from mariotte.testbed.world import World

MASK_EVERY = 6
BATCH = 20
LEARNING_RATE = 3e-3


def masked(tokens_NT: Tensor, mask: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows with every sixth word masked, and where."""
    where_NT = torch.rand(tokens_NT.shape, generator=generator) < 1 / MASK_EVERY
    where_NT[:, 0] = False
    return tokens_NT.masked_fill(where_NT, mask), where_NT


def train(hf: BertForMaskedLM, tokens_NT: Tensor, mask: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    hf.train()
    for step in range(steps):
        rows_BT = tokens_NT[torch.randint(len(tokens_NT), (16,), generator=generator)]
        read_BT, where_BT = masked(rows_BT, mask, generator)
        loss = nn.functional.cross_entropy(hf(input_ids=read_BT).logits[where_BT], rows_BT[where_BT])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss:.3f}")
    hf.eval()


def layers(hf: BertForMaskedLM, scope: str) -> list[str]:
    """Paths of the linear layers in scope."""
    if scope == "head":
        return ["cls.predictions.decoder"]
    linear = [
        name for name, module in hf.named_modules() if isinstance(module, nn.Linear) and name.startswith("bert.encoder")
    ]
    return [name for name in linear if scope == "all" or (scope == "attention") == (".attention." in name)]


@torch.no_grad()
def ours(dense: BertForMaskedLM, names: list[str], scheme: str) -> BertForMaskedLM:
    hf = copy.deepcopy(dense)
    for name in names:
        weight = hf.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(round_whole_matrix(weight) if scheme == "torch" else round_absmax(weight, 8, torch.float32))
    wrap_(hf, names, scheme)
    return hf


def theirs(dense: BertForMaskedLM, names: list[str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), set(names), dtype=torch.qint8)


@torch.no_grad()
def logits(hf: nn.Module, read_NT: Tensor) -> Tensor:
    return torch.cat([hf(input_ids=read_BT).logits for read_BT in read_NT.split(BATCH)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    world = World()
    train_NT = torch.from_numpy(world.tokens("encyclopedia", "train", 4000)).long()
    test_NT = torch.from_numpy(world.tokens("encyclopedia", "test", 200)).long()
    mask = len(world.vocabulary)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=mask + 1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    dense = BertForMaskedLM(config)
    train(dense, train_NT, mask, arguments.steps)
    generator = torch.Generator().manual_seed(1)
    read_NT, where_NT = masked(test_NT, mask, generator)
    answers_M = test_NT[where_NT]
    choices_MC = torch.cat([answers_M[:, None], torch.randint(mask, (len(answers_M), 3), generator=generator)], 1)
    dense_MV = logits(dense, read_NT)[where_NT]
    engine = torch.backends.quantized.engine
    print(f"torch {torch.__version__}, engine {engine}, {platform.machine()}; {len(answers_M)} masked words")
    print(
        "| scope | model | loss | top-1 | choice | largest logit difference from torch's | median | top-1 as torch's |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for scope in ("all", "attention", "ffn", "head"):
        names = layers(dense, scope)
        reference_MV = logits(theirs(dense, names), read_NT)[where_NT]
        sides = {
            "dense": dense_MV,
            "torch's own": reference_MV,
            "scheme=torch": logits(ours(dense, names, "torch"), read_NT)[where_NT],
            "scheme=token": logits(ours(dense, names, "token"), read_NT)[where_NT],
        }
        for name, found_MV in sides.items():
            loss = nn.functional.cross_entropy(found_MV, answers_M)
            top = (found_MV.argmax(1) == answers_M).double().mean()
            choice = (found_MV.gather(1, choices_MC).argmax(1) == 0).double().mean()
            gap_MV = (found_MV - reference_MV).abs()
            same = (found_MV.argmax(1) == reference_MV.argmax(1)).double().mean()
            measured = (
                f"{loss:.5f} | {top:.4f} | {choice:.4f} | {gap_MV.max():.2g} | {gap_MV.median():.2g} | {same:.4f}"
            )
            print(f"| {scope} ({len(names)} layers) | {name} | {measured} |")


if __name__ == "__main__":
    main()

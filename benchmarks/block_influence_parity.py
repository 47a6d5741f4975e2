"""Block influence: ours beside that of a public ShortGPT implementation, on the same model and tokens.

python benchmarks/block_influence_parity.py SHARED_DATA [CHECKOUT_OF_SHORTGPT]

SHARED_DATA holds models/stories260K and tinystories/tinystories_sample.txt; the first 128 windows of 256 tokens are
used. CHECKOUT_OF_SHORTGPT is one of https://github.com/sramshetty/ShortGPT. Its own accumulation of importances is
called, on hidden states that transformers returns; the package that it loads Llama with is not needed for that, and is
replaced by an empty one. The last hidden state that transformers returns has passed the final norm: the reference
takes the one before it, and so is given that. Its importances are sums over tokens, divided here by their number.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import transformers

from mariotte.compress.influence import block_influence
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.step import Context

WINDOW, ROWS = 256, 128


@torch.no_grad()
def hidden_states(model: Model, rows: torch.Tensor) -> list[torch.Tensor]:
    """The stream before the first block and after each, (B, T, D)."""
    before_norm: list[torch.Tensor] = []
    handle = model.final_norm.register_forward_pre_hook(lambda _module, x: before_norm.append(x[0]))
    try:
        states = model.hf(input_ids=rows, output_hidden_states=True, use_cache=False).hidden_states
    finally:
        handle.remove()
    return [*states[:-1], before_norm[0]]


def reference(checkout: Path, model: Model, tokens: torch.Tensor) -> list[float]:
    """Importances by the reference's own class."""
    stub: Any = types.ModuleType("llama")
    stub.Llama, stub.Transformer = object, torch.nn.Module
    sys.modules["llama"] = stub
    sys.path.insert(0, str(checkout / "short_gpt"))
    from short_llama import ShortLlama  # pyright: ignore[reportMissingImports]

    short = ShortLlama.__new__(ShortLlama)
    short.importances = [0.0] * len(model.blocks)
    for rows in tokens.split(4):
        short.compute_bi(hidden_states(model, rows), angular=False)
    return [total / tokens.numel() for total in short.importances]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with models/ and tinystories/")
    parser.add_argument("checkout", type=Path, nargs="?", help="checkout of the reference")
    arguments = parser.parse_args()
    model = load(arguments.data / "models" / "stories260K")
    assert model.tokenizer is not None
    text = (arguments.data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    tokens = ids[: ROWS * WINDOW].view(ROWS, WINDOW)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(dense=model, scratch=Path(scratch), calibration=tokens)
        ours = block_influence(model, context, "shortgpt").tolist()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {tokens.numel():,} tokens, float32")
    theirs = reference(arguments.checkout, model, tokens) if arguments.checkout else [float("nan")] * len(ours)
    print(f"{'block':>5} {'ours':>12} {'reference':>12} {'difference':>12}")
    for block, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        print(f"{block:5} {mine:12.8f} {other:12.8f} {mine - other:12.1e}")


if __name__ == "__main__":
    main()

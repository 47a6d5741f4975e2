"""Peak memory of the testbed's models: what shapes say beside what was measured.

    python benchmarks/memory.py --batch 8 --prompt 64 --new 16

Predicted are the weights, the cache, and the activations that are alive at once where most are: of the MLP, the stream
and its normed copy (2 D) and gate, up and their product (3 F); of attention, the same two and query, key, value, the
output and what rotation makes on the way (6 N H + 4 K H); of the head, a row of logits a sequence. Allocator, code and
tables are not predicted; the measure takes the baseline of its process away, so that they should hardly be in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mariotte.architectures import Shape
from mariotte.evaluate.measures.memory import Memory, kv_bytes
from mariotte.experiments.environment import environment
from mariotte.models.load import load

LADDER = ("qwen2-46k", "qwen2-113k", "llama-146k", "qwen2-345k", "llama-483k", "qwen2-1m", "llama-1m", "qwen2-2m")


def activations(shape: Shape, batch: int, tokens: int, itemsize: int) -> int:
    """Bytes alive at once where most are, when `tokens` of each of `batch` sequences are read in one pass."""
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp = 3 * max(shape.ffn_of(layer) for layer in range(shape.layers))
    alive = batch * tokens * (2 * shape.hidden + max(mlp, 6 * query + 4 * keys))
    return itemsize * max(alive, batch * (shape.vocab + tokens * shape.hidden))


def row(name: str, measure: Memory) -> dict[str, Any]:
    """One model, predicted and measured."""
    model = load(name)
    itemsize, shape = model.hf.dtype.itemsize, model.shape
    weights, token = model.counts.n_params * itemsize, kv_bytes(shape, itemsize) * measure.batch
    predicted = {
        "prefill": weights + token * measure.prompt + activations(shape, measure.batch, measure.prompt, itemsize),
        "decode": weights + token * (measure.prompt + measure.new) + activations(shape, measure.batch, 1, itemsize),
    }
    found = measure.measure(model)
    return {"model": name, "weights": weights, "predicted": predicted, "metrics": dict(found.metrics)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[f"testbed/{name}" for name in LADDER])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    measure = Memory(batch=asked.batch, prompt=asked.prompt, new=asked.new)
    rows: list[dict[str, Any]] = []
    print(
        f"{'model':24}{'weights':>10}"
        + "".join(f"{part + ' predicted, measured, ratio':>40}" for part in ("prefill", "decode"))
    )
    for name in asked.models:
        one = row(name, measure)
        rows.append(one)
        shown = f"{name:24}{one['weights'] / 1e6:8.2f}MB"
        for part in ("prefill", "decode"):
            predicted, measured = one["predicted"][part], one["metrics"][f"{part}_peak_bytes"]
            shown += f"{predicted / 1e6:18.2f}{measured / 1e6:11.2f}{measured / predicted:11.2f}"
        print(shown, flush=True)
    if asked.out:
        protocol = {"batch": asked.batch, "prompt": asked.prompt, "new": asked.new}
        text = json.dumps({"protocol": protocol, "environment": environment("cpu"), "rows": rows}, indent=2)
        asked.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

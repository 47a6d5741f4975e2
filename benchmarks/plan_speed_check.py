"""Whether predicted speeds are those of the machine: decoding and prompts of dense and cut shapes, beside the roofline.

    python benchmarks/plan_speed_check.py     writes results/plan_speed_check.md

Shapes are Llama's with random weights: speed does not depend on them. Calibration and measurement take the processor's
time of one thread, since the machine is shared; the roofline is calibrated as ``mariotte doctor --bench`` does.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from mariotte.chain import parse
from mariotte.cli.doctor import measure_speed
from mariotte.locate import config_of
from mariotte.plan.speed import decode_seconds, prompt_seconds
from mariotte.shapes import Sized, left_by

RESULTS = Path(__file__).parent / "results"
CONTEXT = 256
CHAINS = ("dense", "ffn@0.5", "shortgpt@0.5", "slice@0.5", "ffn@0.25", "slice@0.25")
DECODED, READ = 15, 5
"""Timings of each, of which the least counts."""


def llama(hidden: int, layers: int, ffn: int, vocab: int = 8000) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "max_position_embeddings": 1024,
    }


MODELS = {
    "testbed/llama-1m": config_of("testbed/llama-1m") | {"dtype": "float32", "max_position_embeddings": 1024},
    "llama 256 x 8": llama(256, 8, 704),
    "llama 512 x 8": llama(512, 8, 1408),
    "llama 1024 x 8": llama(1024, 8, 2816),
}


def built(config: dict[str, Any], shape: Any) -> Any:
    """A transformers model of a shape, with random weights."""
    sizes = config | {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.ffn,
        "tie_word_embeddings": shape.tied,
        "head_dim": shape.head_dim,
    }
    sizes.pop("model_type")
    sizes.pop("architectures", None)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).float().eval()


@torch.no_grad()
def measured(model: Any) -> tuple[float, float]:
    """Seconds of a decoding step after `CONTEXT` tokens, and of reading a prompt of so many."""
    ids = torch.randint(0, model.config.vocab_size, (1, CONTEXT))

    def prompt() -> Any:
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    read: list[float] = []
    for _ in range(READ):
        began = time.process_time()
        cache = prompt()
        read.append(time.process_time() - began)
    step: list[float] = []
    for _ in range(DECODED):
        began = time.process_time()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        step.append(time.process_time() - began)
        cache.crop(-1)
    return min(step), min(read)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    calibration = measure_speed("cpu", None, clock=time.process_time)
    lines = [
        "# Are predicted speeds those of the machine?",
        "",
        f"Decoding one sequence after {CONTEXT} tokens, and reading a prompt of {CONTEXT}: Llama shapes with random",
        "weights, float32, one thread, processor's time (the machine is shared), least of several. Calibration:",
        f"{calibration.flops_per_s / 1e9:.1f} GFLOP/s, {calibration.bytes_per_s / 1e9:.1f} GB/s, "
        f"{calibration.operation_s * 1e6:.1f} us an operation"
        + ("." if calibration.block_s is None else f", {calibration.block_s * 1e6:.0f} us a block.")
        + f" torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores.",
        "",
        "Ratios are predicted / measured; speed-ups are over the dense model of the same shape.",
        "",
        "| shape | chain | step measured, ms | predicted / measured | speed-up measured | predicted | ratio "
        "| prompt measured, ms | predicted / measured | speed-up measured | predicted | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    off: dict[str, list[float]] = {"decoding": [], "prompt": []}
    for name, config in MODELS.items():
        sized = Sized.of(name, config)
        dense: tuple[float, float, float, float] | None = None
        for chain in CHAINS:
            left = left_by(sized, parse(chain))
            assert left is not None, chain
            step, read = measured(built(config, left.shape))
            step_p = decode_seconds(sized, left, CONTEXT, 1, calibration)
            read_p = prompt_seconds(left.shape, CONTEXT, calibration)
            dense = dense or (step, step_p, read, read_p)
            faster, faster_p = dense[0] / step, dense[1] / step_p
            sooner, sooner_p = dense[2] / read, dense[3] / read_p
            if chain != "dense":
                off["decoding"].append(faster_p / faster)
                off["prompt"].append(sooner_p / sooner)
            lines.append(
                f"| {name} | {chain} | {1e3 * step:.2f} | {step_p / step:.2f} | {faster:.2f} | {faster_p:.2f} "
                f"| {faster_p / faster:.2f} | {1e3 * read:.1f} | {read_p / read:.2f} | {sooner:.2f} | {sooner_p:.2f} "
                f"| {sooner_p / sooner:.2f} |"
            )
            print(lines[-1], flush=True)
    lines.append("")
    for what, ratios in off.items():
        inside = sum(0.8 <= ratio <= 1.25 for ratio in ratios)
        lines.append(
            f"* speed-ups of {what}: predicted / measured from {min(ratios):.2f} to {max(ratios):.2f}, median "
            f"{statistics.median(ratios):.2f}; {inside} of {len(ratios)} within 25 %"
        )
        print(lines[-1])
    (RESULTS / "plan_speed_check.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

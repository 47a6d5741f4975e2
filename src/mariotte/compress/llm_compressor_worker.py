"""What runs in llm-compressor's own environment: GPTQ on a checkpoint, weights left as safetensors.

Run as ``python llm_compressor_worker.py FOLDER``; see `mariotte.compress.llm_compressor`. It imports nothing of
Mariotte.
"""

# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportCallIssue=false
# What is imported here is installed elsewhere, in versions of its own.

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Do the job in `folder`."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file, save_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto", local_files_only=True)
    rows = load_file(folder / "calibration.safetensors")["tokens"]
    batches = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=1)
    weights = {
        "num_bits": asked["bits"],
        "type": "int",
        "symmetric": asked["symmetric"],
        **({"strategy": "channel"} if asked["group"] is None else {"strategy": "group", "group_size": asked["group"]}),
    }
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": asked["matrices"], "weights": weights}},
        dampening_frac=asked["damp"],
        actorder="static" if asked["act_order"] else None,
    )
    oneshot(
        model=model,
        dataset=batches,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
    )
    # GPTQ leaves the rounded weights in the dtype of the model; only saving through it would pack them.
    rounded = {f"{path}.weight": model.get_submodule(path).weight.detach().contiguous() for path in asked["matrices"]}
    save_file(rounded, folder / "rounded.safetensors", {"llmcompressor": importlib.metadata.version("llmcompressor")})


if __name__ == "__main__":
    main(Path(sys.argv[1]))

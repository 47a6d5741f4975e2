"""A compressed checkpoint means the same to stock transformers, in a process that cannot import Mariotte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mariotte import compress_model, save
from mariotte.testbed.world import World
from mariotte.testing.stock import without_mariotte

GENERATE = """
import json
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompts = torch.tensor(json.loads(sys.argv[2]))
print(json.dumps(model.generate(prompts, max_new_tokens=24, do_sample=False).tolist()))
"""


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("testbed/llama-483k", "slice@0.3"),
        ("testbed/llama-483k", "ffn@0.3 | lora@1024"),
        ("testbed/qwen2-113k", "slice@0.2 | ffn@0.2 | magnitude@0.3"),
        ("testbed/llama-483k", "shortgpt@0.2 | heads@0.2 | ffn@0.2 | slice@0.1 | lora@1024 | int8"),
        ("testbed/qwen2-345k", "shortgpt@0.2 | heads@0.2 | ffn@0.2 | slice@0.1 | lora@1024 | gptq@4"),
    ],
)
def test_it_generates_the_same_tokens(name: str, chain: str, tmp_path: Path) -> None:
    compressed = compress_model(name, chain, calibration="testbed/all", rows=32)
    assert len(compressed.done) == len(chain.split(" | "))
    assert compressed.counts.n_params == compressed.measured_params()
    folder = save(compressed, tmp_path / "out")
    assert compressed.tokenizer is not None
    prompts = [
        compressed.tokenizer(fact.seen[0])["input_ids"][:4]
        for fact in World().facts()[:400:10]
        if len(fact.seen[0].split()) > 3
    ]
    assert len(prompts) == 40
    theirs = json.loads(without_mariotte(GENERATE, str(folder), json.dumps(prompts))[-1])
    with torch.no_grad():
        # The model in memory, which was never saved: what was measured is what is stored.
        ours = compressed.hf.generate(torch.tensor(prompts), max_new_tokens=24, do_sample=False).tolist()
    assert theirs == ours
    assert len({tuple(row) for row in theirs}) > 10

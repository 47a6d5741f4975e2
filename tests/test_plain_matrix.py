"""What methods make of every family is what stock transformers loads, in one process that cannot import Mariotte."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from mariotte import architectures
from mariotte.models import checkpoint
from mariotte.models.load import quiet_transformers
from mariotte.models.step import Step
from mariotte.testing import matrix
from mariotte.testing.methods import middle, run
from mariotte.testing.stock import without_mariotte
from mariotte.testing.tiny import random_tokens, sizes_for, tiny, to_ask

GENERATE = """
import json
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
CLASSES = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
prompts = torch.tensor(json.loads(sys.argv[2]))
for line in open(sys.argv[1]):
    kind, folder = json.loads(line)
    model = CLASSES[kind].from_pretrained(folder)
    everything = torch.ones_like(prompts)
    with torch.no_grad():
        if kind == "masked":
            found = model(prompts, attention_mask=everything).logits.argmax(-1)
        else:
            found = model.generate(
                prompts, attention_mask=everything, max_new_tokens=12, do_sample=False, pad_token_id=0
            )
    print(json.dumps([folder, found.tolist()]))
"""


def plain(families: Iterable[str], methods: Iterable[Step]) -> list[tuple[Step, str]]:
    """Each method with each of these families of which it makes an ordinary checkpoint."""
    asked = list(methods)
    return [(s, f) for f in families for s in asked if matrix.cell(s, to_ask(f, s))[0] == matrix.PLAIN]


def compare(cases: Iterable[tuple[Step, str]], folder: Path) -> int:
    """Save what each method makes of each family, let the other process generate, and compare; how many there were."""
    prompts = random_tokens(3, 6, seed=9)
    listed, expected = folder / "listed.jsonl", dict[str, object]()
    with listed.open("w", encoding="utf-8") as lines:
        for number, (step, family) in enumerate(cases):
            cut = run(step, tiny(family, **sizes_for(step)), middle(step), folder / f"prepared-{number}")
            saved = checkpoint.save(cut, folder / f"{number:03}-{step.name()}-{family}")
            kind = architectures.find(family).kind
            lines.write(json.dumps([kind, str(saved)]) + "\n")
            mask = torch.ones_like(prompts)
            with torch.no_grad(), quiet_transformers():
                if kind == "masked":
                    found = cut.hf(prompts, attention_mask=mask).logits.argmax(-1)
                else:
                    found = cut.hf.generate(
                        prompts, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
                    )
            expected[str(saved)] = found.tolist()
    printed = without_mariotte(GENERATE, str(listed), json.dumps(prompts.tolist()))
    theirs = dict(json.loads(line) for line in printed if line.startswith("["))
    assert theirs.keys() == expected.keys()
    assert not {Path(name).name for name in expected if theirs[name] != expected[name]}
    return len(expected)


SAMPLE = {
    "qwen3": ("slice", "heads"),
    "granite": ("ffn",),
    "smollm3": ("shortgpt",),
    "gemma3_text": ("shortgpt", "heads"),
    "olmo2": ("heads",),
    "phi": ("ffn", "slice"),
    "phi3": ("slice", "heads", "ffn"),
    "falcon": ("ffn",),
    "qwen3_moe": ("experts", "expert-ffn"),
    "gpt_oss": ("experts", "heads"),
    "bart": ("magnitude",),
}
"""Of each way in which a family keeps its parts, one that a method might break."""


def test_a_sample_generates_the_same_tokens(tmp_path: Path) -> None:
    steps = {step.name(): step for step in matrix.steps()}
    cases = [(steps[name], family) for family, names in SAMPLE.items() for name in names]
    assert plain(SAMPLE, steps.values()) != []
    assert compare(cases, tmp_path) == len(cases)


@pytest.mark.slow
@pytest.mark.parametrize("family", architectures.FAMILIES)
def test_every_plain_checkpoint_generates_the_same_tokens(family: str, tmp_path: Path) -> None:
    cases = plain([family], matrix.steps())
    assert cases
    assert compare(cases, tmp_path) == len(cases)

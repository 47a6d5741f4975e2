"""What methods make of every family in a class of ours is what stock transformers loads with trust, and generates."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from mariotte.models import checkpoint
from mariotte.models.load import quiet_transformers
from mariotte.models.modeling_mariotte import FAMILIES
from mariotte.models.step import Step
from mariotte.testing import matrix
from mariotte.testing.methods import middle, run
from mariotte.testing.stock import generated_by_our_class
from mariotte.testing.tiny import random_tokens, tiny

PROMPTS = random_tokens(3, 6, seed=9)
SETTINGS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def compare(cases: Iterable[tuple[Step, str]], folder: Path) -> None:
    """Save what each method makes of each family, and let a process that cannot import Mariotte generate."""
    folders, expected = [], {}
    for step, family in cases:
        cut = run(step, tiny(family), middle(step), folder / f"prepared-{step.name()}-{family}")
        assert cut.entry.irregular
        folders.append(checkpoint.save(cut, folder / f"{step.name()}-{family}"))
        assert (folders[-1] / "modeling_mariotte.py").is_file()
        with torch.no_grad(), quiet_transformers():
            made = cut.hf.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **SETTINGS)
        expected[folders[-1].name] = made.tolist()
    found = generated_by_our_class(folders, PROMPTS, folder / "modules", **SETTINGS)
    theirs = dict(zip(expected, found, strict=True))
    assert not {name for name in expected if theirs[name] != expected[name]}


SAMPLE = {
    "qwen3": "modegpt",
    "gemma2": "modegpt",
    "olmo2": "modegpt",
    "phi": "slicegpt",
    "phi3": "flap",
    "falcon": "slicegpt",
    "gpt2": "svd-llm",
    "opt": "slicegpt",
    "gpt_neox": "modegpt",
}
"""Of each way in which a family keeps its parts, one that the class might break."""


def test_a_sample_generates_the_same_tokens(tmp_path: Path) -> None:
    steps = {step.name(): step for step in matrix.steps()}
    compare([(steps[name], family) for family, name in SAMPLE.items()], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_checkpoint_of_our_classes_generates_the_same_tokens(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    asked = [step for step in matrix.steps() if matrix.cell(step, model)[0] == matrix.OWN]
    cases = [(step, family) for step in asked if step.family not in ("quantization", "unstructured")]
    assert {step.name() for step, _ in cases} >= {"flap", "modegpt", "svd-llm"}
    compare(cases, tmp_path)

"""The page of methods and families says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from mariotte.architectures import FAMILIES
from mariotte.testing import matrix

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == matrix.page(), (
        "write it again: python -m mariotte.testing.matrix > docs/families.md"
    )


STRUCTURED = ("prunenet-random", "prunenet", "slicegpt", "slice", "ffn", "heads", "shortgpt")
DECODERS = [family for family, entry in FAMILIES.items() if entry.kind == "causal" and not entry.experts]
MIXTURES = [family for family, entry in FAMILIES.items() if entry.experts]


@pytest.mark.parametrize(
    ("families", "methods"),
    [
        (["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"], STRUCTURED),
        (DECODERS, ("ffn", "heads", "shortgpt", "magnitude", "int8-dynamic")),
        (MIXTURES, ("shortgpt", "experts", "expert-ffn")),
    ],
)
def test_nothing_is_taken_away(families: list[str], methods: tuple[str, ...]) -> None:
    """What is promised at least: structured methods on the Llama-like, the basic ones on all decoders."""
    from mariotte.testing.tiny import tiny

    steps = [step for step in matrix.steps() if step.name() in methods]
    assert len(steps) == len(methods)
    for family in families:
        model = tiny(family)
        assert {step.name(): step.refuse(model) for step in steps} == dict.fromkeys(step.name() for step in steps)

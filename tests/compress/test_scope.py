"""What a scope covers, and what changing it costs."""

import pytest
import torch

from mariotte.architectures import FAMILIES
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.random import Random
from mariotte.compress.scope import change, in_scope, oriented, turned, untied_weights
from mariotte.testing.tiny import tiny

MORE = {"bert": 64, "roberta": 64, "albert": 64, "bart": 2 * 64 * 32}
"""Parameters of a tiny model, 64 tokens x 32, that are shared with the tied head besides the embeddings."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_untied_adds_what_is_shared_no_longer(family: str) -> None:
    model = tiny(family, tied=True)
    (weight,) = (matrix.weight for matrix in in_scope(model, "head").values())
    changed = change(model, "head", {"": torch.zeros_like(weight)})
    assert changed.head.weight.any() == 0
    assert torch.equal(changed.embeddings.weight, model.embeddings.weight)
    added = changed.measured_params() - model.measured_params()
    assert untied_weights(model, "head") == added == 64 * 32 + MORE.get(family, 0)
    assert changed.measured_params() == changed.counts.n_params
    assert untied_weights(changed, "head") == 0
    assert all(untied_weights(model, scope) == 0 for scope in ("all", "attention", "ffn"))


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "albert", "t5", "bart"])
def test_what_a_method_takes_from_a_tied_head_is_less_than_its_zeros(family: str) -> None:
    model = tiny(family, tied=True)
    for step in (Magnitude(scope="head"), Random(scope="head")):
        assert step.removes(model, 0.0) == 0
        assert step.removes(model, 0.5) == 64 * 32 // 2 - untied_weights(model, "head")


def test_a_matrix_is_outputs_by_inputs_however_it_is_held() -> None:
    for family in ("gpt2", "llama"):
        model = tiny(family)
        for block in model.blocks:
            assert oriented(block.up).shape == (48, 32)
            assert turned(block.up, oriented(block.up)).shape == block.up.weight.shape

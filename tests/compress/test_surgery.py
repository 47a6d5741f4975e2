"""Rounding of widths, and models derived from others."""

from __future__ import annotations

import pytest
import torch

from mariotte.compress.surgery import cut_width, derive, rounding
from mariotte.testing.tiny import tiny, weights_hash


@pytest.mark.parametrize(
    ("width", "asked", "heads", "at", "expected"),
    [
        (128, None, 1, None, 8),
        (1024, None, 1, None, 128),
        (896, None, 1, None, 8),
        (4096, None, 32, None, 128),
        (5120, None, 40, None, 640),  # 128 and 40 heads: eight widths are left
        (80, None, 5, None, 10),  # 8 and 5 would leave 40 alone
        (48, None, 3, None, 6),
        (128, None, 4, None, 8),
        (11008, None, 1, 4096, 128),
        (1408, None, 1, 512, 8),  # the model decides, not the width that is cut
        (128, 32, 1, None, 32),
        (80, 8, 5, None, 40),  # asked for is asked for
        (6, None, 1, None, 8),
    ],
)
def test_rounding(width, asked, heads, at, expected):
    assert rounding(width, asked, multiple_of=heads, at=at) == expected


@pytest.mark.parametrize(
    ("width", "amount", "multiple", "expected"),
    [
        (128, 0, 8, 128),
        (128, 0.3, 8, 88),  # 89.6
        (172, 0, 8, 172),
        (172, 0.01, 8, 172),  # 170.28: the whole is nearer than 168
        (172, 0.02, 8, 168),
        (172, 68 / 172, 8, 104),
        (128, 0.53125, 8, 64),  # 60: of 56 and 64 the larger
        (128, 0.999, 8, 8),
        (6, 0.5, 8, 6),
    ],
)
def test_cut_width(width, amount, multiple, expected):
    assert cut_width(width, amount, multiple) == expected


def test_cut_width_never_grows_with_the_amount():
    for multiple in (1, 6, 8, 10):
        kept = [cut_width(172, n / 1000, multiple) for n in range(1000)]
        assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("tied", [False, True])
def test_derived_of_nothing_is_an_equal_and_independent_model(tied):
    model = tiny("llama", tied=tied)
    same = derive(model, {})
    assert weights_hash(same) == weights_hash(model)
    assert (same.head.weight is same.embeddings.weight) == tied
    shared = {p.data_ptr() for p in model.hf.parameters()} & {p.data_ptr() for p in same.hf.parameters()}
    assert not shared
    assert same.hf.config is not model.hf.config
    assert same.hf.config is same.hf.model.config is same.hf.model.layers[0].self_attn.config


def test_replaced_weights_take_dtype_shape_and_trainability():
    model = tiny("qwen2", dtype=torch.bfloat16)
    model.blocks[0].up.weight.requires_grad_(False)
    name = "model.layers.0.mlp.up_proj.weight"
    cut = derive(model, {name: torch.ones(3, 32, dtype=torch.float64)}, {"intermediate_size": 3})
    weight = cut.blocks[0].up.weight
    assert (weight.dtype, weight.shape, weight.requires_grad) == (torch.bfloat16, (3, 32), False)
    assert cut.blocks[0].up.out_features == 3
    assert cut.hf.model.layers[0].mlp.intermediate_size == 3
    assert model.config["intermediate_size"] == 48


def test_an_untied_head_stays_untied():
    model = tiny("llama", tied=True)
    untied = derive(model, {"lm_head.weight": torch.zeros(64, 32)}, untie=True)
    assert untied.measured_params() == untied.counts.n_params == model.counts.n_params + 64 * 32
    untied.hf.tie_weights()
    assert untied.head.weight is not untied.embeddings.weight
    assert bool(model.head.weight.any())


def test_unknown_parameters_are_a_bug():
    with pytest.raises(AssertionError, match="no parameters"):
        derive(tiny("llama"), {"model.nothing.weight": torch.zeros(1)})

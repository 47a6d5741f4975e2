"""Eight-bit weights: the grid by hand, bytes by hand, and how little they lose."""

from __future__ import annotations

import pytest
import torch

from mariotte.compress.methods.int8 import Int8
from mariotte.testing.methods import logits, run
from mariotte.testing.tiny import tiny


def test_each_row_is_on_a_grid_of_its_own(tmp_path):
    model = tiny("llama")
    result = run(Int8(), model, 8, tmp_path)
    for old, new in zip(model.matrices("all"), result.matrices("all"), strict=True):
        for before, after in zip(old.weight, new.weight, strict=True):
            scale = before.abs().max() / 127
            assert torch.equal(after, (before / scale).round() * scale)
            assert (after - before).abs().max() <= scale / 2 * (1 + 1e-6)


def test_bytes_are_one_a_weight_and_a_scale_a_row(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    result = run(Int8(), model, 8, tmp_path)
    weights = sum(matrix.weight.numel() for matrix in model.matrices("all"))
    rows = sum(len(matrix.weight) for matrix in model.matrices("all"))
    assert result.counts.n_bytes == 2 * (model.counts.n_params - weights) + weights + 2 * rows
    assert result.done[-1].facts["simulated"] is True


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_loses_little(family, tmp_path):
    model = tiny(family)
    expected, found = logits(model), logits(run(Int8(), model, 8, tmp_path))
    assert 0 < (found - expected).norm() < 0.03 * expected.norm()

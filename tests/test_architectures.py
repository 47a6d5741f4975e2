"""Entries are data: every path is looked up on a tiny model of the family, every size compared."""

from __future__ import annotations

import itertools

import pytest
import torch

from mariotte import accounting, architectures
from mariotte.errors import ModelError, UnknownNameError
from mariotte.testing.tiny import tiny

FAMILIES = sorted(architectures.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_exists_and_widths_chain(family: str) -> None:
    model = tiny(family, hidden=40, heads=5, kv_heads=1, head_dim=8, ffn=56, layers=3)
    s = model.shape
    assert model.embeddings.weight.shape == (s.vocab, s.hidden) == model.head.weight.shape
    assert len(model.blocks) == s.layers == 3
    for block in model.blocks:
        assert block.query.weight.shape == (s.heads * s.head_dim, s.hidden)
        assert block.key.weight.shape == block.value.weight.shape == (s.kv_heads * s.head_dim, s.hidden)
        assert block.output.weight.shape == (s.hidden, s.heads * s.head_dim)
        assert block.up.weight.shape == (s.ffn, s.hidden)
        assert block.down.weight.shape == (s.hidden, s.ffn)
        assert (block.gate is not None) == s.gated
        assert block.attention_norm.weight.shape == block.mlp_norm.weight.shape == (s.hidden,)
        assert (block.query.bias is not None) == s.attention_bias
        assert (block.output.bias is not None) == s.output_bias
        assert (block.up.bias is not None) == s.mlp_bias
    assert model.final_norm.weight.shape == (s.hidden,)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_ties_as_stated(family: str, tied: bool) -> None:
    model = tiny(family, tied=tied)
    assert (model.head.weight is model.embeddings.weight) == tied == model.shape.tied


@pytest.mark.parametrize(
    ("family", "tied", "biases"),
    [*itertools.product(["llama"], [True, False], [True, False]), ("qwen2", True, None), ("qwen2", False, None)],
)
def test_accounting_equals_a_real_model(family: str, tied: bool, biases: bool | None) -> None:
    settings = {} if biases is None else {"attention_bias": biases, "mlp_bias": biases}
    model = tiny(family, tied=tied, hidden=24, heads=3, kv_heads=1, head_dim=16, ffn=40, layers=3, **settings)
    counts = accounting.count(model.config)
    assert counts.n_params == model.measured_params()
    ends = model.embeddings.weight.numel() * (1 if tied else 2)
    assert counts.n_params_non_embedding == model.measured_params() - ends
    assert counts.n_bytes == 4 * counts.n_params
    assert counts.attention == sum(p.numel() for b in model.blocks for m in b.attention for p in m.parameters())
    assert counts.ffn == sum(p.numel() for b in model.blocks for m in b.ffn for p in m.parameters())


def test_flops_equal_torchs_own_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("llama", hidden=32, ffn=48)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(torch.zeros(1, 1, dtype=torch.long))
    # One token attends to itself alone: scores and weighted sum of a context of one.
    assert counter.get_total_flops() == pytest.approx(
        accounting.count(model.config, context=1).flops_per_token, rel=0.02
    )


def test_bytes_follow_the_dtype() -> None:
    config = tiny("llama").config
    assert accounting.count(config, dtype="bfloat16").n_bytes == 2 * accounting.count(config).n_params
    with pytest.raises(ModelError, match="dtype must be one of"):
        accounting.count(config, dtype="int3")


def test_an_undescribed_family_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no model type named 'lama'; did you mean 'llama'\?.*qwen2.*docs/extend"
    ):
        architectures.find("lama")


@pytest.mark.parametrize(("key", "value"), [("hidden_size", None), ("num_hidden_layers", 0), ("vocab_size", "many")])
def test_a_config_without_a_size_is_refused(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"must state {key} as a positive integer"):
        architectures.shape({**tiny("llama").config, key: value})

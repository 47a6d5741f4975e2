"""MoDeGPT: its three decompositions, how much each loses, and the class of what it makes."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
import torch

from mariotte import accounting
from mariotte.architectures import FAMILIES
from mariotte.compress.allocate import by_influence
from mariotte.compress.calibration import Means, observe, outer
from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.heads import Heads
from mariotte.compress.methods.modegpt import MoDeGPT, leverage_order, pair_order, spread_by_influence, value_basis
from mariotte.compress.methods.shortgpt import ShortGPT
from mariotte.compress.methods.slicegpt import SliceGPT
from mariotte.compress.methods.svd_llm import SVDLLM
from mariotte.compress.scope import oriented
from mariotte.compress.surgery import derive
from mariotte.cuts.ranks import kept_of_all
from mariotte.errors import ChainError, ModelError
from mariotte.evaluate.measures.memory import kv_bytes
from mariotte.models import checkpoint
from mariotte.models.irregular import CLASSES
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.modeling_mariotte import NarrowAttention
from mariotte.models.step import prepare_once
from mariotte.testing.methods import context_of, logits, run
from mariotte.testing.stock import generated_by_our_class
from mariotte.testing.tiny import random_tokens, tiny


def test_pairs_are_scored_by_the_product_of_their_norms():
    # Two key-value heads of four dimensions, pairs (0, 2) and (1, 3); the second serves two query heads like the first.
    query_NH = torch.tensor([[4.0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 5, 0, 0]], dtype=torch.float64)
    key_KH = torch.tensor([[1.0, 1, 0, 0], [3, 1, 0, 0]], dtype=torch.float64)
    # First: (4 + 0) 1 against (1 + 2) 1. Second: (2 + 0) 3 against (2 + 5) 1.
    assert pair_order(query_NH, key_KH).tolist() == [[0, 1], [1, 0]]


def test_leverage_is_what_others_cannot_say():
    generator = torch.Generator().manual_seed(0)
    x_MF = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    x_MF[:, 3] = x_MF[:, 2] + 0.01 * x_MF[:, 3]  # these two say the same
    order = leverage_order(x_MF.T @ x_MF / 200, 0.1).tolist()
    assert set(order[:2]) == {0, 1}


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_no_other_basis_of_values_loses_less(kept):
    generator = torch.Generator().manual_seed(1)
    v_MH = (
        torch.randn(50, 4, generator=generator, dtype=torch.float64)
        @ torch.diag(torch.tensor([3.0, 2, 1, 0.5])).double()
    )
    output_OH = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    to, back = value_basis(output_OH, v_MH.T @ v_MH / 50)
    torch.testing.assert_close(to @ back, torch.eye(4, dtype=torch.float64))
    left_OH = output_OH - output_OH @ back[:, :kept] @ to[:kept]
    error = (v_MH @ left_OH.T).square().sum()
    dropped = torch.linalg.svdvals(v_MH @ output_OH.T)[kept:].square().sum()
    torch.testing.assert_close(error, dropped)


@pytest.mark.parametrize(
    ("sizes", "share", "multiple", "kept"),
    [
        ([448, 448], 0.25, 1, [336, 336]),
        ([172, 172], 0.25, 8, [128, 128]),
        ([172, 172], 0.01, 8, [172, 172]),
        ([172, 172], 0.02, 8, [168, 168]),
        ([4, 4], 0.1, 1, [4, 3]),  # of equal ones the last; see below for those that matter
        ([4, 4], 1.0, 1, [1, 1]),
        ([6, 6], 0.5, 8, [6, 6]),
    ],
)
def test_sizes_are_multiples_and_their_sum_is_told_by_shapes(sizes, share, multiple, kept):
    found = kept_of_all(sizes, share, multiple, partial(spread_by_influence, [0.0, 0.0], 1.0))
    assert sorted(found) == sorted(kept)
    for influence in ([0.9, 0.1], [0.0, 3.0]):
        other = kept_of_all(sizes, share, multiple, partial(spread_by_influence, influence, 1.0))
        assert sum(other) == sum(found)
        assert all(size % multiple == 0 or size == before for size, before in zip(other, sizes, strict=True))


def test_blocks_that_matter_lose_less_by_the_entropic_rule():
    influence = [0.9, 0.1, 0.2]
    kept = kept_of_all([1001] * 3, 0.4, 1, partial(spread_by_influence, influence, 1.0))
    lost = [(1001 - size) / 1000 for size in kept]
    wanted = by_influence(sum(lost) / 3, influence, [1, 1, 1], temperature=1.0)
    assert lost == pytest.approx(wanted, abs=1e-3)
    scale = sum(influence) / 3
    weights = torch.softmax(-torch.tensor(influence) / scale, 0)
    assert lost[0] / lost[1] == pytest.approx(float(weights[0] / weights[1]), rel=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_attention_of_the_class_that_keeps_everything_is_that_of_the_family(family):
    model = tiny(family, hidden=48, heads=6, kv_heads=2, head_dim=8, layers=3)
    pairs = {f"model.layers.{layer}.self_attn.pairs": torch.arange(4).repeat(2, 1) for layer in range(3)}
    whole = derive(model, pairs, {"width_sizes": [[8, 8]] * 3}, irregular=True)
    assert isinstance(whole.blocks[0].module.self_attn, NarrowAttention)
    torch.testing.assert_close(logits(whole), logits(model))
    assert whole.counts == model.counts


def fellows(model: Model) -> list[tuple[int, int]]:
    """Dimensions of a head that a rotation turns together, in the family's order; behind them those that it leaves."""
    width = model.shape.head_dim
    part = (model.config.get("rope_parameters") or {}).get("partial_rotary_factor", 1)
    turns = int(width * part)
    still = (width - turns) // 2
    return [(i, i + turns // 2) for i in range(turns // 2)] + [(turns + i, turns + still + i) for i in range(still)]


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name, entry in FAMILIES.items() if name in CLASSES])
def test_pairs_of_every_family_that_go_are_as_if_their_keys_were_zero(family, tmp_path):
    """Whatever holds queries and keys, and however much of a head is turned; nothing goes where they have norms."""
    model = tiny(family, layers=2, hidden=64, heads=4, kv_heads=2)
    step, context = MoDeGPT(scope="attention"), context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.5])
    shape, kept = model.shape, 8 if model.entry.head_norms else 5
    found, masked = {}, model.copy()
    for index, block in enumerate(model.blocks):
        tensors = prepared.get(f"block-{index}")
        found |= step._narrower(model, block, tensors, (16, 16), kept, 16)
        rows, matrix = range(shape.kv_heads * 16), masked.blocks[index].attention[1]
        if model.entry.fused:
            rows, matrix = model.entry.rows(shape)[1], masked.blocks[index].attention[0]
        for group in range(shape.kv_heads):
            for pair in tensors["pairs"][group, kept:].tolist():
                for dimension in fellows(model)[pair]:
                    row = rows[group * 16 + dimension]
                    oriented(matrix)[row] = 0
                    if matrix.bias is not None:
                        matrix.bias[row] = 0
    cut = derive(model, found, {"width_sizes": [[2 * kept, 16]] * 2}, irregular=True)
    torch.testing.assert_close(logits(cut), logits(masked), atol=1e-4, rtol=1e-3)
    assert torch.allclose(logits(cut), logits(model)) == (kept == 8)
    assert cut.measured_params() == cut.counts.n_params


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_pairs_that_go_are_as_if_their_keys_were_zero(family, tmp_path):
    model = tiny(family, head_dim=16)
    step = MoDeGPT(queries=1.0, scope="attention", round_to=1, allocation="uniform")
    cut = run(step, model, 0.25, tmp_path)
    (width, value), *_ = cut.shape.widths or ()
    assert (width, value) == (12, 12)
    reference = run(dataclasses.replace(step, queries=0.0), model, 0.125, tmp_path / "b")  # the same values, all pairs
    assert reference.shape.widths == ((16, 12), (16, 12))
    for index, block in enumerate(reference.blocks):
        kept = cut.blocks[index].module.self_attn.pairs
        for group, pairs in enumerate(kept.tolist()):
            gone = sorted(set(range(8)) - set(pairs))
            assert len(gone) == 2
            rows = [group * 16 + part * 8 + pair for part in (0, 1) for pair in gone]
            for parameter in block.key.parameters():
                parameter[rows] = 0
    torch.testing.assert_close(logits(cut), logits(reference), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_compensation_lowers_the_error_of_attention_on_the_text(tmp_path):
    model = tiny("qwen2", head_dim=16)
    context = context_of(model, tmp_path)
    means = Means(outer)
    observe(model, context, "test", {"o": [model.blocks[0].output]}, means)
    moment_II = means.result("test", model)["o"]
    errors = []
    for compensate in (False, True):
        step = MoDeGPT(scope="attention", queries=0.0, compensate=compensate, round_to=1, ridge=1e-6)
        context = context_of(model, tmp_path / str(compensate))
        tensors = step.prepare(model, context, [0.5]).get("block-0")
        found = step._narrower(model, model.blocks[0], tensors, (16, 16), 8, 6)
        (output_DI,) = (tensor for name, tensor in found.items() if "o_proj" in name)
        to_II = torch.block_diag(*tensors["to"][:, :6].repeat_interleave(2, 0))
        missing_DI = model.blocks[0].output.weight.double() - output_DI.double() @ to_II
        errors.append(float(((missing_DI @ moment_II) * missing_DI).sum()))
    assert errors[1] < 0.999 * errors[0]


@pytest.mark.parametrize("scope", ["all", "attention", "ffn"])
@pytest.mark.parametrize("amount", [0.1, 0.37, 0.8])
def test_what_goes_is_told_by_shapes_whatever_the_text(scope, amount, tmp_path):
    for family, seed in (("llama", 0), ("qwen2", 1)):
        model = tiny(family, layers=3, head_dim=16, ffn=96, seed=seed, mlp_bias=True)
        step = MoDeGPT(scope=scope, round_to=1)
        cut = run(step, model, amount, tmp_path / family, random_tokens(4, 20, seed=seed))
        assert model.measured_params() - cut.measured_params() == step.removes(model, amount)
        assert cut.counts == accounting.count(cut.config)
        assert cut.shape.heads == 4
        weights = sum(matrix.weight.numel() for matrix in model.matrices(scope))
        assert cut.done[-1].obtained == pytest.approx(amount, abs=cut.done[-1].facts["rounding"] / weights)
        assert all(width == (16, 16) for width in cut.shape.widths or ()) == (scope == "ffn")
        assert (len(set(cut.shape.ffns or (0,))) > 1) == (scope != "attention")


def test_queries_lose_the_share_that_is_asked(tmp_path):
    model = tiny("llama", head_dim=64, heads=2, kv_heads=2, hidden=128, ffn=256)
    half, none, all_alike = (
        MoDeGPT(queries=queries, allocation="uniform", round_to=1)._sizes(model.shape, 0.25)
        for queries in (0.5, 0.0, 1.0)
    )
    assert none[1] == [32, 32]
    assert all_alike == ([192, 192], [24, 24], [48, 48])
    lost = [1 - part[0] / whole for part, whole in zip(half, (256, 32, 64), strict=True)]
    assert lost[0] == pytest.approx(lost[2], abs=0.01)
    assert lost[1] == pytest.approx(lost[0] / 2, abs=0.02)
    # Beyond what neurons and values have, queries give the rest.
    assert MoDeGPT(queries=0.0)._sizes(model.shape, 0.95)[1][0] < 32


def test_uniform_and_ffn_alone_is_an_ordinary_checkpoint(tmp_path):
    model = tiny("llama")
    plain = MoDeGPT(scope="ffn", allocation="uniform")
    assert plain.makes_plain(model)
    assert not MoDeGPT(scope="ffn").makes_plain(model)
    cut = run(plain, model, 0.5, tmp_path)
    assert cut.config["model_type"] == "llama"
    same = run(FFN(), model, 0.5, tmp_path / "ffn")
    assert (logits(cut) - logits(same)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_methods_before_and_behind_it(family, tmp_path):
    model = tiny(family, head_dim=16)
    cut = run(MoDeGPT(), model, 0.4, tmp_path / "a")
    assert "differ in width" in str(FFN().refuse(cut))
    assert "do it before" in str(Heads().refuse(cut))
    assert "widths" in str(ShortGPT().refuse(cut))
    for step in (MoDeGPT(), SVDLLM(), SliceGPT()):
        both = run(step, cut, 0.3, tmp_path / step.name())
        assert both.measured_params() == both.counts.n_params
        loaded = load(checkpoint.save(both, tmp_path / f"saved {step.name()}"))
        torch.testing.assert_close(logits(loaded), logits(both), atol=1e-4, rtol=1e-3)
        assert loaded.shape == both.shape
    for step in (SVDLLM(), SliceGPT()):
        before = run(step, model, 0.3, tmp_path / f"before {step.name()}")
        assert "do it before the step that gave them" in str(MoDeGPT().refuse(before))
    narrow = run(FFN(), run(Heads(), model, 0.5, tmp_path / "heads"), 0.3, tmp_path / "ffn")
    assert run(MoDeGPT(), narrow, 0.3, tmp_path / "last").shape.heads == 2


def test_the_cache_holds_narrow_keys_and_values_and_changes_no_token(tmp_path):
    cut = run(MoDeGPT(), tiny("qwen2", head_dim=16), 0.5, tmp_path)
    prompt = random_tokens(3, 6)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    made = [cut.hf.generate(prompt, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*made)
    cache = cut.hf(prompt, use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held * 4 == kv_bytes(cut.shape, 4) * prompt.numel()


def test_stock_transformers_reads_it_where_there_is_no_mariotte(tmp_path):
    prompts = random_tokens(3, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    folders, expected = [], []
    for family, step in itertools.product(("llama", "qwen2"), (MoDeGPT(), SVDLLM())):
        model = run(step, tiny(family, tied=True, head_dim=16), 0.4, tmp_path / f"cut {family} {step.name()}")
        folders.append(checkpoint.save(model, tmp_path / f"{family}-{step.name()}"))
        expected.append(model.hf.generate(prompts, attention_mask=torch.ones_like(prompts), **settings).tolist())
    assert generated_by_our_class(folders, prompts, tmp_path / "modules", **settings) == expected


def test_bad_requests_are_one_sentence():
    for fields, words in (
        ({"allocation": "greedy"}, "allocation must be influence or uniform, got 'greedy'"),
        ({"neurons": "norm"}, "neurons must be obs or leverage, got 'norm'"),
        ({"temperature": 0.0}, "temperature must be positive, such as 1.0, got 0.0"),
        ({"ridge": float("nan")}, "ridge must be positive"),
        ({"queries": 2.0}, r"queries must be a share in \[0, 1\], got 2.0"),
        ({"round_to": 0}, "round_to must be a positive number of neurons, got 0"),
    ):
        with pytest.raises(ChainError, match=f"^modegpt: {words}"):
            MoDeGPT(**fields)
    model = tiny("llama")
    model.entry = dataclasses.replace(model.entry, model_type="other")
    assert str(MoDeGPT().refuse(model)).startswith("needs a class for widths by layer, and other has none; llama, ")
    assert "scores that do (ALiBi)" in str(MoDeGPT().refuse(tiny("falcon", alibi=True)))
    assert MoDeGPT(scope="ffn").refuse(tiny("falcon", alibi=True)) is None
    assert "and these have 11: take the scope ffn" in str(MoDeGPT().refuse(tiny("gpt2", hidden=33, heads=3)))
    config = {**model.config, "model_type": "mariotte_llama"}
    with pytest.raises(ModelError, match="width_sizes must hold two widths of heads for each of the 2 layers"):
        accounting.count({**config, "width_sizes": [[4, 4]]})

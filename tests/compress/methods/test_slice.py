"""Slicing: the rotation is exact, the cut is exact where nothing is lost, and the best directions stay."""

from __future__ import annotations

import dataclasses
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mariotte.compress.methods import slice as slicing
from mariotte.compress.methods.slice import Slice, principal_directions
from mariotte.compress.rotation import without_mean
from mariotte.errors import ChainError
from mariotte.models.model import Model
from mariotte.models.step import prepare_once
from mariotte.testing.methods import MethodConformance, cases, context_of, run
from mariotte.testing.tiny import random_tokens, tiny

FULL_BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}}


def exact_norms_(model: Model) -> Model:
    """RMSNorms that compute in the model's dtype: transformers' own go through float32, good to 1e-6 only."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    for module in model.hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return model


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return exact_norms_(model).logits(random_tokens(4, 16, seed=1))


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_rotation_leaves_logits_unchanged(family, tied, compensate, tmp_path):
    model = tiny(family, tied=tied, dtype=torch.float64, **FULL_BIASES.get(family, {}))
    step = Slice(compensate=compensate)
    prepared = prepare_once(step, model, context_of(model, tmp_path), [0.5])
    rotated = slicing._cut(model, prepared, 32)
    assert (logits(rotated) - logits(model)).abs().max() < 1e-8
    assert rotated.hf.config.tie_word_embeddings is False
    assert not torch.allclose(rotated.embeddings.weight, model.embeddings.weight, atol=0.1)


@torch.no_grad()
def in_a_subspace_(model: Model, width: int) -> Model:
    """Let the residual stream use `width` of its dimensions only, in a random basis."""
    generator = torch.Generator().manual_seed(3)
    hidden = model.shape.hidden
    basis_DD, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator, dtype=torch.float64))
    projector_DD = basis_DD[:, :width] @ basis_DD[:, :width].T
    model.embeddings.weight.copy_(model.embeddings.weight @ projector_DD)
    for block in model.blocks:
        for linear in (block.output, block.down):
            for parameter in linear.parameters():
                parameter.copy_(projector_DD @ parameter)
    return model


@pytest.mark.parametrize("compensate", [False, True])
def test_a_centred_stream_that_lives_in_fewer_dimensions_is_cut_to_them_without_loss(compensate, tmp_path):
    """LayerNorm, whose mean takes one dimension: of sixteen that are kept the stream may fill fifteen."""
    model = in_a_subspace_(tiny("phi", dtype=torch.float64, layer_norm_eps=0.05), 15)
    step, context = Slice(compensate=compensate), context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.5])
    cut = step.apply(model, prepared, 0.5, context)
    assert (cut.shape.hidden, cut.shape.head_dim, cut.config["layer_norm_eps"]) == (16, 8, pytest.approx(0.1))
    assert (logits(cut) - logits(model)).abs().max() < 1e-8
    assert cut.blocks[0].attention_norm.weight.eq(1).all()
    assert (cut.embeddings.weight.mean(1)).abs().max() < 1e-12
    assert cut.measured_params() == cut.counts.n_params
    further = step.apply(model, prepared, 0.75, context)
    assert (logits(further) - logits(model)).abs().max() > 0.1


def test_a_basis_without_mean_is_orthonormal():
    basis = without_mean(5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    assert basis.sum(0).abs().max() < 1e-12
    assert without_mean(1).shape == (1, 0)


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_stream_that_lives_in_fewer_dimensions_is_cut_to_them_without_loss(family, compensate, tmp_path):
    # A large epsilon, so that a wrong scaling of it shows.
    model = tiny(family, dtype=torch.float64, rms_norm_eps=0.05, **FULL_BIASES[family])
    model = in_a_subspace_(model, 16)
    step = Slice(compensate=compensate)
    context = context_of(model, tmp_path)
    cut = step.apply(model, prepare_once(step, model, context, [0.5]), 0.5, context)
    assert cut.shape.hidden == 16
    assert cut.shape.head_dim == 8
    assert cut.config["rms_norm_eps"] == pytest.approx(0.1)
    assert (logits(cut) - logits(model)).abs().max() < 1e-8
    further = step.apply(model, prepare_once(step, model, context, [0.75]), 0.75, context)
    assert (logits(further) - logits(model)).abs().max() > 0.1


def test_principal_directions_by_hand():
    # Most of the energy along (1, 1), a ninth of it along (1, -1).
    directions, energy = principal_directions(torch.tensor([[5.0, 4.0], [4.0, 5.0]], dtype=torch.float64))
    torch.testing.assert_close(energy, torch.tensor([9.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(directions.abs(), torch.full((2, 2), 0.5**0.5, dtype=torch.float64))
    assert directions[0, 0] * directions[1, 0] > 0
    assert directions[0, 1] * directions[1, 1] < 0


def test_the_sign_of_a_direction_is_settled():
    moment = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions, _ = principal_directions(moment @ moment.T)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(directions.T @ directions, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize(("heads", "hidden", "multiple"), [(4, 32, 8), (5, 80, 10), (3, 48, 6)])
def test_llama_widths_are_multiples_of_its_heads(heads, hidden, multiple, tmp_path):
    model = tiny("llama", hidden=hidden, heads=heads, kv_heads=1, layers=1)
    step = Slice()
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.3])
    for amount in (0.2, 0.3, 0.7, 0.99):
        cut = step.apply(model, prepared, amount, context)
        assert cut.shape.hidden % heads == 0
        assert cut.done[-1].facts["rounding"] == multiple


@torch.no_grad()
def test_kept_directions_are_read_at_the_size_they_had(tmp_path):
    """What a matrix reads of the kept directions has the mean square that it had behind the uncut norm."""
    model = tiny("qwen2", layers=1)
    step = Slice(compensate=False)
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.5])
    cut = step.apply(model, prepared, 0.5, context)
    directions_Dd = prepared.get("rotation")["directions"][:, :16]
    tokens = random_tokens(64, 24, seed=2).flatten()
    x_MD = model.embeddings.weight[tokens].double()
    behind_norm_Md = x_MD / x_MD.square().mean(-1, keepdim=True).sqrt() @ directions_Dd
    y_Md = cut.blocks[0].attention_norm(cut.embeddings.weight[tokens]).double()
    energy = prepared.get("rotation")["energy"]
    read_Md = y_Md * (energy[:16].sum() / energy.sum() * 2) ** 0.5
    assert read_Md.square().mean() == pytest.approx(float(behind_norm_Md.square().mean()), rel=0.15)


def test_compensation_lowers_what_each_matrix_misses(tmp_path):
    model = tiny("llama", layers=1)
    context = context_of(model, tmp_path / "a")
    tokens = random_tokens(16, 24)
    x_MD = model.embeddings.weight.detach()[tokens.flatten()]
    wanted_MO = model.blocks[0].query(model.blocks[0].attention_norm(x_MD)).detach()
    missed = {}
    for compensate in (True, False):
        step = Slice(compensate=compensate)
        context = context_of(model, tmp_path / str(compensate), tokens)
        cut = step.apply(model, prepare_once(step, model, context, [0.5]), 0.5, context)
        found_MO = cut.blocks[0].query(cut.blocks[0].attention_norm(cut.embeddings.weight[tokens.flatten()])).detach()
        missed[compensate] = float((found_MO - wanted_MO).square().mean())
    assert missed[True] < missed[False]


def test_a_tied_head_is_untied_and_counted(tmp_path):
    model = tiny("qwen2", tied=True, vocab=512)
    step = Slice()
    context = context_of(model, tmp_path)
    cut = step.apply(model, prepare_once(step, model, context, [0.25]), 0.25, context)
    assert cut.done[-1].facts["untied"] is True
    assert cut.counts.embeddings == 2 * 512 * 24
    assert cut.counts.n_params > model.counts.n_params  # a quarter of the width for a vocabulary matrix more


def test_only_families_that_can_be_cut_are_accepted():
    model = tiny("llama")
    assert Slice().refuse(model) is None
    for change, words in (
        ({"rms_norm": False}, "needs RMSNorm"),
        ({"norm_first": False}, "norms that feed"),
        ({"head_dim": ""}, "head_dim"),
    ):
        model.entry = dataclasses.replace(tiny("llama").entry, model_type="other", **change)
        reason = Slice().refuse(model)
        assert reason is not None
        assert words in reason
        assert "other" in reason
    # What is named in its place can be done.
    for family, settings, other in (
        ("gpt_neox", {}, "slicegpt, whose"),
        ("opt", {"do_layer_norm_before": False}, "ffn or shortgpt"),
        ("opt", {"word_embed_proj_dim": 16}, "ffn or shortgpt"),
        ("falcon", {"alibi": True}, "ffn or shortgpt"),
        ("gpt2", {}, "ffn or shortgpt"),
    ):
        assert f"and {family} has neither: take {other}" in str(Slice().refuse(tiny(family, **settings)))


def test_round_to_overrides_the_rounding(tmp_path):
    model = tiny("qwen2")
    step = Slice(round_to=1)
    context = context_of(model, tmp_path)
    cut = step.apply(model, prepare_once(step, model, context, [0.3]), 0.3, context)
    assert cut.shape.hidden == 22
    assert str(step.link(0.3)) == "slice@0.3(round_to=1)" == cut.done[-1].step
    with pytest.raises(ChainError, match="round_to must be a positive"):
        Slice(round_to=0)
    with pytest.raises(ChainError, match="ridge must be positive"):
        Slice(ridge=-1.0)


def test_norms_of_a_cut_model_are_ones(tmp_path):
    model = tiny("llama")
    step = Slice()
    context = context_of(model, tmp_path)
    cut = step.apply(model, prepare_once(step, model, context, [0.5]), 0.5, context)
    norms: list[nn.Module] = [cut.final_norm, cut.blocks[0].attention_norm, cut.blocks[1].mlp_norm]
    assert all(bool((norm.weight == 1).all()) for norm in norms)


def test_the_least_width_leaves_a_model_that_runs(tmp_path):
    cut = run(Slice(round_to=1), tiny("phi"), 1 - 1e-9, tmp_path)
    assert cut.shape.hidden == 1
    assert logits(cut).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "family"), cases([Slice()], ["phi"]), ids=lambda v: v if isinstance(v, str) else str(v.link())
)
class TestCentred(MethodConformance):
    pass

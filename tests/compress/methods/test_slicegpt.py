"""SliceGPT: turned at full width nothing changes, what is kept is kept exactly, and its checkpoints load anywhere."""

from __future__ import annotations

import dataclasses
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mariotte import accounting
from mariotte.architectures import find
from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.slice import Slice
from mariotte.compress.methods.slicegpt import HalfWalk, SliceGPT, text_mask
from mariotte.compress.rotation import random_rotation
from mariotte.compress.surgery import derive
from mariotte.cuts.stream import sliced, sliced_width
from mariotte.errors import ChainError, DataError, ModelError, UnknownNameError
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.modeling_mariotte import Shortcut
from mariotte.models.step import prepare_once
from mariotte.recover.methods.lora import LoRA
from mariotte.testing import recoveries
from mariotte.testing.methods import MethodConformance, cases, context_of, overflowing, run
from mariotte.testing.stock import generated_by_our_class
from mariotte.testing.tiny import random_tokens, tiny, weights_hash

FULL_BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}}
STEPS = [SliceGPT(), SliceGPT(sequential=False), SliceGPT(orientation="random")]


def exact_norms_(model: Model) -> Model:
    """RMSNorms that compute in the model's dtype: transformers' own go through float32, good to 1e-6 only."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    for module in model.hf.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm", "Phi3RMSNorm"):
            module.forward = MethodType(forward, module)
    return model


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return exact_norms_(model).logits(random_tokens(4, 16, seed=1))


VARIANTS = [
    *cases([SliceGPT(sequential=False)], ["qwen2"]),
    *cases([SliceGPT(orientation="random")], ["llama"]),
]


@pytest.mark.parametrize(("step", "family"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(v.link()))
class TestVariants(MethodConformance):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "family"),
    cases([SliceGPT()], ["phi", "opt", "gpt_neox"]),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestCentred(MethodConformance):
    pass


@pytest.mark.parametrize("step", STEPS, ids=lambda step: str(step.link()))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_turning_leaves_logits_unchanged(family, tied, step, tmp_path):
    model = exact_norms_(tiny(family, tied=tied, dtype=torch.float64, **FULL_BIASES[family]))
    context = context_of(model, tmp_path)
    turned = step._cut(model, prepare_once(step, model, context, [0.5]), 32, context)
    assert (logits(turned) - logits(model)).abs().max() < 1e-8
    assert turned.shape.shortcuts
    assert not torch.allclose(turned.embeddings.weight, model.embeddings.weight, atol=0.1)
    assert turned.measured_params() == turned.counts.n_params
    # Once more: the shortcuts that are there are turned too.
    context = context_of(turned, tmp_path / "again")
    again = step._cut(turned, prepare_once(step, turned, context, [0.5]), 32, context)
    assert (logits(again) - logits(model)).abs().max() < 1e-8


OTHERS = [
    ("phi", {}),
    ("phi3", {}),
    ("opt", {}),
    ("opt", {"enable_bias": False}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("falcon", {}),
    ("falcon", {"parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
]
"""Norms that subtract a mean, blocks side by side and one behind the other, matrices with biases and without."""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "settings"), OTHERS, ids=str)
def test_turning_a_centred_stream_leaves_logits_unchanged(family, settings, tied, tmp_path):
    model = exact_norms_(tiny(family, tied=tied, layers=3, dtype=torch.float64, **settings))
    step, context = SliceGPT(), context_of(model, tmp_path)
    turned = step._cut(model, prepare_once(step, model, context, [0.5]), 32, context)
    assert (logits(turned) - logits(model)).abs().max() < 1e-8
    assert not torch.allclose(turned.embeddings.weight, model.embeddings.weight, atol=0.1)
    assert turned.measured_params() == turned.counts.n_params
    assert turned.shape == sliced(model.shape, 32, always=True)
    again, context = SliceGPT(sequential=False), context_of(turned, tmp_path / "again")
    cut = again.apply(turned, prepare_once(again, turned, context, [0.5]), 0.5, context)
    assert (cut.shape.hidden, cut.shape.final_size) == (16, 32)
    assert cut.measured_params() == cut.counts.n_params == turned.counts.n_params - again.removes(turned, 0.5)


@pytest.mark.parametrize(("family", "settings"), OTHERS, ids=str)
def test_a_centred_stream_that_lives_in_fewer_dimensions_is_cut_to_them_without_loss(family, settings, tmp_path):
    model = in_subspaces_(tiny(family, dtype=torch.float64, **settings), 15)
    context = context_of(exact_norms_(model), tmp_path)
    cut = SliceGPT().apply(model, prepare_once(SliceGPT(), model, context, [0.5]), 0.5, context)
    assert cut.shape.hidden == 16
    assert (logits(cut) - logits(model)).abs().max() < 1e-8
    prompt = random_tokens(2, 6)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    made = [m.hf.generate(prompt, use_cache=use, **given) for m in (cut, model) for use in (True, False)]
    assert all(torch.equal(tokens, made[0]) for tokens in made)


@torch.no_grad()
def in_subspaces_(model: Model, width: int) -> Model:
    """Let the stream use `width` of its dimensions only: those of a random basis."""
    hidden = model.shape.hidden
    noise = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    basis_DD = torch.linalg.qr(noise)[0]
    projector_DD = basis_DD[:, :width] @ basis_DD[:, :width].T
    for table in (model.entry.embeddings, model.entry.positions):
        if table:
            weight = model.hf.get_submodule(table).weight
            weight.copy_(weight @ projector_DD)
    for block in model.blocks:
        for linear in (block.output, block.down):
            for parameter in linear.parameters():
                parameter.copy_(projector_DD @ parameter)
    return model


@pytest.mark.parametrize("step", STEPS, ids=lambda step: str(step.link()))
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_stream_that_lives_in_fewer_dimensions_is_cut_to_them_without_loss(family, step, tmp_path):
    # A large epsilon, so that a norm over another number of dimensions shows.
    model = tiny(family, dtype=torch.float64, rms_norm_eps=0.05, **FULL_BIASES[family])
    model = exact_norms_(in_subspaces_(model, 16))
    context = context_of(model, tmp_path)
    cut = step.apply(model, prepare_once(step, model, context, [0.5, 0.75]), 0.5, context)
    assert (cut.shape.hidden, cut.shape.final_size) == (16, 32)
    assert (logits(cut) - logits(model)).abs().max() < 1e-8
    further = step.apply(model, prepare_once(step, model, context, [0.5, 0.75]), 0.75, context)
    assert (logits(further) - logits(model)).abs().max() > 0.1


def test_random_orientation_changes_no_logit_and_every_weight(tmp_path):
    model = exact_norms_(tiny("llama", dtype=torch.float64))
    pca, random = (run(SliceGPT(orientation=way), model, 0.5, tmp_path / way) for way in ("pca", "random"))
    assert (logits(pca) - logits(random)).abs().max() < 1e-8
    query = [cut.blocks[1].query.weight for cut in (pca, random)]
    assert not torch.allclose(*query, atol=0.05)


def test_a_random_rotation_is_orthogonal_and_its_own():
    first, second = (random_rotation(6, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(first @ first.T, torch.eye(6, dtype=torch.float64))
    assert not torch.allclose(first, second, atol=0.1)


def test_sequential_directions_see_what_was_cut_before(tmp_path):
    """In front of the last norm, the directions are those of the stream of the model that is cut up to there."""
    model = tiny("llama", layers=1)
    step = SliceGPT()
    context = context_of(model, tmp_path)
    first_DD = prepare_once(step, model, context, [0.5]).get("stream-0")["directions"]
    (_, _), (_, found_DD) = step._walk(model, context, 16, first_DD)
    (block,) = model.blocks
    with torch.no_grad():
        x_BTD = model.embeddings(context.calibration) @ (first_DD[:, :16] @ first_DD[:, :16].T).float()
        seen: list[Tensor] = []
        handle = block.mlp_norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        model.hf.base_model(inputs_embeds=x_BTD, use_cache=False)
        handle.remove()
    y_MD = seen[0].flatten(0, 1).double()
    energy_D = (y_MD @ found_DD).square().sum(0)
    assert torch.equal(energy_D.argsort(descending=True), torch.arange(32))
    gram_DD = found_DD.T @ y_MD.T @ y_MD @ found_DD
    assert (gram_DD - gram_DD.diagonal().diag()).abs().max() < 1e-5 * gram_DD.max()


def test_all_directions_of_the_uncut_model_serve_every_amount(tmp_path):
    model = tiny("qwen2")
    step = SliceGPT(sequential=False)
    context = context_of(model, tmp_path)
    prepared = prepare_once(step, model, context, [0.25])
    blind = dataclasses.replace(context, calibration=None)
    assert [step.apply(model, prepared, amount, blind).shape.hidden for amount in (0.25, 0.5, 0.7)] == [24, 16, 8]


@pytest.mark.parametrize(
    ("round_to", "amount", "width"),
    [(8, 0.1, 24), (8, 0.25, 24), (8, 0.9, 8), (1, 0.1, 28), (64, 0.5, 32), (5, 0.5, 15)],
)
def test_widths_are_rounded_down(round_to, amount, width, tmp_path):
    cut = run(SliceGPT(round_to=round_to), tiny("llama", layers=1), amount, tmp_path)
    assert cut.shape.hidden == width
    assert cut.done[-1].facts["rounding"] == round_to
    assert cut.done[-1].facts["hidden"] == [32, width]


def test_a_tenth_of_eighty_is_eight():
    assert sliced_width(tiny("llama", hidden=80, heads=5, kv_heads=5).shape, 0.1, 8) == 72


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_shortcuts_and_the_untied_head_are_counted(family, tied, tmp_path):
    model = tiny(family, tied=tied, layers=3)
    cut = run(SliceGPT(), model, 0.25, tmp_path)
    # Two for each of three blocks, the last of which writes the whole width.
    assert cut.counts.shortcuts == 5 * 24 * 24 + 24 * 32
    assert cut.counts.embeddings == 64 * 24 + 64 * 32
    assert cut.measured_params() == cut.counts.n_params == model.counts.n_params - SliceGPT().removes(model, 0.25)
    assert cut.counts == accounting.count(cut.config)
    assert cut.done[-1].facts["untied"] is tied


@pytest.mark.parametrize(
    ("amount", "parameters"), [(0.125, 292_864), (0.25, 253_824), (0.375, 215_936), (0.5, 179_200)]
)
def test_sizes_are_those_of_the_published_code(amount, parameters):
    # What it made of stories260K, a model of this shape.
    model = tiny("llama", hidden=64, layers=5, heads=8, kv_heads=4, ffn=172, vocab=512, tied=True)
    assert model.counts.n_params - SliceGPT().removes(model, amount) == parameters


def test_a_small_cut_makes_a_model_larger():
    model = tiny("qwen2", hidden=64, ffn=64, tied=True)
    assert SliceGPT().removes(model, 0.125) < 0 < SliceGPT().removes(model, 0.75)
    assert SliceGPT().removes(model, 0) == 0


def test_flops_equal_torchs_own_count(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    cut = run(SliceGPT(), tiny("llama"), 0.5, tmp_path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cut.logits(torch.zeros(1, 1, dtype=torch.long))
    assert counter.get_total_flops() == pytest.approx(accounting.count(cut.config, context=1).flops_per_token, rel=0.02)


def test_padding_at_the_end_of_rows_is_ignored(tmp_path):
    pad = 63
    model = tiny("llama")
    model.hf.config.pad_token_id = pad
    text_NT = random_tokens(8, 12, vocab=pad)
    padded_NT = torch.cat([text_NT, torch.full((8, 5), pad)], 1)
    plain, with_padding = (
        run(SliceGPT(), model, 0.5, tmp_path / name, tokens) for name, tokens in (("a", text_NT), ("b", padded_NT))
    )
    assert (logits(plain) - logits(with_padding)).abs().max() < 1e-4 * logits(plain).abs().max()
    mask = text_mask(torch.tensor([[5, pad, 6, pad], [1, 2, 3, 4]]), pad)
    assert mask is not None
    assert mask.tolist() == [[True, True, True, False], [True] * 4]
    assert text_mask(torch.tensor([[pad, pad]]), pad) is None
    assert text_mask(padded_NT, None) is None


@torch.no_grad()
def test_what_is_not_finite_is_refused_in_a_sentence(tmp_path):
    model = overflowing(tiny("llama"))
    with pytest.raises(ModelError, match="not finite in the stream before mlp of block 0 of tiny-llama"):
        run(SliceGPT(), model, 0.5, tmp_path)
    with pytest.raises(ModelError, match="not finite in the stream before mlp of block 0"):
        run(SliceGPT(sequential=False), model, 0.5, tmp_path / "one pass")


def test_too_little_text_is_refused_and_two_tokens_are_enough(tmp_path):
    model = tiny("llama")
    for step in STEPS:
        with pytest.raises(DataError, match="slicegpt needs at least 2 calibration tokens, got 1"):
            run(step, model, 0.5, tmp_path / "one", random_tokens(1, 1))
        assert logits(run(step, model, 0.5, tmp_path / f"two-{step.link()}", random_tokens(1, 2))).isfinite().all()


def test_fields_are_checked():
    with pytest.raises(ChainError, match="orientation must be pca or random, got 'up'"):
        SliceGPT(orientation="up")
    with pytest.raises(ChainError, match="round_to must be a positive number of dimensions, got 0"):
        SliceGPT(round_to=0)


def test_only_families_that_can_be_cut_are_accepted(tmp_path):
    model = tiny("llama")
    for change, words in (
        ({"norm_first": False}, "norms that feed"),
        ({}, "other has none; llama, mistral, qwen2, qwen3, smollm3, granite, gemma2"),
    ):
        model.entry = dataclasses.replace(tiny("llama").entry, model_type="other", **change)
        reason = SliceGPT().refuse(model)
        assert reason is not None
        assert words in reason
    for family, settings, words in (
        ("gemma2", {}, "gemma2 has norms after them"),
        ("opt", {"do_layer_norm_before": False}, "opt has norms after them"),
        ("opt", {"word_embed_proj_dim": 16}, "these are mapped to it"),
        ("gpt2", {}, "the code of gpt2 takes both to be as wide"),
        ("falcon", {"alibi": True}, "those of this falcon do (ALiBi)"),
    ):
        assert words in str(SliceGPT().refuse(tiny(family, **settings)))
    assert "shortcut" in (Slice().refuse(run(SliceGPT(), tiny("qwen2"), 0.5, tmp_path)) or "")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_methods_work_behind_it(family, tmp_path):
    cut = run(SliceGPT(), tiny(family), 0.5, tmp_path / "a")
    narrower = run(FFN(), cut, 0.5, tmp_path / "b")
    assert narrower.shape.ffn == 24
    assert narrower.measured_params() == narrower.counts.n_params == cut.counts.n_params - FFN().removes(cut, 0.5)
    sparse = run(Magnitude(), narrower, 0.5, tmp_path / "c")
    assert logits(sparse).isfinite().all()
    loaded = load(checkpoint.save(sparse, tmp_path / "saved"))
    torch.testing.assert_close(logits(loaded), logits(sparse))
    assert [done.name for done in loaded.done] == ["slicegpt", "ffn", "magnitude"]


def test_lora_recovers_it_and_leaves_the_shortcuts_alone(tmp_path):
    corpus = recoveries.counting_corpus(tmp_path)
    cut = run(SliceGPT(), recoveries.tiny_reader("llama", layers=2), 0.5, tmp_path / "cut")
    context = recoveries.context_of(cut, tmp_path / "lora", corpus)
    healed = recoveries.recovered(LoRA(rank=4, lr=2e-2), cut, context, [1_600])[1_600]
    facts = healed.done[-1].facts
    assert facts["loss_end"] < facts["loss_begin"]
    for before, after in zip(cut.blocks, healed.blocks, strict=True):
        for name in ("attention_shortcut", "mlp_shortcut"):
            assert torch.equal(getattr(before, name).weight, getattr(after, name).weight)
        assert not torch.equal(before.query.weight, after.query.weight)
    assert healed.measured_params() == healed.counts.n_params
    checkpoint.save(healed, tmp_path / "saved")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_shortcuts_are_frozen_also_when_loaded(family, tmp_path):
    loaded = load(checkpoint.save(run(SliceGPT(), tiny(family), 0.5, tmp_path / "cut"), tmp_path / "saved"))
    frozen = {name for name, parameter in loaded.hf.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 4
    assert all("shortcut" in name for name in frozen)
    # Even where nobody said so.
    for module in loaded.hf.modules():
        if isinstance(module, Shortcut):
            module.weight.requires_grad_(True)
    # Programs that spread a model over devices keep these whole, and look for them by their names.
    assert loaded.hf._no_split_modules == {type(block.module).__name__ for block in loaded.blocks}
    loaded.logits(random_tokens(2, 4)).sum().backward()
    assert all(block.mlp_shortcut.weight.grad is None for block in loaded.blocks)
    assert loaded.blocks[0].query.weight.grad is not None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_cache_changes_no_token(family, tmp_path):
    cut = run(SliceGPT(), tiny(family), 0.5, tmp_path)
    prompt = random_tokens(3, 6)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    made = [cut.hf.generate(prompt, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*made)


def test_stock_transformers_reads_it_where_there_is_no_mariotte(tmp_path):
    prompts = random_tokens(3, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    folders, expected = [], []
    for family in ("llama", "qwen2"):
        model = run(SliceGPT(), tiny(family, tied=True), 0.5, tmp_path / f"cut {family}")
        folder = checkpoint.save(model, tmp_path / family)
        assert (folder / "modeling_mariotte.py").is_file()
        assert "trust_remote_code=True" in (folder / "README.md").read_text()
        folders.append(folder)
        expected.append(model.hf.generate(prompts, attention_mask=torch.ones_like(prompts), **settings).tolist())
    assert generated_by_our_class(folders, prompts, tmp_path / "modules", **settings) == expected


def test_loading_runs_no_code_of_the_folder(tmp_path):
    model = run(SliceGPT(), tiny("llama"), 0.5, tmp_path / "cut")
    folder = checkpoint.save(model, tmp_path / "saved")
    (folder / "modeling_mariotte.py").write_text("raise SystemExit('the folder was run')\n")
    assert torch.equal(logits(load(folder)), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_feed_forward_widths_by_layer(family, tied, tmp_path):
    model = tiny(family, tied=tied, layers=3, **FULL_BIASES[family])
    widths = [16, 48, 9]
    weights = {}
    for index, (block, width) in enumerate(zip(model.blocks, widths, strict=True)):
        path = f"{model.entry.blocks}.{index}.mlp"
        for name, linear in (("gate_proj", block.gate), ("up_proj", block.up)):
            for part, parameter in linear.named_parameters():
                weights[f"{path}.{name}.{part}"] = parameter[:width]
            linear.weight[width:] = 0
            if linear.bias is not None:
                linear.bias[width:] = 0
        weights[f"{path}.down_proj.weight"] = block.down.weight[:, :width]
    uneven = derive(model, weights, {"ffn_sizes": widths}, irregular=True)
    assert (logits(uneven) - logits(model)).abs().max() < 1e-5
    assert uneven.shape.ffns == tuple(widths)
    assert [block.up.out_features for block in uneven.blocks] == widths
    assert [block.module.mlp.intermediate_size for block in uneven.blocks] == widths
    assert uneven.shape.tied is tied is (uneven.head.weight is uneven.embeddings.weight)
    assert not uneven.shape.shortcuts
    assert uneven.measured_params() == uneven.counts.n_params == accounting.count(uneven.config).n_params
    assert weights_hash(uneven.copy()) == weights_hash(uneven)
    loaded = load(checkpoint.save(uneven, tmp_path / "saved"))
    torch.testing.assert_close(logits(loaded), logits(uneven))
    assert loaded.shape == uneven.shape
    # Sliced as well: both kinds of irregularity in one model.
    both = run(SliceGPT(), uneven, 0.5, tmp_path / "both")
    assert both.shape.ffns == tuple(widths)
    assert both.shape.shortcuts
    assert both.measured_params() == both.counts.n_params
    assert logits(load(checkpoint.save(both, tmp_path / "saved both"))).isfinite().all()


def test_irregular_configs_are_checked():
    config = {**tiny("llama").config, "model_type": "mariotte_llama"}
    with pytest.raises(ModelError, match="ffn_sizes must hold a width for each of the 2 layers, got 1"):
        accounting.count({**config, "ffn_sizes": [4]})
    with pytest.raises(UnknownNameError, match="mariotte_gpt9"):
        find("mariotte_gpt9")
    assert find("mariotte_llama").irregular
    assert not find("llama").irregular


def test_a_walk_by_halves_ends_where_the_model_does(tmp_path):
    model = tiny("qwen2")
    walk = HalfWalk(model, context_of(model, tmp_path), "test")
    for block in model.blocks:
        walk.attend(block)
        walk.feed_forward(block)
    with torch.no_grad():
        norm: nn.Module = model.final_norm
        expected = model.hf.base_model(input_ids=random_tokens()).last_hidden_state
        torch.testing.assert_close(norm(walk.stream_NTD), expected)

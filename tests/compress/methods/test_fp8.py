"""Eight-bit floats: the levels by hand and torchao's own, checkpoints that hold them packed, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TorchAoConfig

from mariotte.compress.methods.fp8 import FP8
from mariotte.compress.methods.int8_dynamic import Int8Dynamic
from mariotte.compress.methods.slicegpt import SliceGPT
from mariotte.errors import ModelError
from mariotte.experiments.pipeline import compress_model
from mariotte.models import checkpoint, packed
from mariotte.models.dynamic import modules
from mariotte.models.load import load, quiet_transformers
from mariotte.testing.methods import logits, run
from mariotte.testing.tiny import tiny

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'mariotte[quant]'")


def nearest(row):
    """Each weight rounded to the nearest of all e4m3 floats by looking at each of them."""
    levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = levels[levels.isfinite()]
    scale = row.abs().max() / 448
    return torch.stack([levels[(levels - value / scale).abs().argmin()] for value in row]) * scale


def test_each_weight_becomes_the_nearest_float_of_its_row(tmp_path):
    model = tiny("llama")
    found = run(FP8(scope="attention"), model, 8, tmp_path)
    for old, new in zip(model.matrices("attention")[:2], found.matrices("attention")[:2], strict=True):
        for before, after in zip(old.weight.detach(), new.weight.detach(), strict=True):
            torch.testing.assert_close(after, nearest(before), rtol=1e-6, atol=0)
            # Three bits of mantissa: half a step is a sixteenth, but where floats become denormal.
            within = (before.abs() / 16).clamp(min=before.abs().max() / 448 * 2**-10)
            assert ((after - before).abs() <= within * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_again_changes_nothing(dtype):
    weight = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    once = packed.round_float8(weight)
    assert once.dtype == dtype
    assert torch.equal(packed.round_float8(once), once)
    assert not once[3].any()
    assert 0 < (once - weight).norm() < 0.03 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_transformers_makes_of_the_dense_model_with_torchao(dtype, tmp_path):
    model = tiny("qwen2", dtype=dtype)
    ours = run(FP8(), model, 8, tmp_path / "prepared")
    model.hf.save_pretrained(tmp_path / "dense")
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense",
            dtype=dtype,
            quantization_config=TorchAoConfig(packed._config(packed.Form(packed.FLOAT8))),
        )
    for path, matrix in ours.paths("all").items():
        their = theirs.get_submodule(path).weight.dequantize()
        # A row's scale is made its own, which moves it by a rounding error at most.
        torch.testing.assert_close(matrix.weight.detach(), their, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", FP8.scopes)
def test_a_checkpoint_is_packed_and_loads_back_to_the_bit(scope, stored, tmp_path):
    model = run(FP8(scope=scope), tiny("llama", tied=True), 8, tmp_path / "prepared")
    folder = checkpoint.save(model, tmp_path / "saved", dtype=stored)
    done = model.done[-1]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    sizes = {name: value.numel() * value.dtype.itemsize for name, value in kept.items()}
    assert sum(sizes.values()) == checkpoint.file_bytes(folder)
    small = sum(size for name, size in sizes.items() if kept[name].dtype == torch.float8_e4m3fn)
    assert small == done.facts["weights"]
    assert f"| bytes | {sum(sizes.values()):,} (" in (folder / "README.md").read_text()
    loaded = load(folder)
    inside = {f"{path}.weight" for path in model.paths(scope)}
    for name, p in loaded.hf.named_parameters():
        was = model.hf.get_parameter(name).detach()
        assert p.dtype == torch.float32
        assert torch.equal(p, was if name in inside else was.to(stored).float()), name
    assert loaded.done == model.done
    assert loaded.counts.n_params == model.counts.n_params
    assert "quantization_config" not in loaded.config
    again = checkpoint.save(loaded, tmp_path / "again", dtype=stored)
    with safe_open(again / "model.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name).float(), value.float()) for name, value in kept.items())


def test_stock_transformers_computes_the_logits_that_were_measured(tmp_path):
    model = run(FP8(), tiny("qwen2"), 8, tmp_path / "prepared")
    folder = checkpoint.save(model, tmp_path / "saved")
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "torchao"
    assert stated["modules_to_not_convert"] == ["lm_head"]
    with quiet_transformers(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        tokens = torch.arange(40).view(2, 20)
        assert type(theirs.model.layers[0].mlp.up_proj.weight).__name__ == "Float8Tensor"
        assert torch.equal(theirs(tokens).logits, model.hf(tokens).logits)


def test_after_pruning_zeros_stay_also_where_a_whole_row_is_zero(tmp_path):
    pruned = compress_model(tiny("llama"), "magnitude-structured@0.5 | fp8")
    assert pruned.zeros() >= pruned.done[0].zeros
    loaded = load(checkpoint.save(pruned, tmp_path / "saved"))
    assert loaded.zeros() == pruned.zeros()


def test_of_a_class_of_ours_it_is_stored_unpacked(tmp_path):
    sliced = run(FP8(), run(SliceGPT(), tiny("llama"), 0.25, tmp_path / "a"), 8, tmp_path / "b")
    folder = checkpoint.save(sliced, tmp_path / "saved")
    assert checkpoint.file_bytes(folder) == 4 * sliced.measured_params()
    assert "Quantization is simulated: weights are stored as what their integers" in (folder / "README.md").read_text()


def test_beside_layers_that_round_what_they_read_it_is_stored_unpacked(tmp_path):
    """A config names one quantization."""
    rounded = run(FP8(scope="head"), run(Int8Dynamic(), tiny("llama"), 8, tmp_path / "a"), 8, tmp_path / "b")
    loaded = load(checkpoint.save(rounded, tmp_path / "saved"))
    assert modules(loaded.hf.config) == modules(rounded.hf.config) != {}
    assert torch.equal(logits(loaded), logits(rounded))


def test_what_was_changed_since_is_stored_unpacked(tmp_path):
    model = run(FP8(), tiny("llama"), 8, tmp_path / "prepared")
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(1.01)
    folder = checkpoint.save(model, tmp_path / "saved")
    assert checkpoint.file_bytes(folder) == 4 * model.measured_params()
    assert torch.equal(load(folder).blocks[1].up.weight, model.blocks[1].up.weight)


def test_without_torchao_it_is_refused_and_so_is_its_checkpoint(monkeypatch, tmp_path):
    folder = checkpoint.save(run(FP8(), tiny("llama"), 8, tmp_path / "prepared"), tmp_path / "saved")
    monkeypatch.setattr(packed, "installed", lambda: False)
    assert FP8().refuse(tiny("llama")) == (
        "needs torchao, which is not installed: pip install 'mariotte[quant]', or take int8"
    )
    with pytest.raises(ModelError, match=r"holds weights that torchao packed, and it is not installed: pip install"):
        load(folder)


def test_it_loses_little(tmp_path):
    model = tiny("llama")
    expected, found = logits(model), logits(run(FP8(), model, 8, tmp_path))
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()

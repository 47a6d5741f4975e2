"""Four-bit integers for GPUs: levels by hand and by torchao's CPU layer, packing with a stand-in for the kernel."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mariotte.chain import parse
from mariotte.cli.main import main
from mariotte.compress.methods.fp8 import FP8
from mariotte.compress.methods.int4 import Int4
from mariotte.errors import ChainError, ModelError
from mariotte.experiments import foresight, identity
from mariotte.experiments.pipeline import compress_model
from mariotte.models import checkpoint, packed
from mariotte.models.load import load, quiet_transformers
from mariotte.testing.methods import logits, run
from mariotte.testing.tiny import sizes_for, tiny

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'mariotte[quant]'")

STEP = Int4(group=32)
WIDE = sizes_for(STEP)
CPU = torch.device("cpu")


def model_of(family="llama", **settings):
    """In bfloat16 as models are that were loaded so: their rotary frequencies are not."""
    model = tiny(family, **{**WIDE, **settings})
    for parameter in model.hf.parameters():
        parameter.data = parameter.data.bfloat16()
    model.hf.config.dtype = model.stored_dtype = torch.bfloat16
    return model


def some_weights(rows=208, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


# -- levels -----------------------------------------------------------------------------------------------------------


def by_hand(group):
    """Integers and values of one group, each operation rounded to bfloat16 as torch does it."""
    low, high = group.min(), group.max()
    scale = (high - low) / 15
    middle = low + scale * 8
    level = ((group - (middle - scale * 8)) / scale).round().clamp(0, 15)
    exact = [(float(q) - 8) * float(scale) + float(middle) for q in level]
    return level.int(), torch.tensor(exact, dtype=torch.float64).bfloat16()


def test_levels_and_what_they_stand_for_are_those_of_the_formula():
    weights = some_weights(20, 32)
    levels, scale, middle = packed.int4_levels(weights)
    values = packed.int4_values(levels, scale, middle)
    for row, group in enumerate(weights):
        level, value = by_hand(group)
        assert torch.equal(levels[row], level)
        assert torch.equal(values[row], value)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_torchaos_own_layer_on_the_cpu_gives_the_same_weights_to_the_bit(group):
    """Its products with unit vectors; on the CPU it packs in another order, and computes the same."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    weights = some_weights()
    held = Int4OpaqueTensor.from_hp(weights, [1, group])
    theirs = torch.nn.functional.linear(torch.eye(256, dtype=torch.bfloat16), held).T
    ours = packed.int4_values(*packed.int4_levels(weights.view(-1, group))).view(weights.shape)
    assert torch.equal(ours, theirs)
    settled = packed.round_int4(weights, group)
    same = (settled == ours).view(-1, group).all(1).double().mean()
    assert 0.85 < same < 1  # the others have a smaller span the second time
    again = torch.nn.functional.linear(
        torch.eye(256, dtype=torch.bfloat16), Int4OpaqueTensor.from_hp(settled, [1, group])
    )
    assert torch.equal(again.T, settled)


@pytest.mark.parametrize(
    "weights",
    [
        some_weights(),
        some_weights() * 0.01 + 1,  # of which bfloat16 knows few
        some_weights() ** 5,
        some_weights().round(),
        torch.zeros(8, 256, dtype=torch.bfloat16),
        torch.full((8, 256), 3.25, dtype=torch.bfloat16),
    ],
    ids=["normal", "around one", "heavy tails", "whole numbers", "zeros", "constant"],
)
def test_rounding_again_changes_nothing_and_nothing_is_far_off(weights):
    before = weights.clone()
    once = packed.round_int4(weights, 32)
    assert torch.equal(weights, before)
    assert torch.equal(packed.round_int4(once, 32), once)
    assert torch.equal(packed.int4_values(*packed.int4_levels(once.view(-1, 32))).view(once.shape), once)
    assert (once.view(-1, 32).sort(1).values.diff(dim=1) != 0).sum(1).max() <= 15
    span = (weights.view(-1, 32).amax(1) - weights.view(-1, 32).amin(1)).repeat_interleave(32).view(weights.shape)
    ulp = weights.abs() * 2**-7
    assert ((once - weights).abs() <= span / 15 + 3 * ulp).all()


def test_it_is_as_good_as_rounding_to_nearest_with_groups(tmp_path):
    """At equal groups: twice four bits lose within a tenth of each other."""
    from mariotte.compress.methods.rtn import RTN

    model = model_of()
    ours, theirs = run(STEP, model, 4, tmp_path / "a"), run(RTN(group=32), model, 4, tmp_path / "b")
    for old, a, b in zip(model.matrices("all"), ours.matrices("all"), theirs.matrices("all"), strict=True):
        lost = [float((new.weight.detach() - old.weight.detach()).float().norm()) for new in (a, b)]
        assert lost[0] == pytest.approx(lost[1], rel=0.1)
        assert 0.03 < lost[0] / float(old.weight.detach().float().norm()) < 0.12


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 256), (2048, 2048), (130, 1536), (11008, 4096), (7, 4864)])
@pytest.mark.parametrize("group", packed.GROUPS)
def test_bytes_are_those_that_torchao_takes(shape, group, monkeypatch):
    """Asked of its own class, without any weights: what it would hold on a GPU, filled up with zeros."""
    from torchao.quantization import Int4TilePackedTo4dTensor

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with torch.device("meta"):
        held = Int4TilePackedTo4dTensor.from_hp(torch.empty(shape, dtype=torch.bfloat16), [1, group])
    parts = (held.qdata, held.scale_and_zero)
    assert packed.int4_bytes(*shape, group) == sum(part.numel() * part.dtype.itemsize for part in parts)
    assert Int4(group=group).packed(*shape, 4, torch.float32) == packed.int4_bytes(*shape, group)
    if shape == (2048, 2048):
        assert packed.int4_bytes(*shape, group) == 2048 * 2048 // 2 + 2048 * 2048 // group * 4


# -- packing, with a stand-in for the kernel --------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """The two operators that only a GPU has, on the CPU: bytes in the order in which they come."""

    def pack(bytes_NK, tiles):
        outputs, half = bytes_NK.shape
        assert (tiles, half % 512, outputs % 8) == (8, 0, 0)
        return bytes_NK.contiguous().view(torch.int32).reshape(outputs // 8, 2 * half // (tiles * 16), 32, tiles // 2)

    def product(x_MK, held, group, scales_GN2):
        outputs, inputs = held.shape[0] * 8, held.shape[1] * 128
        both = held.contiguous().view(torch.uint8).view(outputs, inputs // 2)
        level = torch.stack([both >> 4, both & 15], -1).view(outputs, inputs).int()
        scale, middle = (scales_GN2[..., part].T.reshape(-1, 1) for part in (0, 1))
        weight = packed.int4_values(level.view(-1, group), scale, middle).view(outputs, inputs)
        return torch.nn.functional.linear(x_MK, weight)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_convert_weight_to_int4pack", pack, "CPU")
        library.impl("_weight_int4pack_mm", product, "CPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        monkeypatch.setattr(packed, "cannot_hold_int4", lambda device: None)
        yield


@pytest.mark.parametrize("scope", Int4.scopes)
def test_a_checkpoint_is_packed_and_loads_back_to_the_bit(scope, tmp_path, stand_in):
    model = run(Int4(group=32, scope=scope), model_of(tied=True), 4, tmp_path / "prepared")
    folder = checkpoint.save(model, tmp_path / "saved")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    small = sum(v.numel() * v.dtype.itemsize for name, v in kept.items() if name.endswith(("_qdata", "_zero")))
    assert small == model.done[-1].facts["packed_bytes"]
    loaded = load(folder, dtype=torch.bfloat16)
    for name, parameter in loaded.hf.named_parameters():
        assert torch.equal(parameter, model.hf.get_parameter(name)), name
    assert (loaded.done, loaded.counts) == (model.done, model.counts)
    assert "quantization_config" not in loaded.config
    again = checkpoint.save(loaded, tmp_path / "again")
    with safe_open(again / "model.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in kept.items())
    assert "four-bit integers for an NVIDIA GPU, which `transformers` reads" in (folder / "README.md").read_text()


@torch.no_grad()
def test_stock_transformers_holds_them_packed_and_computes_the_same(tmp_path, stand_in):
    model = run(STEP, model_of("qwen2"), 4, tmp_path / "prepared")
    folder = checkpoint.save(model, tmp_path / "saved")
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "torchao"
    assert stated["modules_to_not_convert"] == ["lm_head"]
    assert stated["quant_type"]["default"]["_type"] == "Int4WeightOnlyConfig"
    assert stated["quant_type"]["default"]["_data"]["group_size"] == 32
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(theirs.model.layers[0].mlp.up_proj.weight).__name__ == "Int4TilePackedTo4dTensor"
    tokens = torch.arange(40).view(2, 20)
    expected = model.hf(tokens).logits.float()
    assert (theirs(tokens).logits.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_it_is_what_transformers_makes_of_the_dense_model_with_torchao(tmp_path, stand_in):
    from transformers import TorchAoConfig

    model = model_of("qwen2")
    ours = run(STEP, model, 4, tmp_path / "prepared")
    model.hf.save_pretrained(tmp_path / "dense")
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", dtype=torch.bfloat16, quantization_config=TorchAoConfig(packed._config(STEP.form))
        )
    same = total = 0
    for path, matrix in ours.paths("all").items():
        their = packed._plain(theirs.get_submodule(path).weight, torch.bfloat16)
        groups = (matrix.weight == their).reshape(-1, 32).all(1)
        same, total = same + int(groups.sum()), total + len(groups)
    assert 0.85 < same / total < 1


def test_what_was_changed_since_is_stored_as_it_is_and_so_is_what_two_quantizers_hold(tmp_path, stand_in):
    model = run(STEP, model_of(), 4, tmp_path / "a")
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(1.25)
    folder = checkpoint.save(model, tmp_path / "saved")
    assert checkpoint.file_bytes(folder) == 2 * model.measured_params()
    both = run(
        FP8(scope="ffn"), run(Int4(group=32, scope="attention"), model_of(), 4, tmp_path / "b"), 8, tmp_path / "c"
    )
    folder = checkpoint.save(both, tmp_path / "both")
    assert checkpoint.file_bytes(folder) == 2 * both.measured_params()


def test_a_packed_checkpoint_without_a_gpu_is_refused_in_a_sentence(tmp_path, stand_in, monkeypatch):
    folder = checkpoint.save(run(STEP, model_of(), 4, tmp_path / "prepared"), tmp_path / "saved")
    monkeypatch.setattr(packed, "cannot_hold_int4", lambda device: "needs a GPU")
    with pytest.raises(ModelError, match=r"^four-bit integers that torchao packed for a GPU .*: load the checkpoint t"):
        load(folder)


# -- what is refused --------------------------------------------------------------------------------------------------

ON_A_CPU = (
    "int4 cannot work on {}: it needs an NVIDIA GPU of compute capability 8.0 or newer, and this runs on cpu: "
    "take rtn@4(group={}) instead"
)


@pytest.mark.parametrize("chain", ["int4(group=32)", "ffn@0.25 | int4(group=32)", "int4(group=32):head"])
def test_on_a_cpu_it_is_refused_before_any_work(chain, monkeypatch):
    chain = chain.replace("(group=32):head", ":head(group=32)")
    model = model_of()
    monkeypatch.setattr(Int4, "prepare", lambda *_: pytest.fail("work was done"))
    monkeypatch.setattr("mariotte.experiments.bench.prepare_once", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ModelError) as raised:
        compress_model(model, chain)
    assert str(raised.value) == ON_A_CPU.format(model.name, 32)
    parts = identity.resolve(parse(chain))
    with pytest.raises(ModelError, match=r"rtn@4\(group=32\) instead$"):
        foresight.check(model.name, model.config, parts)


def test_the_command_says_so_before_it_loads_anything(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mariotte.models.load.load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr("sys.argv", ["mariotte", "compress", "testbed/llama-1m", "int4", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert ON_A_CPU.format("testbed/llama-1m", 128) in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_groups_are_checked_against_what_torchao_knows_and_against_widths():
    with pytest.raises(ChainError, match=r"^int4: group must be one of 32, 64, 128, 256, got 48: take"):
        Int4(group=48)
    assert Int4(group=128).refuse(tiny("llama", hidden=64, ffn=128)) == (
        "needs input widths that group=128 divides, and model.layers.0.self_attn.q_proj.weight has 64: "
        "take a group that divides them all (64, 32), or take rtn@4, whose groups are of any size"
    )
    assert "has 48: take rtn@4, whose" in str(Int4(group=32).refuse(tiny("llama")))
    assert Int4(group=32, scope="attention").refuse(tiny("llama")) is None


def test_what_it_cannot_do_is_refused_by_name(monkeypatch):
    pruned = compress_model(model_of(), "magnitude@0.5:ffn")
    assert STEP.refuse(pruned) == (
        "needs weights that were not set to zero, which is none of its levels, and magnitude@0.5:ffn was done to them: "
        "take rtn@4, which keeps zeros"
    )
    assert Int4(group=32, scope="attention").refuse(pruned) is None
    assert "needs linear layers, and gpt2 holds" in str(STEP.refuse(tiny("gpt2", **WIDE)))
    assert "mixture of experts" in str(STEP.refuse(tiny("mixtral", **WIDE)))
    monkeypatch.setattr(packed, "installed", lambda: False)
    assert STEP.refuse(model_of()) == (
        "needs torchao, which is not installed: pip install 'mariotte[quant]', or take rtn@4"
    )


@pytest.mark.parametrize(("capability", "said"), [((7, 5), "and this one has 7.5"), ((8, 0), None), ((9, 0), None)])
def test_of_gpus_the_older_are_refused(capability, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    reason = STEP.refuse_device(torch.device("cuda"))
    assert reason is None if said is None else said in str(reason)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_a_checkpoint_is_packed_and_gives_the_logits_that_were_measured(tmp_path):
    if not torch.cuda.is_available() or packed.cannot_hold_int4(torch.device("cuda")):
        pytest.skip("there is no NVIDIA GPU of compute capability 8.0 here")
    dense = model_of("qwen2")
    folder = checkpoint.save(dense, tmp_path / "dense")
    model = compress_model(load(folder, "cuda", torch.bfloat16), "int4(group=32)")
    on_the_cpu = run(STEP, copy.deepcopy(dense), 4, tmp_path / "cpu")
    for ours, theirs in zip(model.matrices("all"), on_the_cpu.matrices("all"), strict=True):
        assert torch.equal(ours.weight.cpu(), theirs.weight)
    saved = checkpoint.save(model, tmp_path / "saved")
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        small = sum(
            math.prod(file.get_slice(name).get_shape()) * (4 if name.endswith("_qdata") else 2)
            for name in file.keys()  # noqa: SIM118  it is no dict
            if name.endswith(("_qdata", "_scale_and_zero"))
        )
    assert small == model.done[-1].facts["packed_bytes"]
    loaded = load(saved, "cuda", torch.bfloat16)
    for name, parameter in loaded.hf.named_parameters():
        assert torch.equal(parameter, model.hf.get_parameter(name)), name
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(saved, dtype="auto", device_map="cuda")
    expected = logits(model)
    found = theirs(torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1)).cuda()).logits.float()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()

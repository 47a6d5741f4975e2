"""GPTQ: the update against optimal brain quantization written naively, groups, zeros, and what is refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mariotte.compress import llm_compressor
from mariotte.compress.methods.gptq import GPTQ, gptq
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.rtn import RTN
from mariotte.compress.quantize import minmax_grid, round_absmax, round_minmax
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.testing.methods import MethodConformance, cases, overflowing, run
from mariotte.testing.tiny import random_tokens, tiny

WIDE = torch.float64


@pytest.mark.parametrize(
    ("step", "family"),
    cases([GPTQ(sequential=False, act_order=True, symmetric=True)], ["qwen2"]),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestVariants(MethodConformance):
    pass


def layer(outputs=6, inputs=16, tokens=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=WIDE)
    x = torch.randn(tokens, inputs, generator=generator, dtype=WIDE) @ mixing
    return torch.randn(outputs, inputs, generator=generator, dtype=WIDE), x


def moment(x):
    return x.T @ x / len(x)


def naive(weight, x, bits, *, group=None, act_order=False, damp=0.01):
    """Optimal brain quantization in a fixed order, a weight at a time, inverting anew what is left of the moment."""
    weight = weight.numpy().copy()
    full = moment(x).numpy()
    full = full + damp * np.diag(full).mean() * np.eye(len(full))
    outputs, inputs = weight.shape
    order = sorted(range(inputs), key=lambda i: -full[i, i]) if act_order else list(range(inputs))
    size, most = group or inputs, 2**bits - 1
    result, scales = np.zeros_like(weight), {}

    def grid(row):
        low, high = min(row.min(), 0), max(row.max(), 0)
        scale = (high - low) / most
        return scale, np.round(-low / scale)

    for o in range(outputs):
        for start in range(0, inputs, size):
            scales[o, start // size] = grid(weight[o, start : start + size])
    for place, j in enumerate(order):
        rest = order[place:]
        inverse = np.linalg.inv(full[np.ix_(rest, rest)])
        for o in range(outputs):
            if group and not act_order and j % group == 0:
                scales[o, j // size] = grid(weight[o, j : j + size])
            scale, zero = scales[o, j // size]
            result[o, j] = (np.clip(np.round(weight[o, j] / scale) + zero, 0, most) - zero) * scale
            # The others make up for it by least squares: their best answer to the output that was lost.
            weight[o, rest] -= (weight[o, j] - result[o, j]) / inverse[0, 0] * inverse[0]
    return result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_equal_naive_optimal_brain_quantization(bits, group, act_order):
    weight, x = layer()
    expected = naive(weight, x, bits, group=group, act_order=act_order)
    for columns in (1, 4, 7, 128):
        found = gptq(weight, moment(x), bits, WIDE, group=group, act_order=act_order, columns=columns)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_columns_are_a_matter_of_speed_alone_also_where_groups_are_wider():
    weight, x = layer(outputs=8, inputs=48, tokens=300, seed=2)
    whole = gptq(weight, moment(x), 3, WIDE, group=12, columns=128)
    for columns in (5, 12, 13, 36):
        torch.testing.assert_close(gptq(weight, moment(x), 3, WIDE, group=12, columns=columns), whole)


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_correlations_it_is_round_to_nearest(symmetric):
    weight, _ = layer()
    expected = (round_absmax if symmetric else round_minmax)(weight, 3, WIDE)
    torch.testing.assert_close(gptq(weight, torch.eye(16).double(), 3, WIDE, symmetric=symmetric), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_update_lowers_the_error_of_the_output(bits):
    weight, x = layer(outputs=10, inputs=40, tokens=400)
    error = {
        name: float((x @ (weight - found).T).square().mean())
        for name, found in (
            ("gptq", gptq(weight, moment(x), bits, WIDE)),
            ("ordered", gptq(weight, moment(x), bits, WIDE, act_order=True)),
            ("rtn", round_minmax(weight, bits, WIDE)),
        )
    }
    assert error["gptq"] < 0.6 * error["rtn"]
    assert error["ordered"] < 0.6 * error["rtn"]


def test_every_weight_lies_on_the_grid_of_its_row():
    weight, x = layer()
    found = gptq(weight, moment(x), 3, WIDE)
    levels = found / minmax_grid(weight, 3, WIDE).scale_N1
    torch.testing.assert_close(levels, levels.round())
    assert all(len(row.unique()) <= 8 for row in found)


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest_and_move_no_others():
    weight, x = layer()
    weight[:, 5] *= 0.01  # so that it has no part in the grid
    x[:, 5] = 0
    found = gptq(weight, moment(x), 3, WIDE)
    torch.testing.assert_close(found[:, 5], round_minmax(weight, 3, WIDE)[:, 5])
    rest = [i for i in range(16) if i != 5]
    # The damping is a share of the mean of the diagonal, to which the dead input adds nothing.
    alone = gptq(weight[:, rest], moment(x[:, rest]), 3, WIDE, damp=0.01 * 15 / 16)
    torch.testing.assert_close(found[:, rest], alone)
    assert gptq(weight, torch.zeros(16, 16).double(), 3, WIDE).isfinite().all()


@pytest.mark.parametrize("sequential", [True, False])
def test_zeros_stay_zero_and_others_make_up_for_what_is_lost(sequential, tmp_path):
    pruned = run(Magnitude(), tiny("llama"), 0.5, tmp_path / "a")
    found = run(GPTQ(sequential=sequential), pruned, 4, tmp_path / "b")
    for new, old in zip(found.matrices("all"), pruned.matrices("all"), strict=True):
        assert bool((new.weight[old.weight == 0] == 0).all())


@pytest.mark.parametrize("scope", GPTQ.scopes)
@pytest.mark.parametrize("tied", [True, False])
def test_only_the_scope_is_touched_and_bytes_are_those_of_rtn(scope, tied, tmp_path):
    model = tiny("qwen2", tied=tied)
    found = run(GPTQ(scope=scope, group=16), model, 3, tmp_path / "a")
    same = run(RTN(scope=scope, group=16), model, 3, tmp_path / "b")
    assert found.counts == same.counts
    assert found.done[-1].facts == same.done[-1].facts
    before = dict(model.hf.named_parameters(remove_duplicate=False))
    changed = {name for name, new in found.hf.named_parameters() if not new.equal(before[name])}
    assert changed == ({"lm_head.weight"} if scope == "head" else {f"{path}.weight" for path in model.paths(scope)})


def test_blocks_see_what_earlier_ones_have_become(tmp_path):
    model = tiny("llama")
    behind, apart = (run(GPTQ(sequential=s), model, 2, tmp_path / str(s)) for s in (True, False))
    same = [
        all(
            torch.equal(a.weight, b.weight)
            for a, b in zip(one.attention + one.ffn, two.attention + two.ffn, strict=True)
        )
        for one, two in zip(behind.blocks, apart.blocks, strict=True)
    ]
    assert same == [True, False]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"group": 0}, "^gptq: group must be a positive number of weights, got 0: try group=64$"),
        ({"damp": 0.0}, "^gptq: damp must be positive, such as 0.01, got 0.0$"),
        ({"by": "autogptq"}, "^gptq: by must be one of mariotte, llm-compressor, got 'autogptq'$"),
        ({"by": "llm-compressor", "scope": "head"}, "rounds attention and MLP, got the scope head: leave by out"),
        ({"by": "llm-compressor", "sequential": False}, "is always sequential, got sequential=false"),
    ],
)
def test_fields_are_checked(fields, words):
    with pytest.raises(ChainError, match=words):
        GPTQ(**fields)


@pytest.mark.parametrize("amount", [1, 1.5, 9, None])
def test_bits_out_of_range_are_refused(amount):
    with pytest.raises(ChainError, match=r"^gptq(: bits must be| needs an amount of bits).*got"):
        GPTQ().accepted(amount)


def test_a_group_that_does_not_divide_a_width_is_refused_with_those_that_would():
    assert GPTQ(group=32).refuse(tiny("llama")) == (
        "needs input widths that group=32 divides, and model.layers.0.mlp.down_proj.weight has 48: "
        "take a group that divides them all (16, 8, 4, 2), or leave group out"
    )
    assert "and has 45: leave group out" in str(GPTQ(group=32).refuse(tiny("llama", ffn=45))).replace(
        "model.layers.0.mlp.down_proj.weight ", ""
    )
    assert GPTQ(group=32, scope="attention").refuse(tiny("llama")) is None


@pytest.mark.parametrize("scope", ["all", "head"])
def test_activations_that_are_not_finite_and_single_tokens_are_refused(scope, tmp_path):
    step = GPTQ(scope=scope)
    group = "head" if scope == "head" else "block-0 mlp"
    with pytest.raises(ModelError, match=f"gptq found activations that are not finite in {group} of tiny"):
        run(step, overflowing(tiny("llama")), 4, tmp_path / "a")
    with pytest.raises(DataError, match="gptq needs at least 2 calibration tokens, got 1"):
        run(step, tiny("llama"), 4, tmp_path / "o", random_tokens(1, 1))


STUB = """
import json, os
from pathlib import Path
import torch

def oneshot(model, dataset, recipe, **others):
    rows = [{k: v.tolist() for k, v in batch.items()} for batch in dataset]
    weights = recipe["config_groups"]["group_0"]["weights"]
    for path in recipe["config_groups"]["group_0"]["targets"]:
        weight = model.get_submodule(path).weight
        parts = weight.detach().view(-1, weights.get("group_size", weight.shape[1]))
        step = (parts.amax(1, keepdim=True) - parts.amin(1, keepdim=True)) / (2 ** weights["num_bits"] - 1)
        weight.data = ((parts - parts.amin(1, keepdim=True)) / step).round().mul(step).view(weight.shape)
    said = {"recipe": recipe, "rows": rows, "others": others, "offline": os.environ["HF_HUB_OFFLINE"]}
    Path(__file__).with_name("said.json").write_text(json.dumps(said))
"""


def script(folder, commands):
    """A program that does what these commands say; its second argument is the folder of the job."""
    program = folder / "python-of-llm-compressor"
    program.write_text(f"#!/bin/sh\n{commands}\n")
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A Python whose llm-compressor writes down what it was handed, and rounds weights in a way of its own."""
    packages = tmp_path / "packages"
    modifiers = packages / "llmcompressor" / "modifiers"
    (modifiers / "gptq").mkdir(parents=True)
    (packages / "llmcompressor-0.99.dist-info").mkdir()
    (packages / "llmcompressor-0.99.dist-info" / "METADATA").write_text("Name: llmcompressor\nVersion: 0.99\n")
    (packages / "llmcompressor" / "__init__.py").write_text(STUB)
    (modifiers / "__init__.py").write_text("")
    (modifiers / "gptq" / "__init__.py").write_text("def GPTQModifier(**recipe):\n    return recipe\n")
    program = script(tmp_path, f'PYTHONPATH="{packages}" exec "{sys.executable}" "$@"')
    monkeypatch.setenv(llm_compressor.VARIABLE, program)
    return packages / "llmcompressor"


def test_llm_compressor_is_handed_the_model_the_rows_and_the_grid_and_its_weights_are_read_back(fake, tmp_path):
    model, rows = tiny("qwen2", tied=True), random_tokens(3, 8)
    step = GPTQ(by="llm-compressor", group=16, act_order=True, damp=0.02, scope="ffn")
    found = run(step, model, 4, tmp_path / "run", rows)
    said = json.loads((fake / "said.json").read_text())
    assert said["recipe"] == {
        "config_groups": {
            "group_0": {
                "targets": list(model.paths("ffn")),
                "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16},
            }
        },
        "dampening_frac": 0.02,
        "actorder": "static",
    }
    assert [row["input_ids"] for row in said["rows"]] == [[row] for row in rows.tolist()]
    assert said["others"] == {
        "num_calibration_samples": 3,
        "max_seq_length": 8,
        "shuffle_calibration_samples": False,
    }
    assert said["offline"] == "1"
    for old, new in zip(model.matrices("ffn"), found.matrices("ffn"), strict=True):
        parts = old.weight.detach().view(-1, 16)
        least, step_N1 = parts.amin(1, keepdim=True), (parts.amax(1, keepdim=True) - parts.amin(1, keepdim=True)) / 15
        assert torch.equal(new.weight, ((parts - least) / step_N1).round().mul(step_N1).view(old.weight.shape))
    assert all(
        a.weight.equal(b.weight) for a, b in zip(model.matrices("attention"), found.matrices("attention"), strict=True)
    )
    ours = run(GPTQ(group=16, scope="ffn"), model, 4, tmp_path / "ours", rows)
    assert found.counts == ours.counts
    assert found.done[-1].facts == {**ours.done[-1].facts, "by": "llm-compressor 0.99"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weight: weight, "has 32 levels in a group, more than 4 bits have"),
        (lambda weight: weight[:1], "should be .* finite numbers"),
        (lambda weight: weight * float("nan"), "should be .* finite numbers"),
        (None, "left something else .*rounded.safetensors"),
    ],
)
def test_what_llm_compressor_leaves_is_checked(change, words, monkeypatch, tmp_path):
    model = tiny("llama")
    if change is not None:
        weights = {f"{path}.weight": change(m.weight.detach()) for path, m in model.paths("attention").items()}
        save_file(weights, tmp_path / "left.safetensors", {"llmcompressor": "0.99"})
    monkeypatch.setenv(
        llm_compressor.VARIABLE, script(tmp_path, f'cp "{tmp_path}/left.safetensors" "$2/rounded.safetensors"; exit 0')
    )
    with pytest.raises(ModelError, match=f"^gptq .*{words}.* leave by out$") as raised:
        run(GPTQ(by="llm-compressor", scope="attention"), model, 4, tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_llm_compressor_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv(
        llm_compressor.VARIABLE, script(tmp_path, "echo first >&2; echo no compressed_tensors >&2; exit 3")
    )
    with pytest.raises(
        ModelError, match=r"^gptq .* ended with code 3 \(no compressed_tensors\): see that .* leave by out$"
    ):
        run(GPTQ(by="llm-compressor"), tiny("llama"), 4, tmp_path / "run")


def test_llm_compressor_that_is_not_there_is_asked_for(monkeypatch, tmp_path):
    step = GPTQ(by="llm-compressor")
    monkeypatch.delenv(llm_compressor.VARIABLE, raising=False)
    assert step.refuse(tiny("llama")) == (
        "by=llm-compressor needs that program in a Python environment of its own, and MARIOTTE_LLM_COMPRESSOR is not "
        "set: make one, run pip install llmcompressor in it and set MARIOTTE_LLM_COMPRESSOR to its python, or leave by "
        "out"
    )
    monkeypatch.setenv(llm_compressor.VARIABLE, str(tmp_path / "nowhere"))
    assert "nowhere', which is no program: make one" in str(step.refuse(tiny("llama")))

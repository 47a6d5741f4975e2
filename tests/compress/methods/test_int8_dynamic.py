"""Eight-bit weights and inputs: both schemes by hand, torch's own dynamic quantization beside ours, and checkpoints."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from mariotte.compress.methods.int8_dynamic import Int8Dynamic, round_whole_matrix
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.shortgpt import ShortGPT
from mariotte.compress.methods.slicegpt import SliceGPT
from mariotte.compress.methods.svd_llm import SVDLLM
from mariotte.errors import ChainError, ModelError
from mariotte.models import checkpoint
from mariotte.models.dynamic import DynamicLinear, modules, round_tokens, round_whole, wrap_
from mariotte.models.load import load
from mariotte.testing.methods import MethodConformance, cases, logits, run
from mariotte.testing.tiny import random_tokens, tiny


def torch_dynamic(hf, names):
    """torch's own dynamic quantization of some layers: int8 kernels and all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, in favour of torchao; it is what the study used
        return torch.ao.quantization.quantize_dynamic(hf, set(names), dtype=torch.qint8)


def test_each_token_is_rounded_by_itself():
    x = torch.tensor([[127.0, 0.4, -63.6, 2.5], [1.27, 0.004, -0.006, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, 0.0, -64.0, 2.0], [1.27, 0.0, -0.01, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_tokens(x), expected)


def levels_of_torch(x: torch.Tensor) -> torch.Tensor:
    """Inputs as torch's kernel rounds them: what a matrix of ones on the diagonal makes of them, in steps."""
    layer = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1], bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(torch.eye(x.shape[-1]))
    theirs = torch_dynamic(layer, ["0"])
    scale, _ = torch._choose_qparams_per_tensor(x, reduce_range=True)
    return (theirs(x) / theirs[0].weight().dequantize().max() / scale).round()


def test_all_inputs_share_a_scale_as_in_torch():
    x = torch.tensor([[-1.0, 0.0, 0.24, 2.5], [126.0, 0.76, 3.5, 4.5]])  # 127 steps of 1
    # Halves go to the even level, and levels count from the least value: 2.5 is level 3.5.
    assert round_whole(x).tolist() == [[-1, 0, 0, 3], [126, 1, 3, 5]]
    assert torch.equal(round_whole(x), levels_of_torch(x))
    assert round_whole(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_levels_are_those_that_torch_chooses():
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-9, 5):
        x = 10.0**exponent * (torch.randn(16, 64, generator=generator) + torch.randn(1, generator=generator))
        scale, _ = torch._choose_qparams_per_tensor(x, reduce_range=True)
        assert ((round_whole(x) / scale - levels_of_torch(x)).abs() > 0.5).sum() == 0


@pytest.mark.parametrize("rounded", [round_tokens, round_whole])
def test_gradients_pass_through_and_dtypes_stay(rounded):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.arange(40.0).view(5, 8)
    (rounded(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    assert rounded(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 50.0])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 5.0])
def test_one_layer_equals_that_of_torch(scale, shift):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(24, 40))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = scale * (torch.randn(3, 7, 24, generator=generator) + shift)
    theirs = torch_dynamic(layer, ["0"])(x)
    ours = nn.functional.linear(round_whole(x), round_whole_matrix(layer[0].weight), layer[0].bias)
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_next_to_a_half_is_rounded_to_the_level_of_torch(dtype):
    """Checkpoints in bfloat16 have many weights exactly there, and among 400,000 inputs are some."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        layer = nn.Sequential(nn.Linear(64, 64))
        layer[0].weight.copy_(0.2 * torch.randn(64, 64, generator=generator).to(dtype).float())
        x = torch.randn(6400, 64, generator=generator)
        theirs = torch_dynamic(layer, ["0"])
        assert torch.equal(round_whole_matrix(layer[0].weight), theirs[0].weight().dequantize())
        expected = theirs(x)
        found = nn.functional.linear(round_whole(x), round_whole_matrix(layer[0].weight), layer[0].bias)
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def assert_is_rounding(found, expected, dense):
    """That two results of quantization differ by far less than either from the dense one.

    Sums of floats in another order put a value now and then on the other side of a half, a level further: few logits
    feel it, and most are equal to float rounding.
    """
    lost, off = (expected - dense).abs(), (found - expected).abs()
    assert off.norm() < 0.3 * lost.norm()
    assert off.median() < 0.05 * lost.median()


def bert():
    """A random BERT whose logits are far from zero."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    hf = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim == 2 and "encoder" in name:
                parameter.mul_(8)
    return hf


@torch.no_grad()
def test_a_bert_equals_that_of_torch():
    hf, tokens = bert(), random_tokens(8, 24)
    names = [name for name, m in hf.bert.encoder.named_modules(prefix="bert.encoder") if isinstance(m, nn.Linear)]
    theirs = torch_dynamic(copy.deepcopy(hf), names)
    ours = copy.deepcopy(hf)
    for name in names:
        weight = ours.get_submodule(name).weight
        weight.copy_(round_whole_matrix(weight))
    wrap_(ours, names, "torch")
    dense, expected, found = (m(input_ids=tokens).logits for m in (hf, theirs, ours))
    assert_is_rounding(found, expected, dense)
    assert (found.argmax(-1) == expected.argmax(-1)).double().mean() > 0.97


@torch.no_grad()
@pytest.mark.parametrize("scope", ["all", "attention", "ffn", "head"])
def test_a_llama_equals_that_of_torch(scope, tmp_path):
    model, tokens = tiny("llama"), random_tokens(4, 16)
    ours = run(Int8Dynamic(scheme="torch", scope=scope), model, 8, tmp_path)
    theirs = torch_dynamic(copy.deepcopy(model.hf), modules(ours.hf.config))
    expected, found, dense = theirs(input_ids=tokens, use_cache=False).logits, ours.logits(tokens), model.logits(tokens)
    assert_is_rounding(found, expected, dense)


@pytest.mark.parametrize("scope", Int8Dynamic.scopes)
@pytest.mark.parametrize("scheme", ["token", "torch"])
def test_layers_in_scope_round_what_they_read_and_no_others(scope, scheme, tmp_path):
    model = tiny("qwen2", tied=True)
    result = run(Int8Dynamic(scope=scope, scheme=scheme), model, 8, tmp_path)
    rounding = {id(m) for m in result.hf.modules() if isinstance(m, DynamicLinear)}
    assert rounding == {id(m) for m in result.matrices(scope)}
    assert not any(isinstance(m, DynamicLinear) for m in model.hf.modules())
    weights = sum(m.weight.numel() for m in result.matrices(scope))
    scales = len(result.matrices(scope)) if scheme == "torch" else sum(len(m.weight) for m in result.matrices(scope))
    assert result.counts.n_bytes == 4 * (result.counts.n_params - weights) + weights + 4 * scales
    assert (logits(result) - logits(model)).norm() < 0.1 * logits(model).norm()


def test_what_comes_later_keeps_the_rounding_and_what_came_before_is_saved_with_it(tmp_path):
    model = tiny("llama")
    first = run(Int8Dynamic(), model, 8, tmp_path / "a")
    for step, amount in ((Magnitude(), 0.0), (SliceGPT(), 0.5)):
        later = run(step, first, amount, tmp_path / step.name())
        assert sum(isinstance(m, DynamicLinear) for m in later.hf.modules()) == len(later.matrices("all"))
    assert torch.equal(logits(run(Magnitude(), first, 0.0, tmp_path / "b")), logits(first))
    # Blocks have other numbers once some are gone, and so have their layers.
    fewer = run(ShortGPT(), run(Int8Dynamic(scope="ffn"), model, 8, tmp_path / "e"), 0.5, tmp_path / "f")
    assert sorted(modules(fewer.hf.config)) == [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert torch.equal(logits(load(checkpoint.save(fewer, tmp_path / "fewer"))), logits(fewer))
    sliced = run(Int8Dynamic(), run(SliceGPT(), model, 0.5, tmp_path / "c"), 8, tmp_path / "d")
    loaded = load(checkpoint.save(sliced, tmp_path / "saved"))
    assert torch.allclose(logits(loaded), logits(sliced), atol=1e-5)
    assert modules(loaded.hf.config) == modules(sliced.hf.config)
    assert loaded.counts == sliced.counts


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_matrix_that_rounds_what_it_reads_is_not_factored(family, tmp_path):
    quantized = run(Int8Dynamic(scope="ffn"), tiny(family), 8, tmp_path)
    for scope in ("all", "ffn"):
        assert "rounds what it reads, which neither of them would" in str(SVDLLM(scope=scope).refuse(quantized))
    assert SVDLLM(scope="attention").refuse(quantized) is None


@pytest.mark.parametrize("path", ["model.layers.7.mlp.up_proj", "model.layers.0.input_layernorm"])
def test_a_config_that_speaks_of_other_layers_is_refused(path, tmp_path):
    checkpoint.save(run(Int8Dynamic(), tiny("llama"), 8, tmp_path), tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["modules"][path] = "token"
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"the config says that {path} rounds its input, and the model has no such"):
        load(tmp_path / "saved")


def test_the_card_says_what_is_simulated(tmp_path):
    result = run(Int8Dynamic(), tiny("llama"), 8, tmp_path / "a")
    card = (checkpoint.save(result, tmp_path / "saved") / "README.md").read_text(encoding="utf-8")
    assert f"Packed, the model would take {result.counts.n_bytes:,} bytes." in card
    assert "`transformers` does that after `import mariotte.models.dynamic`." in card
    pruned = run(Magnitude(), tiny("llama"), 0.5, tmp_path / "b")
    assert "simulated" not in (checkpoint.save(pruned, tmp_path / "pruned") / "README.md").read_text(encoding="utf-8")


def test_two_scopes_may_have_two_schemes(tmp_path):
    first = run(Int8Dynamic(scope="attention"), tiny("llama"), 8, tmp_path / "a")
    both = run(Int8Dynamic(scope="ffn", scheme="torch"), first, 8, tmp_path / "b")
    loaded = load(checkpoint.save(both, tmp_path / "saved"))
    assert torch.allclose(logits(loaded), logits(both), atol=1e-4 * float(logits(both).abs().max()))
    assert sorted(modules(loaded.hf.config).values()) == ["token"] * 8 + ["torch"] * 6
    assert len(modules(first.hf.config)) == 8


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_each_expert_rounds_what_its_tokens_bring_and_what_its_neurons_give(family, tmp_path):
    """The experts of one block by hand, from the rounded weights."""
    model = run(Int8Dynamic(scope="ffn"), tiny(family), 8, tmp_path)
    seen = {}
    held = model.blocks[0].module.get_submodule(model.entry.experts)
    held.register_forward_hook(lambda _module, arguments, found: seen.update(arguments=arguments, found=found))
    model.logits(random_tokens(2, 9))
    x_MD, taken_Mk, shares_Mk = seen["arguments"][:3]
    expected = torch.zeros_like(x_MD)
    for token, x_D in enumerate(x_MD):
        for expert, share in zip(taken_Mk[token], shares_Mk[token], strict=True):
            ins, down = held.gate_up_proj[expert], held.down_proj[expert]
            if family == "gpt_oss":
                both = by_hand(x_D) @ ins + held.gate_up_proj_bias[expert]
                gate, up = both[::2].clamp(max=held.limit), both[1::2].clamp(-held.limit, held.limit)
                given = by_hand((up + 1) * gate * torch.sigmoid(held.alpha * gate)) @ down
                expected[token] += share * (given + held.down_proj_bias[expert])
            else:
                gate, up = (ins @ by_hand(x_D)).chunk(2)
                expected[token] += share * (down @ by_hand(torch.nn.functional.silu(gate) * up))
    # Next to a half a value may fall on its other side: of a few hundred one would show as a level of its row.
    assert (seen["found"] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert modules(model.hf.config) == {f"model.layers.{layer}.mlp.experts": "token" for layer in range(2)}


def by_hand(x_I):
    """A token's values rounded to 255 levels around zero."""
    scale = x_I.abs().max() / 127
    return (x_I / scale).round() * scale


def test_one_scale_for_a_whole_matrix_is_not_what_stacked_experts_have():
    assert Int8Dynamic(scheme="torch").refuse(tiny("mixtral")) == (
        "needs matrices one by one for scheme=torch, and experts are stacked: take scheme=token"
    )
    assert Int8Dynamic(scheme="torch", scope="attention").refuse(tiny("mixtral")) is None


def test_impossible_requests_are_refused(tmp_path):
    with pytest.raises(ChainError, match="int8-dynamic: scheme must be one of token, torch, got 'row'"):
        Int8Dynamic(scheme="row")
    with pytest.raises(ChainError, match="int8-dynamic takes no amount, got 4: write int8-dynamic"):
        Int8Dynamic().accepted(4)
    once = run(Int8Dynamic(), tiny("llama"), 8, tmp_path)
    for scope in ("all", "attention", "ffn"):
        assert "int8-dynamic was done to them: quantize once" in str(Int8Dynamic(scope=scope).refuse(once))
    strange = tiny("llama")
    strange.blocks[0].up.__class__ = type("Other", (nn.Linear,), {})
    said = Int8Dynamic().refuse(strange)
    assert said == (
        "needs linear layers, and model.layers.0.mlp.up_proj is a Other: take int8, which rounds weights alone"
    )


@pytest.mark.parametrize(
    ("step", "family"),
    cases([Int8Dynamic(scheme="torch")], ["qwen2"]),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestAsInTorch(MethodConformance):
    pass

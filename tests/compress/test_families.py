"""What holds on families of every kind, and is not a matter of one method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mariotte.architectures import FAMILIES
from mariotte.compress.blocks import keep_blocks
from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.heads import Heads
from mariotte.compress.methods.slice import Slice
from mariotte.compress.scope import SCOPES, oriented
from mariotte.errors import ChainError, ModelError
from mariotte.experiments.pipeline import compress_model
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step, prepare_once
from mariotte.testing.tiny import random_tokens, tiny

QUANTIZERS = ("int8", "int8-dynamic", "rtn@4")
PRUNERS = ("magnitude@0.5", "random@0.5", "magnitude-structured@0.5")
METHOD = re.compile(r"^[\w-]+")
"""The name of a link's method."""


@pytest.mark.parametrize("chain", [*PRUNERS, *QUANTIZERS])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_layers_share_is_cut_and_counted_once(chain: str, groups: int) -> None:
    model = tiny("albert", layers=4, num_hidden_groups=groups, tied=True)
    of_a_layer = 4 * 32 * 32 + 2 * 32 * 48
    cut = compress_model(model, chain)
    (done,) = cut.done
    assert (done.in_scope or done.facts["weights"]) == groups * of_a_layer
    assert cut.measured_params() == model.measured_params() == cut.counts.n_params
    if done.in_scope:
        assert done.zeros == cut.zeros() == groups * of_a_layer // 2
    else:
        assert model.counts.n_bytes - cut.counts.n_bytes == groups * of_a_layer * 4 - done.facts["packed_bytes"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("first", "second"), [("rtn@4", "int8"), ("int8", "int8-dynamic:attention"), ("int8:head", "rtn@8:head")]
)
def test_nothing_is_quantized_twice(family: str, first: str, second: str) -> None:
    once = compress_model(tiny(family, tied=True), first)
    with pytest.raises(ModelError) as raised:
        compress_model(once, second)
    assert str(raised.value) == (
        f"{METHOD.findall(second)[0]} cannot work on tiny-{family}: needs weights that were not quantized yet, and "
        f"{first} was done to them: quantize once, from the model before it"
    )


def test_a_checkpoint_remembers_that_it_was_quantized(tmp_path: Path) -> None:
    loaded = load(checkpoint.save(compress_model(tiny("bert", tied=True), "int8:attention"), tmp_path / "saved"))
    with pytest.raises(
        ModelError,
        match=r"^rtn cannot work on .*: needs weights that were not quantized yet, and int8:attention was done to ",
    ):
        compress_model(loaded, "rtn@4")
    both = compress_model(loaded, "rtn@4:ffn")
    packed = sum(done.facts["packed_bytes"] - 4 * done.facts["weights"] for done in both.done)
    assert both.counts.n_bytes == 4 * both.measured_params() + packed


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_pruned_can_be_quantized_and_keeps_its_zeros(family: str) -> None:
    for scope in SCOPES:
        pruned = compress_model(tiny(family, tied=True), f"magnitude@0.5:{scope}")
        for quantizer in QUANTIZERS:
            both = compress_model(pruned, f"{quantizer}:{scope}")
            assert both.zeros(scope) >= pruned.done[-1].zeros > 0
            assert both.measured_params() == pruned.measured_params()


@pytest.mark.parametrize("scope", ["embeddings", "cross", "layers=0-1"])
@pytest.mark.parametrize("method", [*PRUNERS, *QUANTIZERS])
def test_a_scope_that_there_is_not_is_refused_by_name(method: str, scope: str) -> None:
    with pytest.raises(ChainError) as raised:
        compress_model(tiny("albert", tied=True), f"{method}:{scope}")
    assert str(raised.value) == f"{METHOD.findall(method)[0]} has no scope {scope!r}; it has all, attention, ffn, head"


DECODERS = sorted(family for family, entry in FAMILIES.items() if entry.kind == "causal")
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in DECODERS),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("falcon", {"multi_query": False, "bias": True}),
    ("falcon", {"new_decoder_architecture": True}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"parallel_attn": False}),
]


def laid_out(value: object) -> str:
    return ",".join(cast("dict[str, Any]", value)) if isinstance(value, dict) else str(value)


def prepared(step: Step, model: Model, folder: Path) -> tuple[Prepared, Context]:
    context = Context(dense=model, scratch=folder, calibration=random_tokens())
    return prepare_once(step, model, context, [0.5]), context


def close(found: Model, expected: Tensor, tokens_BT: Tensor) -> None:
    with torch.no_grad():
        logits = found.logits(tokens_BT)
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("by", ["queries", "groups"])
@pytest.mark.parametrize(("family", "settings"), [case for case in LAYOUTS if case[0] != "olmo2"], ids=laid_out)
def test_a_head_that_goes_is_one_that_gives_nothing(
    family: str, settings: dict[str, Any], by: str, tmp_path: Path
) -> None:
    groups = {"num_kv_heads": 3} if "new_decoder_architecture" in settings else {}
    model = tiny(family, hidden=48, heads=6, kv_heads=3, head_dim=8, **settings, **groups)
    step, tokens_BT = Heads(compensate=False, by=by), random_tokens(3, 20, seed=4)
    found, context = prepared(step, model, tmp_path)
    cut = step.apply(model, found, 0.34, context)
    left = cut.shape.heads
    assert 1 <= left < 6
    assert cut.shape.head_dim == 8
    zeroed = model.copy()
    with torch.no_grad():
        for index, block in enumerate(zeroed.blocks):
            for head in found.get(f"block-{index}")["order"].tolist()[left:]:
                oriented(block.output)[:, 8 * head : 8 * head + 8] = 0
        expected = zeroed.logits(tokens_BT)
    close(cut, expected, tokens_BT)
    assert cut.measured_params() == cut.counts.n_params == model.counts.n_params - step.removes(model, 0.34)


def test_norms_over_all_heads_take_over_what_missing_heads_change(tmp_path: Path) -> None:
    """A head whose queries are zero adds nothing to the mean square: what is left is exact."""
    model, tokens_BT = tiny("olmo2"), random_tokens(3, 20, seed=4)
    with torch.no_grad():
        for block in model.blocks:
            oriented(block.output)[:, :16] = 0  # the first two of four heads give nothing
            block.query.weight[:16] = 0
            block.key.weight[:8] = 0
        expected = model.logits(tokens_BT)
    step = Heads(compensate=False, by="groups")
    found, context = prepared(step, model, tmp_path)
    cut = step.apply(model, found, 0.5, context)
    assert (cut.shape.heads, cut.shape.kv_heads) == (2, 1)
    close(cut, expected, tokens_BT)


@pytest.mark.parametrize(
    ("family", "settings"), [case for case in LAYOUTS if not FAMILIES[case[0]].experts], ids=laid_out
)
def test_a_neuron_that_goes_is_one_that_gives_nothing(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, tokens_BT = tiny(family, **settings), random_tokens(3, 20, seed=4)
    step = FFN(criterion="norm", compensate=False)
    found, context = prepared(step, model, tmp_path)
    cut = step.apply(model, found, 0.5, context)
    zeroed = model.copy()
    with torch.no_grad():
        for index, block in enumerate(zeroed.blocks):
            oriented(block.down)[:, found.get(f"block-{index}")["order"][cut.shape.ffn :]] = 0
        expected = zeroed.logits(tokens_BT)
    close(cut, expected, tokens_BT)


@pytest.mark.parametrize("family", DECODERS)
def test_a_block_that_goes_is_one_that_hands_on_its_input(family: str) -> None:
    model, tokens_BT = tiny(family, layers=4), random_tokens(3, 20, seed=4)
    cut = keep_blocks(model, [0, 3])

    def hand_on(_module: nn.Module, arguments: tuple[Any, ...], found: Any) -> Any:
        return (arguments[0], *found[1:]) if isinstance(found, tuple) else arguments[0]

    for index in (1, 2):
        model.blocks[index].module.register_forward_hook(hand_on)
    with torch.no_grad():
        close(cut, model.logits(tokens_BT), tokens_BT)
    assert cut.measured_params() == cut.counts.n_params


SLICED = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3"]


@pytest.mark.parametrize("family", SLICED)
def test_dimensions_that_are_always_zero_are_sliced_for_nothing(family: str, tmp_path: Path) -> None:
    """With an eps that weighs something: every norm, those of queries and keys too, has to give what it gave."""
    model, tokens_BT = tiny(family, rms_norm_eps=0.3), random_tokens(3, 20, seed=4)
    with torch.no_grad():
        model.embeddings.weight[:, 16:] = 0
        for block in model.blocks:
            block.output.weight[16:] = 0
            block.ffn[-1].weight[16:] = 0
        expected = model.logits(tokens_BT)
    step = Slice(compensate=False)
    found, context = prepared(step, model, tmp_path)
    cut = step.apply(model, found, 0.5, context)
    assert cut.shape.hidden == 16
    close(cut, expected, tokens_BT)
    close(load(checkpoint.save(cut, tmp_path / "saved")), expected, tokens_BT)

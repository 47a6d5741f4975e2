"""What holds on families of every kind, and is not a matter of one method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mariotte.architectures import FAMILIES
from mariotte.compress.scope import SCOPES
from mariotte.errors import ChainError, ModelError
from mariotte.experiments.pipeline import compress_model
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.testing.tiny import tiny

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
    ("first", "second"), [("rtn@4", "int8"), ("int8", "int8-dynamic:ffn"), ("int8:head", "rtn@8:head")]
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

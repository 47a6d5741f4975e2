"""Round to nearest: the grids by hand, bytes by hand, groups that fit, and what is refused."""

from __future__ import annotations

import pytest
import torch

from mariotte import chain as chains
from mariotte.compress.methods.int8 import Int8
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.rtn import RTN
from mariotte.compress.quantize import packed_bytes, round_absmax, round_minmax
from mariotte.errors import ChainError, ModelError
from mariotte.experiments import identity
from mariotte.experiments.pipeline import compress_model
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.testing.methods import MethodConformance, cases, run
from mariotte.testing.tiny import tiny

FLOAT = torch.float32


def test_minmax_by_hand():
    # From -1 to 2 in three steps of 1: the least weight stays, zero is a level, halves go to the even one.
    found = round_minmax(torch.tensor([[-1.0, 0.2, 0.9, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.4, 0.0, 2.0]]), 2, FLOAT)
    assert found.tolist() == [[-1, 0, 1, 2], [0, 0, 0, 0], [3, 1, 0, 2]]


def test_absmax_by_hand():
    found = round_absmax(torch.tensor([[-3.0, 1.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]]), 3, FLOAT)
    assert found.tolist() == [[-3, 1, 1, 0], [0, 0, 0, 0]]


def published(x, bits):
    """The grid of the published code of GPTQ (quant.py: find_params and quantize, perchannel, sym=False)."""
    maxq = torch.tensor(2**bits - 1)
    least, most = torch.minimum(x.min(1)[0], torch.zeros(len(x))), torch.maximum(x.max(1)[0], torch.zeros(len(x)))
    nothing = (least == 0) & (most == 0)
    least[nothing], most[nothing] = -1, +1
    scale = (most - least) / maxq
    zero = torch.round(-least / scale)
    q = torch.clamp(torch.round(x / scale[:, None]) + zero[:, None], 0, maxq)
    return scale[:, None] * (q - zero[:, None])


@pytest.mark.parametrize("bits", range(2, 9))
def test_minmax_is_the_published_grid(bits):
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(bits))
    x[3], x[4], x[5] = 0, x[4].abs(), -x[5].abs()
    assert torch.equal(round_minmax(x, bits, FLOAT), published(x, bits))


@pytest.mark.parametrize("rounded", [round_minmax, round_absmax])
def test_the_error_is_at_most_half_a_step_and_rounding_twice_changes_nothing(rounded):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits in range(2, 9):
        once = rounded(x, bits, torch.float64)
        span = (
            (x.amax(1) - x.amin(1)) / (2**bits - 1)
            if rounded is round_minmax
            else x.abs().amax(1) / (2 ** (bits - 1) - 1)
        )
        assert ((once - x).abs() <= span[:, None] * (1 if rounded is round_minmax else 0.5) + 1e-12).all()
        assert all(len(row.unique()) <= 2**bits for row in once)
        torch.testing.assert_close(rounded(once, bits, torch.float64), once)


def test_groups_have_scales_of_their_own(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.blocks[0].up.weight[:, :16] *= 1e-3
    found = run(RTN(group=16, symmetric=True), model, 4, tmp_path).blocks[0].up.weight
    for part in (slice(0, 16), slice(16, 32)):
        assert torch.equal(found[:, part], round_absmax(model.blocks[0].up.weight[:, part], 4, FLOAT))


@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_by_hand(symmetric, tmp_path):
    assert packed_bytes(9, 3, 3, torch.bfloat16) == 4 + 6
    assert packed_bytes(9, 3, 3, torch.float32, zeros=True) == 4 + 12 + 2
    model = tiny("qwen2", tied=True)
    result = run(RTN(group=16, symmetric=symmetric, scope="ffn"), model, 4, tmp_path)
    weights = 2 * 3 * 32 * 48
    packed = weights // 2 + weights // 16 * 4 + (0 if symmetric else weights // 16 // 2)
    assert result.counts.n_bytes == model.counts.n_bytes - 4 * weights + packed
    assert result.counts.n_params == model.counts.n_params
    # A later step leaves no packed integers behind, and a checkpoint knows what was done.
    assert run(Magnitude(), result, 0.5, tmp_path / "later").counts.n_bytes == model.counts.n_bytes
    assert load(checkpoint.save(result, tmp_path / "saved")).counts == result.counts


@pytest.mark.parametrize("scope", RTN.scopes)
@pytest.mark.parametrize("tied", [True, False])
def test_only_the_scope_is_touched(scope, tied, tmp_path):
    model = tiny("qwen2", tied=tied)
    result = run(RTN(scope=scope), model, 3, tmp_path)
    for before, after in zip(model.blocks, result.blocks, strict=True):
        for part in ("attention", "ffn"):
            for old, new in zip(getattr(before, part), getattr(after, part), strict=True):
                assert torch.equal(old.weight, new.weight) == (scope not in ("all", part))
                assert all(len(row.unique()) <= 8 for row in new.weight) or scope not in ("all", part)
    assert torch.equal(model.embeddings.weight, result.embeddings.weight)
    assert torch.equal(model.head.weight, result.head.weight) == (scope != "head")
    # A tied head that is rounded alone is one more matrix, and is counted.
    more = model.head.weight.numel() if scope == "head" and tied else 0
    assert result.measured_params() == result.counts.n_params == model.counts.n_params + more


def test_zeros_stay_zero(tmp_path):
    pruned = run(Magnitude(), tiny("llama"), 0.5, tmp_path / "a")
    for symmetric in (True, False):
        result = run(RTN(symmetric=symmetric), pruned, 8, tmp_path / str(symmetric))
        assert all(
            bool((new.weight[old.weight == 0] == 0).all())
            for old, new in zip(pruned.matrices("all"), result.matrices("all"), strict=True)
        )


@pytest.mark.parametrize("amount", [1, 1.5, 2.5, 9, 16, 17, -4, 0])
def test_bits_out_of_range_are_refused(amount):
    with pytest.raises(ChainError, match=r"^rtn: bits must be .*got") as raised:
        RTN().accepted(amount)
    assert "\n" not in str(raised.value)


def test_bits_are_needed_and_int8_has_its_own():
    with pytest.raises(ChainError, match="rtn needs an amount of bits, got none: write rtn@4"):
        RTN().accepted(None)
    with pytest.raises(ChainError, match="int8 takes no amount, got 4: write int8"):
        identity.resolve(chains.parse("int8@4"))
    for text in ("int8", "int8:head", "rtn@4:ffn(group=32, symmetric=true)"):
        (part,) = identity.resolve(chains.parse(text))
        assert str(part.link) == text
    assert identity.resolve(chains.parse("int8@8")) == identity.resolve(chains.parse("int8"))


def test_a_group_that_does_not_divide_a_width_is_refused():
    said = RTN(group=32).refuse(tiny("llama"))  # 32 wide, 48 in the MLP
    assert said is not None
    assert "input widths that group=32 divides, and model.layers.0.mlp.down_proj.weight has 48: take a group" in said
    assert RTN(group=32, scope="attention").refuse(tiny("llama")) is None
    with pytest.raises(ChainError, match="rtn: group must be a positive number of weights, got 0: try group=64"):
        RTN(group=0)
    with pytest.raises(ModelError, match="rtn cannot work on tiny-llama: needs input widths that group=32 divides"):
        compress_model(tiny("llama"), "rtn@4(group=32)")


def test_quantizing_twice_is_refused_and_other_scopes_are_not(tmp_path):
    once = run(RTN(scope="attention"), tiny("llama"), 4, tmp_path / "a")
    for step in (RTN(), RTN(scope="attention"), Int8()):
        said = step.refuse(once)
        assert said is not None
        assert "not quantized yet, and rtn@4:attention was done to them: quantize once, from the model before" in said
    assert Int8(scope="ffn").refuse(once) is None
    # Before any work: what sizes tell of a chain is asked first.
    said = (
        r"^int8 cannot work on what rtn@4 leaves of tiny-llama: it needs weights that were not quantized yet, and rtn"
    )
    with pytest.raises(ModelError, match=said):
        compress_model(tiny("llama"), "rtn@4 | int8")
    both = run(Int8(scope="ffn"), once, 8, tmp_path / "b")
    saved = [4 * done.facts["weights"] - done.facts["packed_bytes"] for done in both.done]
    assert both.counts.n_bytes == tiny("llama").counts.n_bytes - sum(saved)


@pytest.mark.parametrize(
    ("step", "family"),
    cases([RTN(symmetric=True)], ["qwen2"]),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestSymmetric(MethodConformance):
    pass

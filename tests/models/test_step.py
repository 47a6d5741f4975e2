from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mariotte.compress import METHODS
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models.step import Context, Prepared, apply_at, not_finite, own_amount, prepare_once
from mariotte.recover import RECOVERIES
from mariotte.testing.tiny import random_tokens, tiny


def test_a_folder_without_a_manifest_is_no_result(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path / "p")
    prepared.put("block-0", {"x": torch.ones(2)})
    assert Prepared.open(tmp_path / "p") is None
    prepared.finish(rows=3)
    found = Prepared.open(tmp_path / "p")
    assert found is not None
    assert found.facts == {"rows": 3}
    assert torch.equal(found.get("block-0")["x"], torch.ones(2))
    assert "block-0" in found
    assert "block-1" not in found


def test_a_damaged_preparation_is_made_anew_or_refused_in_a_sentence(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path / "p")
    prepared.put("block-0", {"x": torch.ones(200)})
    prepared.finish()
    file = tmp_path / "p" / "block-0.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    found = Prepared.open(tmp_path / "p")
    assert found is not None
    with pytest.raises(DataError, match=r"block-0.safetensors is damaged .*: remove the folder .*p and run again"):
        found.get("block-0")
    (tmp_path / "p" / "manifest.json").write_text('{"facts": {"ro')
    assert Prepared.open(tmp_path / "p") is None


def test_prepared_once(tmp_path: Path) -> None:
    model = tiny("llama")
    step = METHODS.find("ffn")()
    context = Context(dense=model, scratch=tmp_path / "p", calibration=random_tokens())
    prepare_once(step, model, context, [0.1])
    prepare_once(step, model, context, [0.1, 0.9])
    assert context.counters.preparations == 1


def test_generators_are_independent_and_repeatable(tmp_path: Path) -> None:
    context = Context(dense=tiny("llama"), scratch=tmp_path, seed=3)

    def draw(*labels: object) -> list[float]:
        return torch.rand(3, generator=context.generator(*labels)).tolist()

    assert draw("a", 1) == draw("a", 1)
    assert draw("a", 1) != draw("a", 2)


def test_a_step_that_needs_text_says_so(tmp_path: Path) -> None:
    context = Context(dense=tiny("llama"), scratch=tmp_path)
    with pytest.raises(DataError, match="slice needs calibration text, got none"):
        context.calibration_for("slice")


@pytest.mark.parametrize("amount", [1.5, 1, -0.1, None, "auto"])
def test_shares_are_in_zero_to_one(amount: object) -> None:
    with pytest.raises(
        ChainError, match=r"slice(: the share of hidden to remove must be in \[0, 1\)| needs an amount)"
    ):
        METHODS.find("slice").check_amount("slice", amount)


@pytest.mark.parametrize("amount", [0, 0.5, -3])
def test_tokens_are_whole(amount: float) -> None:
    with pytest.raises(ChainError, match="tokens must be a whole number of at least 1"):
        RECOVERIES.find("lora").check_amount("lora", amount)


def test_a_share_of_the_model_is_met_as_nearly_as_the_step_can(tmp_path: Path) -> None:
    # Untying a large head adds more than small cuts remove: nothing at all is nearer than a model that grew.
    model = tiny("qwen2", vocab=512, layers=4, tied=True)
    context = Context(dense=model, scratch=tmp_path, calibration=random_tokens(vocab=512))
    step = METHODS.find("slice")(of="model")
    reachable = [step.removes(model, i / 1000) for i in range(1000)]
    assert min(reachable) < 0
    for amount in (0.0, 0.01, 0.1, 0.3, 0.6):
        wanted = amount * model.counts.n_params
        off = abs(step.removes(model, own_amount(step, model, amount, context)) - wanted)
        assert off <= min(abs(removed - wanted) for removed in reachable) + 1e-6, amount


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_before_any_work(value: float, tmp_path: Path) -> None:
    model = tiny("qwen2")
    with torch.no_grad():
        model.blocks[1].query.bias[2] = value
    context = Context(dense=model, scratch=tmp_path / "p", calibration=random_tokens())
    words = "needs finite weights, and of tiny-qwen2 model.layers.1.self_attn.q_proj.bias holds NaN or infinity: check"
    for name in METHODS.names():
        with pytest.raises(ModelError, match=f"{name} {words}"):
            prepare_once(METHODS.find(name)(), model, context, [0.5])
    assert context.counters.preparations == 0
    assert not context.scratch.exists()


def test_finite_weights_whose_sum_is_not_are_fine() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.blocks[0].up.weight.fill_(3e38)
        model.blocks[0].down.weight[::2] = -3e38
    assert not model.blocks[0].up.weight.sum().isfinite()
    assert not_finite(model) is None


def test_amounts_that_cannot_be_had_prepare_nothing(tmp_path: Path) -> None:
    model = tiny("qwen2", vocab=512)
    context = Context(dense=model, scratch=tmp_path / "p", calibration=random_tokens(vocab=512))
    step = METHODS.find("heads")(of="model")
    prepared = prepare_once(step, model, context, [0.8, 0.9])
    assert context.counters.preparations == 0
    for amount in (0.8, 0.9):
        with pytest.raises(ChainError, match=f"heads can remove at most .* got {amount:.1%}"):
            apply_at(step, model, prepared, amount, context)

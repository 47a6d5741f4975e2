"""The loop learns, stops, resumes and branches exactly."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mariotte.errors import MariotteError
from mariotte.models.step import MANIFEST
from mariotte.training.loop import DivergedError, Progress, TrainState, causal_loss, train
from mariotte.training.schedule import ConstantThenLinear


def tiny_state(*, seed: int = 0, dropout: float = 0.1) -> TrainState:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
    )
    module = LlamaForCausalLM(config)
    matrices = [p for name, p in module.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in module.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    return TrainState(module, [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=3e-3)])


def counting(step: int) -> Tensor:
    """Rows that count upwards from a random start: easy to learn, different at every step."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 16, (4, 1), generator=generator)
    return (start + torch.arange(12)) % 32


def values(state: TrainState) -> list[Tensor]:
    moments = [
        entries[name]
        for optimizer in state.optimizers
        for _, entries in sorted(optimizer.state_dict()["state"].items())
        for name in sorted(entries)
    ]
    return [*(p.detach() for p in state.trained.values()), *moments]


def assert_same(left: TrainState, right: TrainState) -> None:
    assert (left.step, left.tokens, left.seed) == (right.step, right.tokens, right.seed)
    for a, b in zip(values(left), values(right), strict=True):
        assert torch.equal(a, b)


def test_training_lowers_the_loss_and_counts_tokens() -> None:
    seen: list[Progress] = []
    state = train(tiny_state(), counting, schedule=ConstantThenLinear(steps=40, decay=20), until=40, watch=seen.append)
    assert seen[-1].loss < 0.3 * seen[0].loss
    assert state.tokens == seen[-1].tokens == 40 * 4 * 12
    assert not any(p.grad is not None for p in state.trained.values())


def test_a_saved_and_restored_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    schedule = ConstantThenLinear(steps=12, decay=6, warmup=2)
    whole = train(tiny_state(), counting, schedule=schedule, until=12)
    half = train(tiny_state(), counting, schedule=schedule, until=5)
    half.save(tmp_path)
    torch.rand(7)  # the caller's random numbers do not matter
    resumed = train(tiny_state(seed=9).load(tmp_path), counting, schedule=schedule, until=12)
    assert_same(whole, resumed)


def test_a_save_leaves_out_what_does_not_train(tmp_path: Path) -> None:
    module = tiny_state().module
    module.requires_grad_(False)
    module.lm_head.weight.requires_grad_(True)
    state = TrainState(module, [torch.optim.AdamW([module.lm_head.weight], lr=1e-2)])
    train(state, counting, schedule=ConstantThenLinear(steps=2), until=2)
    state.save(tmp_path)
    (data,) = tmp_path.glob("*.safetensors")
    assert data.stat().st_size < 4 * 32 * 32 * 4


def test_saving_again_replaces_the_state_and_leaves_one_file(tmp_path: Path) -> None:
    state = tiny_state()
    state.save(tmp_path)
    train(state, counting, schedule=ConstantThenLinear(steps=2), until=2)
    state.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, "state-0000002.safetensors"]
    assert_same(tiny_state(seed=3).load(tmp_path), state)


def test_loading_refuses_nothing_and_another_model(tmp_path: Path) -> None:
    with pytest.raises(MariotteError, match="no training state"):
        tiny_state().load(tmp_path)
    tiny_state().save(tmp_path)
    other = tiny_state()
    other.module.lm_head.weight.requires_grad_(False)
    with pytest.raises(MariotteError, match="of another model"):
        other.load(tmp_path)


def test_causal_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary() -> None:
    module = tiny_state().module
    torch.nn.init.zeros_(module.lm_head.weight)
    assert causal_loss(module, counting(0)).item() == pytest.approx(torch.tensor(32.0).log().item())


def test_a_loss_that_is_no_number_stops_training_with_advice() -> None:
    state = tiny_state()
    torch.nn.init.constant_(state.module.lm_head.weight, float("nan"))
    with pytest.raises(MariotteError, match="lower the learning rates"):
        train(state, counting, schedule=ConstantThenLinear(steps=1), until=1)


def test_training_nothing_is_refused() -> None:
    state = tiny_state()
    state.module.requires_grad_(False)
    with pytest.raises(MariotteError, match="requires_grad"):
        train(state, counting, schedule=ConstantThenLinear(steps=1), until=1)


def test_a_gradient_that_is_no_number_leaves_the_state_as_it_was() -> None:
    state = train(tiny_state(), counting, schedule=ConstantThenLinear(steps=9), until=2)
    before = [value.clone() for value in values(state)]

    def steep(module: torch.nn.Module, tokens_BT: Tensor) -> Tensor:
        # The root is 0 and its slope infinite.
        return causal_loss(module, tokens_BT) + (module.lm_head.weight.sum() * 0).sqrt()

    with pytest.raises(DivergedError, match="the gradient became nan at step 2 of training; lower the learning rates"):
        train(state, counting, schedule=ConstantThenLinear(steps=9), until=5, loss=steep)
    assert state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(values(state), before, strict=True))
    assert not any(p.grad is not None for p in state.trained.values())


def test_notes_travel_with_the_state(tmp_path: Path) -> None:
    state = tiny_state()
    state.notes["sum"] = 0.1 + 0.2
    state.save(tmp_path)
    assert tiny_state().load(tmp_path).notes == {"sum": 0.1 + 0.2}


# -- several processes ------------------------------------------------------------------------------------------------


def shared_run(folder: Path) -> None:
    """What each of the launched processes does; a state goes into a folder of its own."""
    torch.set_num_threads(1)
    # Plain descent: Adam and Muon turn a difference of rounding into one of a whole step where a gradient is near zero.
    module = tiny_state(dropout=0.0).module
    state = TrainState(module, [torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)])

    def rows(step: int) -> Tensor:
        return counting(step)[: 1 if step == 5 else 3]  # shared by two: two and one, and one and none

    train(state, rows, schedule=ConstantThenLinear(steps=8), until=8)
    state.save(folder / os.environ.get("RANK", "alone"))


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path, call_in_two_processes: Callable[..., None]) -> None:
    shared_run(tmp_path)
    call_in_two_processes(180, shared_run, tmp_path)
    data = [next((tmp_path / rank).glob("*.safetensors")).read_bytes() for rank in ("0", "1")]
    assert len({hashlib.sha256(each).hexdigest() for each in data}) == 1
    alone = load_file(next((tmp_path / "alone").glob("*.safetensors")))
    together = load_file(next((tmp_path / "0").glob("*.safetensors")))
    begun = dict(tiny_state(dropout=0.0).trained)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=1e-5, rtol=1e-4)
    assert all(not torch.allclose(alone[f"parameter/{name}"], p, atol=1e-3) for name, p in begun.items() if p.ndim == 2)

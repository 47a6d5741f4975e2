"""One trunk for every D, exact to the bit; what comes out is a plain model."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from mariotte.data import corpora, tokens
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.experiments.pipeline import compress_model
from mariotte.models.load import load
from mariotte.models.model import Done, Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Prepared, prepare_once
from mariotte.recover import RECOVERIES, stream, trunk
from mariotte.recover.learner import Adapted, matrices
from mariotte.recover.methods.lora import LoRA
from mariotte.recover.stream import Course, Stream
from mariotte.testing import recoveries
from mariotte.testing.recoveries import (
    BLOCK,
    RecoveryConformance,
    StoppedError,
    context_of,
    recovered,
    stop_after,
    tiny_reader,
)
from mariotte.testing.tiny import random_tokens, tiny, weights_hash
from mariotte.training import loop

STEP = LoRA(batch=5, lr=1e-2, warmup=3, rank=4)


def course(amount: int, block: int, batch: int) -> Course:
    return stream.course("lora", amount, block, batch)


class TestConformance(RecoveryConformance):
    @override
    def recovery(self) -> LoRA:
        return STEP


def sparse(model: Model) -> Model:
    """The model with half of each matrix set to zero, and that in its history."""
    result, zeros, total = model.copy(), 0, 0
    with torch.no_grad():
        for matrix in matrices(result).values():
            small = matrix.weight.abs() < matrix.weight.abs().median()
            matrix.weight.masked_fill_(small, 0.0)
            zeros, total = zeros + int(small.sum()), total + small.numel()
    done = Done(
        step="magnitude@0.5",
        name="magnitude",
        unit="weights",
        family="unstructured",
        amount=0.5,
        obtained=zeros / total,
        zeros=zeros,
        in_scope=total,
        facts={},
    )
    return result.after(done)


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def test_a_course_rounds_down_to_rows_and_leaves_the_trunk_within_nine_tenths() -> None:
    assert course(4_000, 64, 16) == Course(rows=62, steps=4, leave=3)
    assert course(64_000, 64, 16) == Course(rows=1000, steps=63, leave=56)
    assert course(64, 64, 16) == Course(rows=1, steps=1, leave=0)
    for amount in range(64, 20_000, 321):
        plan = course(amount, 64, 16)
        assert plan.leave * 16 <= 0.9 * plan.rows
        assert plan.decay >= 1
    with pytest.raises(ChainError, match="at least one row of 64 tokens, got 63"):
        course(63, 64, 16)


def test_the_stream_repeats_in_another_order_and_does_not_depend_on_how_much_was_read() -> None:
    def permutation(epoch: int, window: int, size: int) -> Tensor:
        return torch.randperm(size, generator=torch.Generator().manual_seed(100 * epoch + window))

    everything = torch.arange(20)[:, None]
    whole = Stream(everything, 8, permutation)
    rows = whole.rows(0, 60).flatten()
    for epoch in rows.split(20):
        assert sorted(epoch.tolist()) == list(range(20))
    assert not torch.equal(rows[:20], rows[20:40])
    assert torch.equal(Stream(everything[:16], 8, permutation).rows(0, 16).flatten(), rows[:16])
    assert torch.equal(torch.cat([whole.rows(i, i + 3) for i in range(0, 60, 3)]).flatten(), rows)


def test_the_adapter_is_the_formula(model: Model, tmp_path: Path, corpus: str) -> None:
    _, state = STEP._state(model, context_of(model, tmp_path, corpus))
    path, matrix = next(iter(matrices(model).items()))
    layer = cast(Adapted, state.module.get_submodule(path))
    a_RI, b_OR = layer.a_RI, layer.b_OR
    assert a_RI.shape == (4, matrix.in_features)
    assert not b_OR.any()
    nn.init.normal_(b_OR)
    x = torch.randn(3, matrix.in_features)
    expected = functional.linear(x, matrix.weight + 32 / 4 * b_OR @ a_RI)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.delta(), 32 / 4 * b_OR @ a_RI)
    assert {name.rpartition(".")[0] for name in state.trained} == set(matrices(model))


# -- the trunk --------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_smaller_amount_are_the_first_of_a_larger_one(
    model: Model, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded as they pass through the model, on their way through prepare and apply."""
    real = trunk.train
    trained: list[Tensor] = []

    def recording(state, batch, **settings):
        def told(step: int) -> Tensor:
            trained.append(batch(step))
            return trained[-1]

        return real(state, told, **settings)

    monkeypatch.setattr(trunk, "train", recording)
    streams: dict[int, Tensor] = {}
    for amount in (700, 2_000):
        trained.clear()
        result = recovered(STEP, model, context_of(model, tmp_path / str(amount), corpus), [amount])[amount]
        streams[amount] = torch.cat(trained)
        assert streams[amount].numel() == result.done[-1].tokens
    assert torch.equal(streams[700], streams[2_000][: len(streams[700])])


def test_text_of_many_windows_is_read_as_far_as_needed_and_no_amount_depends_on_it(
    model: Model, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_WINDOW_TOKENS", 40 * BLOCK)
    read: list[int] = []
    real = tokens.blocks

    def recording(*args, **kwargs) -> Tensor:
        rows = real(*args, **kwargs)
        if args[1] == "train":
            read.append(len(rows))
        return rows

    monkeypatch.setattr(tokens, "blocks", recording)
    stream._rows.cache_clear()  # other tests have read the same text
    amounts = [600, 1_500, 9_000]  # 37, 93 and 562 rows, of about 310
    step = replace(STEP, repeats=True)
    together = recovered(step, model, context_of(model, tmp_path / "all", corpus), amounts[::-1])
    assert len(read) == 1
    stream._rows.cache_clear()
    read.clear()
    for amount in amounts:
        alone = recovered(step, model, context_of(model, tmp_path / str(amount), corpus), [amount])[amount]
        assert weights_hash(alone) == weights_hash(together[amount])
    assert read[:2] == [40, 120]
    assert 240 < read[2] < 400
    assert len(read) == 3


def test_a_killed_trunk_goes_on_from_where_it_was_last_saved(
    model: Model, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk, "_SAVE_SECONDS", 0.0)
    amounts = [900, 2_500]
    whole = recovered(STEP, model, context_of(model, tmp_path / "whole", corpus), amounts)
    trunk_tokens = course(2_500, BLOCK, STEP.batch).leave * STEP.batch * BLOCK
    for calls in (5, 20):  # before and after the first branch
        context = context_of(model, tmp_path / f"stopped-{calls}", corpus)
        with pytest.raises(StoppedError):
            prepare_once(STEP, model, replace(context, progress=stop_after(calls)), amounts)
        again = recovered(STEP, model, context, amounts)
        assert all(weights_hash(again[amount]) == weights_hash(whole[amount]) for amount in amounts)
        assert (context.counters.trunks, context.counters.trunk_tokens) == (1, trunk_tokens)
        assert not (context.scratch / "latest").exists()


MOMENTS = ("within the state", "before its manifest", "before the old state is gone", "after the save", "at the end")


def train_until_killed(moment: str, scratch: Path, corpus: str, threads: int) -> None:
    """Prepare for 900 and 2,500 tokens, saving after every step, and die at the tenth save or when all is trained."""
    torch.set_num_threads(threads)
    saves = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_file(tensors: dict[str, Tensor], path: Path) -> None:
        nonlocal saves
        saves += path.parent.name == "latest"
        if saves == 10 and moment == MOMENTS[0]:
            path.write_bytes(b"half")
            die()
        safetensors.torch.save_file(tensors, path)
        if saves == 10 and moment == MOMENTS[1]:
            die()

    class Watched(type(scratch)):
        def unlink(self, missing_ok: bool = False) -> None:
            if saves == 10 and moment == MOMENTS[2] and self.parent.name == "latest":
                die()
            super().unlink(missing_ok)

    def progress(stage: str, done: float) -> None:
        if saves == 10 and moment == MOMENTS[3]:
            die()

    trunk._SAVE_SECONDS = 0.0
    loop.save_file = save_file
    if moment == MOMENTS[4]:
        shutil.rmtree = lambda *_, **__: die() if saves else None
    model = tiny_reader("llama")
    context = replace(context_of(model, Watched(scratch), corpus), progress=progress)
    prepare_once(STEP, model, context, [900, 2_500])


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_trunk_killed_at_any_moment_of_a_save_goes_on_to_the_same_bits(
    model: Model, tmp_path: Path, corpus: str
) -> None:
    amounts = [900, 2_500]
    whole = recovered(STEP, model, context_of(model, tmp_path / "whole", corpus), amounts)
    trunk_tokens = course(2_500, BLOCK, STEP.batch).leave * STEP.batch * BLOCK
    step_tokens = STEP.batch * BLOCK
    first = course(900, BLOCK, STEP.batch).leave
    server = multiprocessing.get_context("forkserver")
    # Imported once, not once a killing.
    server.set_forkserver_preload([trunk.__name__, LoRA.__module__, recoveries.__name__])
    # The tenth save comes right after the tenth step, or the eleventh where the tenth was kept as a branch.
    tenth = 10 + (first <= 10)
    for moment, steps in zip(MOMENTS, (tenth - 1, tenth - 1, tenth, tenth, None), strict=True):
        context = context_of(model, tmp_path / moment, corpus)
        process = server.Process(
            target=train_until_killed, args=(moment, context.scratch, corpus, torch.get_num_threads())
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, moment
        assert Prepared.open(context.scratch) is None
        again = recovered(STEP, model, context, amounts)
        assert all(weights_hash(again[amount]) == weights_hash(whole[amount]) for amount in amounts), moment
        left = 0 if steps is None else trunk_tokens - steps * step_tokens
        assert (context.counters.trunks, context.counters.trunk_tokens) == (0, left), moment
        assert not (context.scratch / "latest").exists()


def test_half_a_state_is_not_used(model: Model, tmp_path: Path, corpus: str) -> None:
    context = context_of(model, tmp_path / "scratch", corpus)
    whole = recovered(STEP, model, context, [900])[900]
    (context.scratch / f"step-{course(900, BLOCK, STEP.batch).leave:07d}" / "manifest.json").unlink()
    prepared = Prepared.open(context.scratch)
    assert prepared is not None
    assert not STEP.covers(prepared, [900])
    assert weights_hash(recovered(STEP, model, context, [900])[900]) == weights_hash(whole)


def test_a_larger_amount_trains_only_what_is_missing(model: Model, tmp_path: Path, corpus: str) -> None:
    context = context_of(model, tmp_path / "scratch", corpus)
    recovered(STEP, model, context, [1_500])
    recovered(STEP, model, context, [3_000, 1_500])
    assert context.counters.trunks == 1
    assert context.counters.trunk_tokens == course(3_000, BLOCK, STEP.batch).leave * STEP.batch * BLOCK


def test_another_seed_or_rate_in_the_same_folder_starts_over(model: Model, tmp_path: Path, corpus: str) -> None:
    scratch = tmp_path / "scratch"
    hashes = {weights_hash(recovered(STEP, model, context_of(model, scratch, corpus), [900])[900])}
    for step, seed in ((STEP, 1), (replace(STEP, lr=2e-2), 0)):
        context = context_of(model, scratch, corpus, seed)
        hashes.add(weights_hash(step.apply(model, step.prepare(model, context, [900]), 900, context)))
        assert context.counters.trunks == 1
    assert len(hashes) == 3
    stale = Prepared.open(scratch)
    assert stale is not None
    with pytest.raises(DataError, match="was trained with another lr: remove that folder"):
        STEP.apply(model, stale, 900, context_of(model, scratch, corpus))


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_what_was_seen_is_said(model: Model, tmp_path: Path, corpus: str) -> None:
    context = context_of(model, tmp_path / "scratch", corpus)
    results = recovered(replace(STEP, repeats=True), model, context, [1_000, 5_000, 16])
    for amount, rows in ((1_000, 62), (5_000, 312), (16, 1)):
        done = results[amount].done[-1]
        assert done.tokens == rows * BLOCK == done.facts["rows"] * done.facts["block"]
        assert done.facts["decay_tokens"] >= 0.1 * done.tokens
    assert context.counters.trunk_tokens == course(5_000, BLOCK, STEP.batch).leave * STEP.batch * BLOCK
    assert context.counters.decay_tokens == sum(r.done[-1].facts["decay_tokens"] for r in results.values())
    assert [results[amount].done[-1].facts["epochs"] for amount in (16, 1_000, 5_000)] == [1, 1, 2]
    facts = results[5_000].done[-1].facts
    assert facts["loss_end"] < facts["loss_begin"] - 0.5
    assert results[1_000].done[-1].step == "lora@1k(batch=5, lr=0.01, rank=4, repeats=true, warmup=3)"


def test_only_the_matrices_of_the_blocks_change(tmp_path: Path, corpus: str) -> None:
    model = tiny_reader("qwen2")
    result = recovered(STEP, model, context_of(model, tmp_path / "scratch", corpus), [900])[900]
    changed = {
        name
        for (name, old), (_, new) in zip(model.hf.named_parameters(), result.hf.named_parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {f"{path}.weight" for path in matrices(model)}


@pytest.mark.parametrize("cut", [lambda model: model, sparse], ids=["full", "sparse"])
def test_merged_equals_unmerged(cut, model: Model, tmp_path: Path, corpus: str) -> None:
    model = cut(model)
    context = context_of(model, tmp_path / "scratch", corpus)
    STEP.prepare(model, context, [2_000])
    leave = course(2_000, BLOCK, STEP.batch).leave
    learner, state = STEP._state(model, context)
    state.load(context.scratch / f"step-{leave:07d}")
    merged = model.copy()
    held = learner.write_(merged)
    assert held == merged.zeros() == model.zeros()
    probe = random_tokens(4, BLOCK)
    with torch.no_grad():
        unmerged = state.module(input_ids=probe, use_cache=False).logits
    assert not torch.allclose(model.logits(probe), unmerged, atol=1e-2)
    torch.testing.assert_close(merged.logits(probe), unmerged, atol=2e-4, rtol=1e-4)


def test_weights_set_to_zero_stay_zero_and_the_rest_learns_around_them(
    model: Model, tmp_path: Path, corpus: str
) -> None:
    half = sparse(model)
    result = recovered(STEP, half, context_of(half, tmp_path / "scratch", corpus), [3_000])[3_000]
    assert result.zeros() == half.zeros() == half.done[0].zeros
    facts = result.done[-1].facts
    assert facts["mask_reapplied"] == half.zeros()
    assert facts["loss_end"] < facts["loss_begin"] - 0.3


def test_dropout_reaches_the_adapters_of_a_sparse_model(model: Model, tmp_path: Path, corpus: str) -> None:
    half, step = sparse(model), replace(STEP, dropout=0.5)
    learner, _ = step._state(half, context_of(half, tmp_path / "state", corpus))
    path, matrix = next(iter(matrices(half).items()))
    layer = cast(Adapted, learner.module.get_submodule(path))
    nn.init.normal_(layer.b_OR)
    x, change = torch.randn(3, matrix.in_features), layer.delta()
    assert not change[matrix.weight == 0].any()
    layer.train()
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    expected = matrix(x) + functional.linear(functional.dropout(x, 0.5), change)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.eval()(x), matrix(x) + functional.linear(x, change), atol=1e-4, rtol=1e-4)
    results = [
        recovered(s, half, context_of(half, tmp_path / str(s.dropout), corpus), [900])[900] for s in (STEP, step)
    ]
    assert weights_hash(results[0]) != weights_hash(results[1])
    assert results[1].zeros() == half.zeros()


def test_bf16_weights_train_float32_adapters(tmp_path: Path, corpus: str) -> None:
    model = tiny("llama", layers=1, dtype=torch.bfloat16)
    model.tokenizer = tiny_reader("llama").tokenizer
    context = context_of(model, tmp_path / "scratch", corpus)
    assert {p.dtype for p in STEP._state(model, context)[1].trained.values()} == {torch.float32}
    result = recovered(STEP, model, context, [3_000])[3_000]
    assert {p.dtype for p in result.hf.parameters()} == {torch.bfloat16}
    assert result.done[-1].facts["loss_end"] < result.done[-1].facts["loss_begin"]


def test_a_named_corpus_comes_before_the_run_s(model: Model, tmp_path: Path, corpus: str) -> None:
    step = replace(STEP, corpus=corpus)
    result = recovered(step, model, context_of(model, tmp_path / "scratch", "file:/nowhere"), [600])[600]
    assert result.done[-1].facts["corpus"] == corpus


@pytest.mark.slow
def test_it_wins_back_most_of_what_a_cut_cost_on_the_testbed(tmp_path: Path) -> None:
    dense = load("testbed/qwen2-113k")
    rows = tokens.blocks(corpora.find("testbed/all"), "test", dense.tokenizer, 64, 200)
    cut = "ffn@0.3(criterion=norm, compensate=false)"
    losses = [
        token_nll(compress_model(dense, chain, calibration="testbed/all", work=tmp_path), rows).mean().item()
        for chain in (cut, f"{cut} | lora@4k", f"{cut} | lora@16k")
    ]
    base = token_nll(dense, rows).mean().item()
    shares_left = [(loss - base) / (losses[0] - base) for loss in losses]
    assert shares_left[1] < 0.5
    assert shares_left[2] < 0.25


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_family_without_linear_layers_is_refused(model: Model, tmp_path: Path, corpus: str) -> None:
    assert STEP.refuse(model) is None
    model.blocks[0].module.get_submodule("mlp").down_proj = nn.Bilinear(2, 2, 2)
    assert "mlp.down_proj of this llama is a Bilinear" in cast(str, STEP.refuse(model))
    with pytest.raises(ModelError, match="lora needs linear layers"):
        STEP.prepare(model, context_of(model, tmp_path, corpus), [900])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"block": 1}, "block must be at least 2"),
        ({"scope": "ffn"}, "lora has no scope 'ffn'"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ChainError, match=said):
        LoRA(**fields)


def test_it_is_found_by_name() -> None:
    assert "lora" in RECOVERIES.names()
    assert RECOVERIES.find("lora") is LoRA

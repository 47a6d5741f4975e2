"""One trunk for every D, exact to the bit; what comes out is a plain model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mariotte import accounting
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models import checkpoint
from mariotte.models.model import Done, Model
from mariotte.models.step import Context, Counters, Prepared, prepare_once
from mariotte.recover import RECOVERIES
from mariotte.recover.methods import lora
from mariotte.recover.methods.lora import Course, LoRA, Stream, course, delta, matrices
from mariotte.testing.tiny import VOCAB, random_tokens, tiny, weights_hash

STEP = LoRA(batch=4, lr=1e-2, warmup=2, rank=4)
BLOCK = 16


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents that count: easy to learn, about 120 training rows of 16 tokens."""
    path = tmp_path_factory.mktemp("corpus") / "counting.txt"
    lines = [
        " ".join(f"w{(3 + start + i * stride) % VOCAB}" for i in range(24))
        for start in range(48)
        for stride in (1, 2, 3)
    ]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return f"file:{path}"


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w1", eos_token="w2")


@pytest.fixture(params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> Model:
    return with_tokenizer(tiny(request.param, tied=request.param == "qwen2"))


def with_tokenizer(model: Model) -> Model:
    model.tokenizer = word_tokenizer()
    return model


def llama() -> Model:
    return with_tokenizer(tiny("llama", layers=1))


def context_of(model: Model, scratch: Path, corpus: str | None, seed: int = 0) -> Context:
    return Context(dense=model, scratch=scratch, seed=seed, corpus=corpus, block=BLOCK, counters=Counters())


def recovered(step: LoRA, model: Model, context: Context, amounts: Sequence[int]) -> dict[int, Model]:
    prepared = prepare_once(step, model, context, amounts)
    return {amount: step.apply(model, prepared, amount, context) for amount in amounts}


class StoppedError(Exception):
    """What a test raises to interrupt a trunk."""


def stop_at(step_count: int) -> Callable[[str, float], None]:
    calls = iter(range(step_count))

    def progress(stage: str, done: float) -> None:
        if stage == "lora trunk" and next(calls, None) is None:
            raise StoppedError

    return progress


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


def test_the_stream_repeats_in_another_order_and_does_not_depend_on_how_much_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora, "_WINDOW", 8)

    def permutation(epoch: int, window: int, size: int) -> Tensor:
        return torch.randperm(size, generator=torch.Generator().manual_seed(100 * epoch + window))

    everything = torch.arange(20)[:, None]
    whole = Stream(everything, permutation)
    rows = whole.rows(0, 60).flatten()
    for epoch in rows.split(20):
        assert sorted(epoch.tolist()) == list(range(20))
    assert not torch.equal(rows[:20], rows[20:40])
    assert torch.equal(Stream(everything[:16], permutation).rows(0, 16).flatten(), rows[:16])
    assert torch.equal(torch.cat([whole.rows(i, i + 3) for i in range(0, 60, 3)]).flatten(), rows)


# -- exactness --------------------------------------------------------------------------------------------------------


def test_the_result_at_one_amount_does_not_depend_on_the_others(model: Model, tmp_path: Path, corpus: str) -> None:
    together = recovered(STEP, model, context_of(model, tmp_path / "all", corpus), [3_000, 500, 1_200])
    for amount, result in together.items():
        alone = recovered(STEP, model, context_of(model, tmp_path / str(amount), corpus), [amount])[amount]
        assert weights_hash(alone) == weights_hash(result)
        assert alone.done == result.done


def test_the_tokens_of_a_smaller_amount_are_the_first_of_a_larger_one(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    real = Stream.rows

    def rows(self: Stream, start: int, stop: int) -> Tensor:
        seen.append(real(self, start, stop))
        return seen[-1]

    model = llama()
    streams: dict[int, Tensor] = {}
    for amount in (700, 2_000):
        context = context_of(model, tmp_path / str(amount), corpus)
        prepared = STEP.prepare(model, context, [amount])
        monkeypatch.setattr(Stream, "rows", rows)
        seen.clear()
        train_rows = STEP._batches(STEP._stream(model, context, amount // BLOCK), amount // BLOCK)
        streams[amount] = torch.cat([train_rows(i) for i in range(course(amount, BLOCK, STEP.batch).steps)])
        monkeypatch.undo()
        assert STEP.apply(model, prepared, amount, context).done[-1].tokens == streams[amount].numel()
    assert torch.equal(streams[700], streams[2_000][: len(streams[700])])


def test_an_interrupted_trunk_goes_on_to_the_same_bits(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "_SAVE_SECONDS", 0.0)
    model = llama()
    amounts = [900, 2_500]
    whole = recovered(STEP, model, context_of(model, tmp_path / "whole", corpus), amounts)
    for stopped_after in (5, 20):  # before and after the first snapshot
        scratch = tmp_path / f"stopped-{stopped_after}"
        context = context_of(model, scratch, corpus)
        with pytest.raises(StoppedError):
            prepare_once(STEP, model, replace(context, progress=stop_at(stopped_after)), amounts)
        assert Prepared.open(scratch) is None
        seen = context.counters.trunk_tokens
        again = recovered(STEP, model, context, amounts)
        for amount in amounts:
            assert weights_hash(again[amount]) == weights_hash(whole[amount])
        assert context.counters.trunks == 1
        assert context.counters.trunk_tokens <= course(2_500, BLOCK, 4).leave * 4 * BLOCK + 2 * 4 * BLOCK
        assert context.counters.trunk_tokens > seen
        assert not (scratch / "latest").exists()


def test_a_half_written_state_is_not_used(tmp_path: Path, corpus: str) -> None:
    model = llama()
    context = context_of(model, tmp_path, corpus)
    whole = recovered(STEP, model, context, [900])[900]
    leave = course(900, BLOCK, STEP.batch).leave
    (tmp_path / f"step-{leave:07d}" / "manifest.json").unlink()
    prepared = Prepared.open(tmp_path)
    assert prepared is not None
    assert not STEP.covers(prepared, [900])
    assert weights_hash(recovered(STEP, model, context, [900])[900]) == weights_hash(whole)


def test_a_larger_amount_continues_the_trunk_and_a_smaller_one_is_made_up(tmp_path: Path, corpus: str) -> None:
    model = llama()
    context = context_of(model, tmp_path / "grown", corpus)
    grown: dict[int, Model] = {}
    for amount in (1_500, 3_000, 700):
        grown |= recovered(STEP, model, context, [amount])
    batch_tokens = STEP.batch * BLOCK
    trunk = {amount: course(amount, BLOCK, STEP.batch).leave * batch_tokens for amount in grown}
    assert context.counters.trunks == 2  # 700 lies before everything that was kept
    assert context.counters.trunk_tokens == trunk[3_000] + trunk[700]
    fresh = recovered(STEP, model, context_of(model, tmp_path / "fresh", corpus), sorted(grown))
    for amount, result in fresh.items():
        assert weights_hash(grown[amount]) == weights_hash(result)


def test_another_seed_another_text_order_and_another_rate_start_over(tmp_path: Path, corpus: str) -> None:
    model = llama()
    first = recovered(STEP, model, context_of(model, tmp_path, corpus), [900])[900]
    hashes = {weights_hash(first)}
    for step, seed in ((STEP, 1), (replace(STEP, lr=2e-2), 0)):
        context = context_of(model, tmp_path, corpus, seed)
        # Asked directly: the pipeline gives each of these a folder of its own.
        result = step.apply(model, step.prepare(model, context, [900]), 900, context)
        assert context.counters.trunks == 1
        hashes.add(weights_hash(result))
    assert len(hashes) == 3
    stale = Prepared.open(tmp_path)
    assert stale is not None
    with pytest.raises(DataError, match="was trained with another lr: remove that folder"):
        STEP.apply(model, stale, 900, context_of(model, tmp_path, corpus))


def test_a_rerun_trains_no_trunk_and_the_global_generator_is_left_alone(tmp_path: Path, corpus: str) -> None:
    model = llama()
    first = recovered(STEP, model, context_of(model, tmp_path, corpus), [900])[900]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    context = context_of(model, tmp_path, corpus)
    second = recovered(STEP, model, context, [900])[900]
    assert torch.equal(torch.rand(3), expected)
    assert weights_hash(first) == weights_hash(second)
    assert (context.counters.trunks, context.counters.trunk_tokens, context.counters.preparations) == (0, 0, 0)


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_tokens_are_counted_exactly_and_progress_is_told(tmp_path: Path, corpus: str) -> None:
    model = llama()
    told: list[tuple[str, float]] = []
    context = replace(context_of(model, tmp_path, corpus), progress=lambda stage, done: told.append((stage, done)))
    results = recovered(STEP, model, context, [1_000, 3_333, 16])
    for amount, rows in ((1_000, 62), (3_333, 208), (16, 1)):
        done = results[amount].done[-1]
        assert done.tokens == done.obtained == rows * BLOCK == done.facts["rows"] * done.facts["block"]
        assert done.amount == amount
        assert done.facts["decay_tokens"] >= 0.1 * done.tokens
    assert context.counters.trunk_tokens == course(3_333, BLOCK, 4).leave * 4 * BLOCK
    assert context.counters.decay_tokens == sum(r.done[-1].facts["decay_tokens"] for r in results.values())
    assert results[3_333].done[-1].facts["epochs"] == 2
    assert results[1_000].done[-1].step == "lora@1k(batch=4, lr=0.01, rank=4, warmup=2)"
    assert {stage for stage, _ in told} == {"lora trunk", "lora decay"}
    assert all(0 < done <= 1 for _, done in told)


def test_the_loss_falls_and_the_input_stays_as_it_was(model: Model, tmp_path: Path, corpus: str) -> None:
    before, flags = weights_hash(model), [p.requires_grad for p in model.hf.parameters()]
    names = [name for name, _ in model.hf.named_modules()]
    result = recovered(STEP, model, context_of(model, tmp_path, corpus), [6_000])[6_000]
    assert weights_hash(model) == before
    assert [p.requires_grad for p in model.hf.parameters()] == flags
    assert [name for name, _ in model.hf.named_modules()] == names == [name for name, _ in result.hf.named_modules()]
    assert model.done == ()
    facts = result.done[-1].facts
    assert facts["loss_end"] < facts["loss_begin"] - 0.5
    json.dumps(facts)
    frozen = {"embed", "norm", "lm_head"}
    for (name, old), (_, new) in zip(model.hf.named_parameters(), result.hf.named_parameters(), strict=True):
        kept = name.endswith("bias") or any(part in name for part in frozen)
        assert torch.equal(old, new) == kept, name


def test_merged_equals_unmerged(model: Model, tmp_path: Path, corpus: str) -> None:
    context = context_of(model, tmp_path, corpus)
    plan = course(2_000, BLOCK, STEP.batch)
    STEP.prepare(model, context, [2_000])
    state = STEP._state(model, context).load(tmp_path / f"step-{plan.leave:07d}")
    merged = model.copy()
    assert STEP._merge_(merged, state) == 0
    probe = random_tokens(4, BLOCK)
    with torch.no_grad():
        unmerged = state.module(input_ids=probe, use_cache=False).logits
    assert not torch.allclose(model.logits(probe), unmerged, atol=1e-2)
    torch.testing.assert_close(merged.logits(probe), unmerged, atol=2e-4, rtol=1e-4)


def test_the_adapter_is_the_formula(tmp_path: Path, corpus: str) -> None:
    model = llama()
    state = STEP._state(model, context_of(model, tmp_path, corpus))
    path, matrix = next(iter(matrices(model).items()))
    layer = state.module.get_submodule(path)
    a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a_RI.shape == (4, matrix.in_features)
    assert not b_OR.any()
    nn.init.normal_(b_OR)
    x = torch.randn(3, matrix.in_features)
    expected = functional.linear(x, matrix.weight + 32 / 4 * b_OR @ a_RI)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(delta(layer), 32 / 4 * b_OR @ a_RI)
    trained = {name.split(".lora_")[0] for name in state.trained}
    assert trained == set(matrices(model))


def test_the_result_saves_and_loads_as_a_plain_checkpoint(model: Model, tmp_path: Path, corpus: str) -> None:
    result = recovered(STEP, model, context_of(model, tmp_path / "scratch", corpus), [600])[600]
    assert result.measured_params() == result.counts.n_params == accounting.count_shape(model.shape).n_params
    folder = checkpoint.save(result, tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    probe = random_tokens(2, BLOCK)
    torch.testing.assert_close(loaded(input_ids=probe).logits, result.logits(probe), atol=1e-5, rtol=1e-5)


def test_weights_set_to_zero_stay_zero_and_the_rest_learns_around_them(tmp_path: Path, corpus: str) -> None:
    model = llama()
    zeros = 0
    with torch.no_grad():
        for matrix in matrices(model).values():
            small = matrix.weight.abs() < matrix.weight.abs().median()
            matrix.weight.masked_fill_(small, 0.0)
            zeros += int(small.sum())
    done = Done(step="magnitude@0.5", name="magnitude", unit="weights", family="unstructured", amount=0.5, obtained=0.5,
                zeros=zeros, in_scope=2 * zeros, facts={})  # fmt: skip
    sparse = model.after(done)
    context = context_of(model, tmp_path, corpus)
    result = recovered(STEP, sparse, context, [3_000])[3_000]
    assert result.zeros() == sparse.zeros() == zeros
    facts = result.done[-1].facts
    assert facts["mask_reapplied"] == zeros
    assert facts["loss_end"] < facts["loss_begin"] - 0.3
    state = STEP._state(sparse, context).load(tmp_path / f"step-{course(3_000, BLOCK, STEP.batch).leave:07d}")
    merged = sparse.copy()
    STEP._merge_(merged, state)
    probe = random_tokens(4, BLOCK)
    with torch.no_grad():  # what was trained is what is kept
        unmerged = state.module(input_ids=probe, use_cache=False).logits
    torch.testing.assert_close(merged.logits(probe), unmerged, atol=2e-4, rtol=1e-4)


def test_bf16_weights_train_float32_adapters(tmp_path: Path, corpus: str) -> None:
    model = with_tokenizer(tiny("llama", layers=1, dtype=torch.bfloat16))
    context = context_of(model, tmp_path, corpus)
    assert {p.dtype for p in STEP._state(model, context).trained.values()} == {torch.float32}
    result = recovered(STEP, model, context, [3_000])[3_000]
    assert {p.dtype for p in result.hf.parameters()} == {torch.bfloat16}
    assert result.done[-1].facts["loss_end"] < result.done[-1].facts["loss_begin"]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused_in_a_sentence(tmp_path: Path, corpus: str) -> None:
    model = llama()
    assert STEP.refuse(model) is None
    with pytest.raises(DataError, match=r"needs text to train on, got none: .*corpus=wikitext2"):
        STEP.prepare(model, context_of(model, tmp_path, None), [900])
    with pytest.raises(ChainError, match="at least one row of 16 tokens, got 15"):
        STEP.prepare(model, context_of(model, tmp_path, corpus), [15])
    with pytest.raises(DataError, match="without a tokenizer"):
        STEP.prepare(tiny("llama"), context_of(model, tmp_path, corpus), [900])
    model.blocks[0].module.get_submodule("mlp").down_proj = cast(nn.Linear, nn.Bilinear(2, 2, 2))
    assert "mlp.down_proj of this llama is a Bilinear" in cast(str, STEP.refuse(model))
    with pytest.raises(ModelError, match="lora needs linear layers"):
        STEP.prepare(model, context_of(model, tmp_path, corpus), [900])


def test_a_named_corpus_comes_before_the_run_s(tmp_path: Path, corpus: str) -> None:
    model = llama()
    result = recovered(replace(STEP, corpus=corpus), model, context_of(model, tmp_path, "file:/nowhere"), [600])[600]
    assert result.done[-1].facts["corpus"] == corpus


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
    assert RECOVERIES.names() == ["lora"]
    assert RECOVERIES.find("lora") is LoRA

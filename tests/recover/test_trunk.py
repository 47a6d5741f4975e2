"""What all recoveries by training share: options, failures of one D alone, resuming, warnings."""

from __future__ import annotations

import builtins
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from mariotte.chain import parse_link
from mariotte.cli.main import app
from mariotte.data.corpora import File, Split
from mariotte.errors import ChainError, DataError, MariotteError, ModelError
from mariotte.experiments import run as running
from mariotte.experiments.identity import resolve_link, step_identity
from mariotte.experiments.study import parse
from mariotte.models.model import Model
from mariotte.models.step import Prepared, prepare_once
from mariotte.recover import trunk
from mariotte.recover.losses import text_loss
from mariotte.recover.methods.block import BlockLocal
from mariotte.recover.methods.lora import LoRA
from mariotte.recover.trunk import Recovery
from mariotte.store import open_store
from mariotte.testbed.world import World
from mariotte.testing.recoveries import (
    BLOCK,
    StoppedError,
    context_of,
    counting_corpus,
    each_recovery,
    recovered,
    stop_after,
    tiny_reader,
)
from mariotte.testing.tiny import random_tokens, weights_hash
from mariotte.training.loop import DivergedError

ALL = each_recovery(batch=5)
STEP = ALL[0]
NAMES = [step.name() for step in ALL]


def failing_from(step: int, value: float = math.nan):
    """The text's loss until `step` batches have been seen, then no number."""
    seen = 0

    def loss(module: nn.Module, tokens_BT: Tensor) -> Tensor:
        nonlocal seen
        seen += module.training
        found = text_loss(module, tokens_BT)
        return found * value if seen > step and module.training else found

    return loss


# -- fields -----------------------------------------------------------------------------------------------------------


def test_fields_that_are_off_leave_the_identity_as_it_was() -> None:
    plain = resolve_link(parse_link("lora@1k")).step
    told = resolve_link(parse_link("lora@1k(trunk=true, keep_best=false, repeats=false)"))
    assert told.step == plain
    assert str(told.link) == "lora@1k"
    assert not {"trunk", "keep_best", "repeats"} & set(step_identity(plain, {})["fields"])
    other = resolve_link(parse_link("lora@1k(trunk=false)"))
    assert str(other.link) == "lora@1k(trunk=false)"
    assert step_identity(other.step, {})["fields"]["trunk"] is False


@pytest.mark.parametrize("step", ALL, ids=NAMES)
def test_impossible_fields_are_refused(step: Recovery) -> None:
    for fields, said in (({"batch": 0}, "batch must be"), ({"lr": math.nan}, "lr must be"), ({"warmup": -1}, "warmup")):
        with pytest.raises(ChainError, match=f"{step.name()}: {said}"):
            replace(step, **fields)


# -- every D by itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ALL[:2], ids=NAMES[:2])
def test_without_a_trunk_every_amount_is_trained_by_itself(
    step: Recovery, model: Model, tmp_path: Path, corpus: str
) -> None:
    alone = replace(step, trunk=False)
    context = context_of(model, tmp_path / "scratch", corpus)
    results = recovered(alone, model, context, [1_000, 2_000])
    counters = context.counters
    assert (counters.trunks, counters.trunk_tokens) == (0, 0)
    assert counters.decay_tokens == sum(result.done[-1].tokens for result in results.values()) == 992 + 2_000
    for result in results.values():
        assert result.done[-1].facts["decay_tokens"] == result.done[-1].tokens
    again = recovered(alone, model, context_of(model, tmp_path / "again", corpus), [1_000])[1_000]
    assert weights_hash(again) == weights_hash(results[1_000])
    shared = recovered(step, model, context_of(model, tmp_path / "shared", corpus), [1_000])[1_000]
    assert weights_hash(shared) != weights_hash(results[1_000])


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"trunk": False}, {"keep_best": True}], ids=["trunk", "alone", "keep_best"])
@pytest.mark.parametrize("step", ALL, ids=NAMES)
def test_stopped_anywhere_it_goes_on_to_the_same_bits(
    step: Recovery,
    options: dict[str, bool],
    model: Model,
    tmp_path: Path,
    corpus: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trunk, "_SAVE_SECONDS", 0.0)
    step, amount = replace(step, **options), 1_200  # 15 steps
    whole = recovered(step, model, context_of(model, tmp_path / "whole", corpus), [amount])[amount]
    context = context_of(model, tmp_path / "scratch", corpus)
    for stops in (3, 2, 2, 1, 1):  # after the steps 4, 7, 10, 12 of the trunk, and 14, the first of the decay
        with pytest.raises(StoppedError):
            recovered(step, model, replace(context, progress=stop_after(stops)), [amount])
    resumed = recovered(step, model, context, [amount])[amount]
    assert weights_hash(resumed) == weights_hash(whole)
    assert resumed.done == whole.done
    assert context.counters.trunks <= 1
    # A step whose listener raised was made, and counted, and saved before.
    assert context.counters.trunk_tokens + context.counters.decay_tokens == whole.done[-1].tokens


def recover_until_killed(step: Recovery, scratch: Path, corpus: str, threads: int, ready: Path) -> None:
    torch.set_num_threads(threads)
    trunk._SAVE_SECONDS = 0.0
    model = tiny_reader("llama")

    def slowly(stage: str, done: float) -> None:
        ready.touch()
        time.sleep(0.02)

    recovered(step, model, replace(context_of(model, scratch, corpus), progress=slowly), [2_400])
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize("step", [*ALL, replace(ALL[1], trunk=False)], ids=[*NAMES, "alone"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(
    step: Recovery, model: Model, tmp_path: Path, corpus: str
) -> None:
    whole = recovered(step, model, context_of(model, tmp_path / "whole", corpus), [2_400])[2_400]
    context = context_of(model, tmp_path / "scratch", corpus)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([trunk.__name__, LoRA.__module__, BlockLocal.__module__])
    for delay in (0.1, 0.23, 0.05, 0.31):
        ready = tmp_path / f"ready-{delay}"
        process = server.Process(
            target=recover_until_killed, args=(step, context.scratch, corpus, torch.get_num_threads(), ready)
        )
        process.start()
        while not ready.exists() and process.is_alive():
            time.sleep(0.05)
        time.sleep(delay)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert weights_hash(recovered(step, model, context, [2_400])[2_400]) == weights_hash(whole)


# -- several processes ------------------------------------------------------------------------------------------------

SHARED = [replace(ALL[0], batch=3), replace(ALL[2], batch=3), replace(ALL[1], batch=3, lr=2e-3)]


def shard_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every accelerator one of FSDP, which accelerate's configuration leaves to GPUs."""
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class Sharding(accelerate.Accelerator):
        def __init__(self) -> None:
            super().__init__()
            PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                cpu_ram_efficient_loading=False,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            )

    monkeypatch.setattr(accelerate, "Accelerator", Sharding)


def recover_and_save(folder: Path, corpus: str, *, sharded: bool = False) -> None:
    """What each of the launched processes does, in a folder of its own."""
    torch.set_num_threads(1)
    if sharded:
        shard_on_processors(pytest.MonkeyPatch())
    own = folder / os.environ.get("RANK", "alone")
    model = tiny_reader("llama")
    for step in SHARED:
        result = recovered(step, model, context_of(model, own / step.name(), corpus), [400, 1_200])[1_200]
        save_file(dict(result.hf.named_parameters()), own / f"{step.name()}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shards"])
def test_two_processes_recover_what_one_does(
    sharded: bool, model: Model, tmp_path: Path, corpus: str, call_in_two_processes: Callable[..., None]
) -> None:
    recover_and_save(tmp_path, corpus)
    call_in_two_processes(300, recover_and_save, tmp_path, corpus, sharded=sharded)
    before = dict(model.hf.named_parameters())
    for step in SHARED:
        first, second, alone = (load_file(tmp_path / who / f"{step.name()}.safetensors") for who in ("0", "1", "alone"))
        assert all(torch.equal(first[name], second[name]) for name in alone)
        apart = sum((first[name] - value).square().sum() for name, value in alone.items())
        moved = sum((value - before[name]).square().sum() for name, value in alone.items())
        assert moved > 0
        assert apart < 1e-4 * moved, step.name()


@pytest.mark.parametrize(
    ("version", "said"),
    [(1, "sharded by FSDP 2, got fsdp_version 1: set fsdp_version: 2"), (2, "weights that stay zero")],
)
def test_what_cannot_be_sharded_is_refused(
    version: int, said: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate
    from accelerate.utils import DistributedType

    class Configured:
        distributed_type = DistributedType.FSDP
        is_fsdp2 = version == 2

    monkeypatch.setattr(accelerate, "Accelerator", Configured)
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, state = ALL[1]._state(model, context_of(model, tmp_path, None))
    next(iter(state.trained.values())).register_hook(lambda gradient: gradient)  # as held zeros have
    with pytest.raises(MariotteError, match=said):
        trunk.train(state, lambda _: random_tokens(2, BLOCK), schedule=lambda _: 1.0, until=1)


# -- the best state ---------------------------------------------------------------------------------------------------


def test_the_best_state_is_kept_and_said(model: Model, tmp_path: Path, corpus: str) -> None:
    model = recovered(STEP, model, context_of(model, tmp_path / "good", corpus), [4_800])[4_800]
    harmful = replace(STEP, lr=0.3)
    harmed = recovered(harmful, model, context_of(model, tmp_path / "harmed", corpus), [1_600])[1_600]
    facts = harmed.done[-1].facts
    assert facts["valid_after"] > facts["valid_before"]
    assert "recovery raised the held-out loss from" in facts["warning"]
    kept = recovered(replace(harmful, keep_best=True), model, context_of(model, tmp_path / "kept", corpus), [1_600])[
        1_600
    ]
    facts = kept.done[-1].facts
    assert facts["kept"]["step"] == 0  # the model as it came
    assert len(facts["kept"]["valid"]) > 3
    assert facts["kept"]["valid"]["0"] == pytest.approx(facts["valid_before"], rel=1e-5)
    assert facts["valid_after"] == pytest.approx(facts["valid_before"], rel=1e-6)
    assert "warning" not in facts
    assert not list((tmp_path / "kept").glob("rows-*"))


def test_keeping_the_best_of_what_only_helps_changes_nothing(model: Model, tmp_path: Path, corpus: str) -> None:
    plain = recovered(STEP, model, context_of(model, tmp_path / "plain", corpus), [1_600])[1_600]
    best = recovered(replace(STEP, keep_best=True), model, context_of(model, tmp_path / "best", corpus), [1_600])[1_600]
    facts = best.done[-1].facts
    assert facts["kept"]["step"] == facts["steps"]
    assert weights_hash(best) == weights_hash(plain)
    assert "warning" not in facts
    assert facts["valid_after"] < facts["valid_before"]


def test_a_text_without_a_validation_split_trains_and_cannot_keep_the_best(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    text = Path(counting_corpus(tmp_path).removeprefix("file:")).read_text(encoding="utf-8")
    (folder / "train.txt").write_text(text, encoding="utf-8")
    corpus = f"file:{folder}"
    result = recovered(STEP, model, context_of(model, tmp_path / "scratch", corpus), [800])[800]
    assert result.done[-1].facts["valid_rows"] == 0
    with pytest.raises(DataError, match="keep_best needs a validation split"):
        recovered(replace(STEP, keep_best=True), model, context_of(model, tmp_path / "best", corpus), [800])


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_trunk_that_diverges_serves_the_amounts_before(
    model: Model, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    amounts = [400, 800, 2_400, 3_200]
    whole = recovered(STEP, model, context_of(model, tmp_path / "whole", corpus), amounts[:2])
    loss = failing_from(12)
    monkeypatch.setattr(LoRA, "loss", lambda *_: loss)
    context = context_of(model, tmp_path / "scratch", corpus)
    prepared = prepare_once(STEP, model, context, amounts)
    assert prepared.facts["broken"]["step"] == 12
    assert STEP.covers(prepared, amounts)
    assert (context.scratch / "latest" / "manifest.json").is_file()  # the last good state
    monkeypatch.undo()
    for amount in amounts[:2]:
        assert weights_hash(STEP.apply(model, prepared, amount, context)) == weights_hash(whole[amount])
    for amount in amounts[2:]:
        with pytest.raises(DivergedError, match="the loss became nan at step 12 of training; lower the learning rates"):
            STEP.apply(model, prepared, amount, context)


@pytest.mark.parametrize("step", ALL[:3], ids=NAMES[:3])  # block has nothing to learn from the model itself
def test_a_rate_that_is_far_too_high_is_said(step: Recovery, model: Model, tmp_path: Path, corpus: str) -> None:
    with pytest.raises(DivergedError, match=r"became (nan|inf) at step \d+ of training; lower the learning rates"):
        recovered(replace(step, lr=1e30), model, context_of(model, tmp_path, corpus), [1_600])


@pytest.mark.parametrize("step", ALL, ids=NAMES)
def test_weights_that_are_no_numbers_are_refused(step: Recovery, model: Model, tmp_path: Path, corpus: str) -> None:
    context = context_of(model.copy(), tmp_path / "scratch", corpus)
    with torch.no_grad():
        model.blocks[0].up.weight[1, 2] = math.nan
    with pytest.raises(ModelError, match=rf"{step.name()} needs finite weights, and .*up_proj\.weight holds NaN"):
        step.prepare(model, context, [800])
    assert not context.scratch.exists()


@pytest.mark.parametrize("options", [{}, {"trunk": False}], ids=["trunk", "alone"])
def test_a_decay_that_diverges_keeps_its_last_good_state(
    options: dict[str, bool], model: Model, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, amount = replace(STEP, **options), 800  # ten steps, of which the trunk makes nine
    whole = recovered(step, model, context_of(model, tmp_path / "whole", corpus), [amount])[amount]
    context = context_of(model, tmp_path / "scratch", corpus)
    good = 5 if options else 0
    prepared = prepare_once(step, model, context, [amount])
    monkeypatch.setattr(LoRA, "loss", lambda *_: failing_from(good))
    for _ in range(2):
        with pytest.raises(DivergedError, match=f"the loss became nan at step {good or 9} of training"):
            step.apply(model, prepared, amount, context)
        assert context.counters.decay_tokens == good * step.batch * BLOCK
        monkeypatch.setattr(LoRA, "loss", lambda *_: failing_from(0))
    monkeypatch.undo()
    assert weights_hash(step.apply(model, prepared, amount, context)) == weights_hash(whole)


@pytest.mark.parametrize("step", ALL[:3], ids=NAMES[:3])
@pytest.mark.parametrize("held_out", [True, False])
def test_a_last_step_that_leaves_no_numbers_is_said(
    held_out: bool, step: Recovery, model: Model, tmp_path: Path, corpus: str
) -> None:
    """The losses of a run are those before each step: the one step of this run begins with a good one."""
    if not held_out:
        folder = tmp_path / "text"
        folder.mkdir()
        text = Path(corpus.removeprefix("file:")).read_text(encoding="utf-8")
        (folder / "train.txt").write_text(text, encoding="utf-8")
        corpus = f"file:{folder}"
    with pytest.raises(DivergedError, match="the loss is nan after the last step of training; lower the"):
        recovered(replace(step, lr=1e38, warmup=0), model, context_of(model, tmp_path / "a", corpus), [80])


def test_what_was_reached_before_a_failure_is_in_the_store(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One D that diverges, one beyond its text: the others are records, and each failure is a sentence."""
    world = World()
    short = tmp_path / "short.txt"
    rows = world.rows("all", "train", 40)
    short.write_text("\n\n".join(row.text for row in rows), encoding="utf-8")
    text = f"""
format = 1
name = "failing"
models = ["{model_folder}"]
measures = ["loss:testbed/all(rows=4)"]
chains = ["ffn@0.5 | lora@640(batch=2)", "ffn@0.5 | lora@1280(batch=2)", "ffn@0.5 | lora@6400(batch=2)",
          'ffn@0.5 | full@640(batch=2, corpus="file:{short}")', 'ffn@0.5 | full@64k(batch=2, corpus="file:{short}")']
[calibration]
corpus = "testbed/all"
rows = 4
"""
    monkeypatch.setattr(LoRA, "loss", lambda *_: failing_from(20))  # of the trunk, the only one that is so long
    with open_store(tmp_path / "s.db", create=True) as store:
        summary = running.run(parse(text), store)
        records, failures = list(store.records()), list(store.failures())
    assert len(summary.failures) == len(failures) == 2
    kept = {(record.recovery, record.recovery_tokens) for record in records if record.recovery}
    assert kept == {("lora", 640), ("lora", 1280), ("full", 640)}
    said = {failure.chain.split(" | ")[1][:6]: failure.error for failure in failures}
    assert said["lora@6"] == "the loss became nan at step 20 of training; lower the learning rates"
    assert "full@64k asks for 1,000 rows of 64 tokens" in said["full@6"]
    assert "full@64k(repeats=true)" in said["full@6"]


def test_harm_is_said_where_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    asked = [
        "compress",
        "testbed/qwen2-46k",
        "lora@640(batch=2, lr=0.3)",
        "--out",
        str(tmp_path / "cut"),
        "--rows",
        "4",
    ]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    assert "lora@640(batch=2, lr=0.3): recovery raised the held-out loss from 1." in said.output


def test_only_training_and_validation_text_is_read(
    model: Model, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = File.documents

    def documents(self: File, split: Split) -> Iterator[str]:
        read.append(split)
        return real(self, split)

    monkeypatch.setattr(File, "documents", documents)
    for step in ALL:
        recovered(replace(step, keep_best=True), model, context_of(model, tmp_path / step.name(), corpus), [300])
    assert set(read) == {"train", "valid"}


def test_more_than_the_text_is_refused_and_offers_repeats(model: Model, tmp_path: Path, corpus: str) -> None:
    context = context_of(model, tmp_path / "scratch", corpus)
    prepared = prepare_once(STEP, model, context, [800, 9_000])
    assert STEP.covers(prepared, [800, 9_000])
    assert context.counters.trunk_tokens < 800
    with pytest.raises(
        DataError, match=r"lora@9k asks for 562 rows of 16 tokens, .* holds \d+: .*lora@9k\(repeats=true\)"
    ):
        STEP.apply(model, prepared, 9_000, context)
    assert STEP.apply(model, prepared, 800, context).done[-1].facts["epochs"] == 1
    again = replace(STEP, repeats=True)
    result = recovered(again, model, context_of(model, tmp_path / "again", corpus), [9_000])[9_000]
    assert result.done[-1].facts["epochs"] == 2


def test_no_recovery_needs_peft(model: Model, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.partition(".")[0] in ("peft", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for step in ALL:
        recovered(step, model, context_of(model, tmp_path / step.name(), corpus), [300])


def test_the_adapters_are_those_of_peft(model: Model, tmp_path: Path, corpus: str) -> None:
    """Outputs and gradients, beside the library that others use."""
    peft = pytest.importorskip("peft")
    learner = STEP.learner(model, context_of(model, tmp_path, corpus))
    paths = {name.rpartition(".")[0] for name, p in learner.module.named_parameters() if p.requires_grad}
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=sorted(paths))
    theirs = peft.inject_adapter_in_model(config, model.copy().hf)
    for path in paths:
        ours, layer = learner.module.get_submodule(path), theirs.get_submodule(path)
        nn.init.normal_(ours.b_OR, std=0.1)
        layer.lora_A["default"].weight.data.copy_(ours.a_RI.data)
        layer.lora_B["default"].weight.data.copy_(ours.b_OR.data)
    rows = torch.randint(0, 64, (2, BLOCK))
    losses = [text_loss(module, rows) for module in (learner.module, theirs)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for path in paths:
        ours, layer = learner.module.get_submodule(path), theirs.get_submodule(path)
        torch.testing.assert_close(ours.a_RI.grad, layer.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.b_OR.grad, layer.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-4)


def test_a_finished_preparation_is_not_made_twice(model: Model, tmp_path: Path, corpus: str) -> None:
    context = context_of(model, tmp_path, corpus)
    prepare_once(STEP, model, context, [800])
    assert Prepared.open(tmp_path) is not None
    prepare_once(STEP, model, context, [800])
    assert context.counters.preparations == 1

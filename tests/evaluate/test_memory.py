"""Bytes of the cache by hand, and peaks of real processes, compared with one another by factors alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from mariotte.errors import ChainError, DataError, ModelError
from mariotte.evaluate import footprint
from mariotte.evaluate.footprint import (
    Allocator,
    Peaks,
    allocated,
    loaded_bytes,
    perform,
    prompt,
    run,
    stored_bytes,
    tensor_bytes,
    watchable,
)
from mariotte.evaluate.measures.memory import Memory, kv_bytes
from mariotte.experiments.identity import measure_text, resolve_measure
from mariotte.experiments.pipeline import compress_model, measure
from mariotte.models.checkpoint import save
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.testing.tiny import tiny

MB = 1 << 20
MEMORY = Memory(batch=2, prompt=8, new=3)
PROMPT = torch.arange(16).reshape(2, 8)

needs_proc = pytest.mark.skipif(not watchable(), reason="peaks of a process are read in /proc, which is Linux's")


class Scripted:
    """A gauge that says the numbers that it is given."""

    def __init__(self, *peaks: int) -> None:
        self.peaks, self.resets = list(peaks), 0

    def reset(self) -> None:
        self.resets += 1

    def peak(self) -> int:
        return self.peaks.pop(0)


class Packed(torch.nn.Module):
    """Like torch's own int8 layers it keeps its weight where neither parameters nor buffers are."""

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = (torch.zeros(8, 4, dtype=torch.int8), torch.zeros(4))


def ran(model: Model, batch: int = 2, length: int = 8, new: int = 3) -> Peaks:
    return run(model, prompt(model, batch, length), new, Scripted(70, 50), lambda name: None)


# Bytes that can be counted.


@pytest.mark.parametrize(
    ("model_type", "sizes", "dtype", "expected"),
    [
        # A key and a value of two layers, two KV heads of width 8, four bytes a number.
        ("llama", {}, torch.float32, 2 * 2 * 2 * 8 * 4),
        ("qwen2", {}, torch.float32, 2 * 2 * 2 * 8 * 4),
        ("qwen2", {"layers": 3, "heads": 4, "kv_heads": 1}, torch.bfloat16, 2 * 3 * 1 * 8 * 2),
        ("llama", {"kv_heads": 4, "head_dim": 6}, torch.float32, 2 * 2 * 4 * 6 * 4),
    ],
)
def test_a_tokens_bytes_in_the_cache_by_hand(
    model_type: str, sizes: dict[str, int], dtype: torch.dtype, expected: int
) -> None:
    model = tiny(model_type, dtype=dtype, **sizes)
    assert kv_bytes(model.shape, dtype.itemsize) == expected
    found = ran(model, batch=2, length=8, new=3)
    assert found.cached == 2 * (8 + 3)
    assert found.cache == found.cached * expected


def test_tensors_count_once_and_packed_ones_by_their_parts() -> None:
    weight = torch.zeros(3, 4)
    assert tensor_bytes([weight, weight, (torch.zeros(5, dtype=torch.int8), (weight, None))]) == 48 + 5
    assert tensor_bytes(torch.full((100,), float(i)) for i in range(50)) == 50 * 400
    packed = Packed()
    assert loaded_bytes(packed) == stored_bytes(packed) == 8 * 4 + 16


@pytest.mark.parametrize("tied", [True, False])
def test_model_bytes_are_those_of_the_file_and_of_what_no_file_keeps(tied: bool, tmp_path: Path) -> None:
    model = tiny("qwen2", tied=tied)
    assert stored_bytes(model.hf) == 4 * model.counts.n_params
    folder = save(model, tmp_path / "saved")
    written = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(written[:8], "little")
    assert len(written) - header == stored_bytes(model.hf)
    frequencies = sum(buffer.nbytes for buffer in model.hf.buffers())
    assert loaded_bytes(model.hf) - stored_bytes(model.hf) in (frequencies, frequencies // 2)  # held once or twice


# The passes.


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_it_reads_once_and_writes_one_token_a_pass(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fed, stages = tiny(model_type), list[tuple[int, ...]](), list[str]()
    forward = model.hf.forward

    def spy(**given: Any) -> object:
        fed.append(tuple(given["input_ids"].shape))
        return forward(**given)

    monkeypatch.setattr(model.hf, "forward", spy)
    gauge = Scripted(70, 50)
    found = run(model, prompt(model, 2, 8), 3, gauge, stages.append)
    assert fed == [(2, 8), (2, 1), (2, 1), (2, 1)]
    assert (found.prefill, found.decode, gauge.resets) == (70, 50, 2)
    assert stages == ["read the prompt", "wrote tokens"]
    assert found.loaded == loaded_bytes(model.hf)


def test_an_encoder_reads_and_writes_nothing() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf = BertForMaskedLM(BertConfig(**sizes, intermediate_size=48)).eval()
    found = run(cast(Model, SimpleNamespace(hf=hf, kind="masked")), PROMPT, 3, Scripted(70), lambda name: None)
    assert found == Peaks(prefill=70, decode=None, loaded=loaded_bytes(hf))


def test_a_decoder_keeps_its_own_tokens_and_the_encoders() -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3}
    hf = T5ForConditionalGeneration(T5Config(**sizes, d_kv=8, num_heads=4, decoder_start_token_id=0)).eval()
    model = cast(Model, SimpleNamespace(hf=hf, kind="seq2seq"))
    found = run(model, PROMPT, 3, Scripted(70, 50), lambda name: None)
    token = 2 * 3 * 4 * 8 * 4  # keys and values, decoder layers, heads, width, bytes
    assert (found.cached, found.cache) == (2 * (1 + 3), 2 * (1 + 3) * token)
    assert (found.crossed, found.cross) == (2 * 8, 2 * 8 * token)


# A GPU, whose allocator is made up here.


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A device that holds 1000 bytes and gives 700, then 300 more at most."""
    state = {"now": 1000, "runs": 0}

    def most(_: object) -> int:
        state["runs"] += 1
        return 1000 + (700 if state["runs"] % 2 else 300)

    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", most)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: state["now"])
    return state


def test_on_a_gpu_what_others_take_up_is_left_out(device: dict[str, int]) -> None:
    model = tiny("llama")
    found = allocated(model, 2, 8, 3)
    assert found.prefill == loaded_bytes(model.hf) + 700
    assert found.decode == loaded_bytes(model.hf) + 300
    assert device["runs"] == 4  # a rehearsal goes first
    assert found.baseline is found.load is None
    assert Allocator(torch.device("cpu"), before=1000, loaded=5).peak() == 705


def test_no_room_on_a_gpu_is_a_sentence(device: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Peaks:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(footprint, "run", full)
    with pytest.raises(ModelError, match="memory: cpu has not enough memory, it ran out while it rehearsed: ask for"):
        allocated(tiny("llama"), 2, 8, 3)


# A CPU: processes that load and run, three in all, as each takes seconds to start.

LARGE = {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 2048, "layers": 2}


@needs_proc
def test_peaks_of_processes() -> None:
    large = tiny("llama", **LARGE)
    small = compress_model(large, "prunenet-random@0.75")
    few, many = Memory(batch=1, prompt=16, new=2), Memory(batch=16, prompt=64, new=2)
    ours = torch.ones(64 * MB)  # 256 MB in this process, which no peak may hold
    base, other, crowd = few.measure(large), few.measure(small), many.measure(large)
    assert ours.sum() > 0
    weights = stored_bytes(large.hf)
    assert weights > 12 * MB > 2 * stored_bytes(small.hf)
    for found in (base, other, crowd):
        assert set(found.metrics) == set(Memory.metrics)
        for part in ("prefill", "decode"):
            assert found.metrics["loaded_bytes"] <= found.metrics[f"{part}_peak_bytes"] < ours.nbytes / 2
            beyond = found.metrics[f"{part}_peak_bytes"] - found.metrics["loaded_bytes"]
            assert found.details[part] == {"beyond_model": beyond}
    # The model: what is not there is not loaded.
    assert base.metrics["loaded_bytes"] == loaded_bytes(large.hf)
    assert other.metrics["prefill_peak_bytes"] < base.metrics["prefill_peak_bytes"] / 2
    assert other.metrics["decode_peak_bytes"] < base.metrics["decode_peak_bytes"] / 2
    assert base.details["load_peak_bytes"] >= weights
    # The batch: 1024 tokens rather than 16 are read at once, and 66 x 16 rather than 18 are in the cache.
    assert crowd.details["prefill"]["beyond_model"] > 1024 * 2048 * 4 > 4 * base.details["prefill"]["beyond_model"]
    cache = 66 * 16 * int(crowd.metrics["kv_bytes_per_token"])
    assert crowd.details["decode"]["beyond_model"] > cache > 2 * base.details["decode"]["beyond_model"]
    assert crowd.details["cache"] == {"bytes": cache, "tokens": 66 * 16, "kv_bytes_per_token_from_shapes": 2048}


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the process run other code: ``folder`` is where its job is."""

    def say(code: str) -> None:
        opening = "import os, sys, pathlib; folder = pathlib.Path(sys.argv[1]); "
        monkeypatch.setattr(footprint, "_command", lambda folder: [sys.executable, "-c", opening + code, str(folder)])

    return say


@needs_proc
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "(folder / 'stage').write_text('wrote tokens'); os.kill(os.getpid(), 9)",
            "the process that was measured was killed while it wrote tokens, most likely because this machine has not "
            "enough memory: ask for a smaller batch or prompt",
        ),
        (
            "raise ValueError('of no use')",
            "ended with code 1 while it loaded the model: ValueError: of no use; please report it",
        ),
        ("pass", "ended with code 0 while it loaded the model: it said nothing"),
        ("(folder / 'found.json').write_text('{\"error\": \"a sentence\"}')", "^a sentence$"),
    ],
)
def test_what_becomes_of_the_process_is_one_sentence(code: str, said: str, instead: Callable[[str], None]) -> None:
    instead(code)
    with pytest.raises(ModelError, match=said) as caught:
        MEMORY.measure(tiny("llama"))
    assert "\n" not in str(caught.value)


@needs_proc
def test_the_process_is_told_what_to_do_and_sees_the_model_as_it_was_saved(
    instead: Callable[[str], None], tmp_path: Path
) -> None:
    instead(f"import shutil; shutil.copytree(folder, {str(tmp_path / 'seen')!r}); raise SystemExit('enough')")
    model = load(save(tiny("qwen2"), tmp_path / "saved"), dtype="bfloat16")
    with pytest.raises(ModelError, match="enough"):
        MEMORY.measure(model)
    job = json.loads((tmp_path / "seen" / "job.json").read_text())
    assert (job["batch"], job["prompt"], job["new"], job["dtype"]) == (2, 8, 3, "bfloat16")
    assert [path.name for path in (tmp_path / "seen" / "checkpoint").glob("*.safetensors")] == ["model.safetensors"]
    assert not Path(job["checkpoint"]).exists()  # scratch is gone


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
            "ran out",
        ),
        (MemoryError(), "this machine has not enough memory, it ran out while it read the prompt"),
        (ModelError("a sentence"), "^a sentence$"),
    ],
)
def test_the_process_writes_its_sentence(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(job: object, stage: Callable[[str], None]) -> Peaks:
        stage("read the prompt")
        raise error

    monkeypatch.setattr(footprint, "_watch", fail)
    (tmp_path / "job.json").write_text("{}")
    perform(tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    with pytest.raises(ModelError, match=said):
        raise ModelError(found["error"])


def test_another_error_of_the_process_is_no_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(job: object, stage: object) -> Peaks:
        raise RuntimeError("a bug")

    monkeypatch.setattr(footprint, "_watch", fail)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(RuntimeError, match="a bug"):
        perform(tmp_path)


# The measure.


def test_what_it_is_measured_on_goes_without_saying() -> None:
    assert resolve_measure("memory(batch=2)") == Memory(batch=2)
    assert measure_text(Memory(batch=2)) == "memory:random(batch=2)"
    assert Memory(batch=2, prompt=8, new=3).tokens == 2 * (8 + 1 + 8 + 3)


@needs_proc
def test_the_protocol_says_how_it_was_watched() -> None:
    model = tiny("llama")
    found = MEMORY.protocol(model)
    assert found["repeatable"] is False
    assert (found["device"], found["threads"], found["dtype"]) == ("cpu", 1, "float32")
    assert (found["batch"], found["prompt"], found["new"]) == (2, 8, 3)
    assert "rehearsal" in found["baseline"]
    assert dataclasses.replace(MEMORY, new=4).protocol(model) != found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"on": "wikitext2"}, "memory is measured on random tokens, got 'wikitext2': write memory:random"),
        ({"batch": 0}, "memory: batch must be at least 1, got 0"),
        ({"prompt": 0}, "memory: prompt must be at least 1, got 0"),
        ({"new": 0}, "memory: new must be at least 1, got 0"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ChainError, match=said):
        Memory(**fields)


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(DataError, match="memory: a window of 129 tokens is longer than the 128 positions"):
        Memory(prompt=120, new=9).protocol(tiny("llama"))


def test_a_system_that_does_not_say_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(footprint, "RESET", tmp_path / "missing")
    with pytest.raises(
        ModelError, match="read in /proc, which this system does not have: measure on Linux, or on a GPU"
    ):
        measure(tiny("llama"), "memory")

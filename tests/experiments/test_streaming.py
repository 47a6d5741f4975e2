"""Models larger than memory: read, cut and written block by block, with the result of the whole model to the bit."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Concatenate
from typer.testing import CliRunner

from mariotte import chain as chains
from mariotte.cli.main import app
from mariotte.errors import ChainError, ModelError
from mariotte.evaluate.measures import loss
from mariotte.experiments import estimate, identity
from mariotte.experiments.estimate import preflight
from mariotte.experiments.pipeline import compress_model, measure
from mariotte.models import checkpoint, layouts, nll, packed, paging
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.testing.large import large
from mariotte.testing.tiny import random_tokens, tiny

LARGE = (
    "ffn@0.3",
    "ffn@0.3(sequential=true)",
    "heads@0.5",
    "slice@0.25",
    "prunenet-random@0.5",
    "shortgpt@0.25",
    "magnitude@0.5",
    "wanda@0.5",
    "sparsegpt@0.5",
    "rtn@4",
    "gptq@4",
    "shortgpt@0.25 | heads@0.25 | ffn@0.2 | slice@0.1 | int8",
)
LARGE_TOO = (
    "sleb@0.04(first=23, last=23)",
    "laco@0.04(threshold=-1.0)",
    "svd-llm@0.3",
    "flap@0.3",
    "modegpt@0.2",
    "int8-dynamic",
)
"""What is tried on models larger than memory, in two runs."""
CHAINS = (
    *LARGE,
    "ffn@0.3(criterion=norm, compensate=false)",
    "heads@0.5(criterion=norm, compensate=false)",
    "slice@0.25(compensate=false)",
    "magnitude@0.5(per=layer, allocation=influence)",
    "magnitude@0.5:head",
    "wanda@0.5(sequential=false)",
    "sparsegpt@0.5(sequential=false)",
    "random@0.3",
    "magnitude-structured@0.3",
    "int8",
    "sleb@0.5",
    "laco@0.5",
    "laco@0.5(rule=last)",
    "svd-llm@0.3",
    "flap@0.3",
    "modegpt@0.2",
    "int8-dynamic",
    "svd-llm@0.3:ffn(sequential=true)",
    "flap@0.3(uniform=true)",
    "modegpt@0.3:ffn(allocation=uniform)",
    "modegpt@0.3:attention(compensate=false)",
    "flap@0.3(compensate=false)",
    "svd-llm@0.3 | magnitude@0.3",
    "auto@0.2(search=2)",
    "slicegpt@0.25",
    "slicegpt@0.25(sequential=false, orientation=random)",
    "flap@0.2 | rtn@4",
)

LIMITED = """
import gc, json, resource, sys, time
from pathlib import Path
from mariotte.experiments.pipeline import compress_model, measure
from mariotte.models import checkpoint
from mariotte.models.hardware import resident_bytes, stated_bytes
from mariotte.models.load import load

LOSS = "loss:testbed/all(rows=8, block=64)"
model, out, allowance, texts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])

def run(model, text, name, stream):
    how = dict(calibration="testbed/all", rows=8, block=64, stream=stream)
    return checkpoint.save(compress_model(model, text, **how), out / name)

# Everything imported, compiled and cached once, on a model of no size.
for place, text in enumerate(texts):
    run(sys.argv[5], text, f"warm-{place}", out / f"warm-scratch-{place}")
measure(load("testbed/qwen2-46k", stream=out / "none"), LOSS)
gc.collect()
taken = stated_bytes("/proc/self/status", "VmData")
resource.setrlimit(resource.RLIMIT_DATA, (taken + allowance, taken + allowance))
before = resident_bytes()
Path("/proc/self/clear_refs").write_text("5")
found = {}
for place, text in enumerate(texts):
    began = time.perf_counter()
    print(text, file=sys.stderr)
    run(model, text, f"limited-{place}", out / f"scratch-{place}")
    found[text] = time.perf_counter() - began
    gc.collect()
began = time.perf_counter()
metrics = measure(load(model, stream=out / "none"), LOSS).metrics
found[LOSS] = time.perf_counter() - began
gc.collect()
peak = stated_bytes("/proc/self/status", "VmHWM") - before
try:
    load(model)
    whole = "loaded"
except Exception as error:
    whole = " ".join(str(error).split())[:300]
print(json.dumps({"peak": peak, "seconds": found, "whole": whole, "metrics": metrics}))
"""
"""Runs chains with so many bytes of private memory beyond the program's, measures the model, then loads it whole."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def under_a_limit(
    tmp_path: Path, texts: tuple[str, ...], *, hidden: int, layers: int, ffn: int, experts: int = 0
) -> None:
    """Chains on a model of at least four times the memory that the process may take, against the unlimited run."""
    model, out = tmp_path / "model", tmp_path / "out"
    n_bytes = large(model, hidden=hidden, layers=layers, ffn=ffn, experts=experts)
    allowance = n_bytes // 4
    small = tmp_path / "small"
    large(small, hidden=64, layers=layers, ffn=64, experts=experts)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(model), str(out), str(allowance), json.dumps(texts), str(small)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{n_bytes / 1e6:.1f} MB of weights, {allowance / 1e6:.1f} MB allowed, peak {found['peak'] / 1e6:.1f} MB")
    # The limit is on private memory; resident memory has files' pages too, if any are mapped.
    assert found["peak"] <= allowance * 1.1, found
    assert "memory" in found["whole"].lower(), found  # loaded whole, it does not fit
    whole = load(model)
    assert found["metrics"] == measure(whole, "loss:testbed/all(rows=8, block=64)").metrics
    del whole
    for place, text in enumerate(texts):
        streamed = weights(out / f"limited-{place}")
        unlimited = compress_model(str(model), text, calibration="testbed/all", rows=8, block=64)
        expected = weights(checkpoint.save(unlimited, out / f"whole-{place}"))
        assert streamed.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(streamed[name], tensor), (text, name)
        loaded = load(out / f"limited-{place}")
        assert loaded.done == unlimited.done


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits private memory, which Linux can")
def test_a_model_of_four_times_the_memory(tmp_path: Path) -> None:
    under_a_limit(tmp_path, ("ffn@0.3",), hidden=320, layers=40, ffn=320)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits private memory, which Linux can")
def test_every_method_on_a_model_of_four_times_the_memory(tmp_path: Path) -> None:
    under_a_limit(tmp_path, LARGE, hidden=448, layers=32, ffn=448)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits private memory, which Linux can")
def test_more_methods_on_a_model_of_four_times_the_memory(tmp_path: Path) -> None:
    under_a_limit(tmp_path, LARGE_TOO, hidden=448, layers=48, ffn=448)  # three second moments a block: modegpt


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits private memory, which Linux can")
def test_a_mixture_of_four_times_the_memory(tmp_path: Path) -> None:
    texts = ("experts@0.5", "expert-ffn@0.5", "shortgpt@0.25", "int8")
    under_a_limit(tmp_path, texts, hidden=256, layers=32, ffn=320, experts=6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the testbed's tokenizer, tied, in bfloat16."""
    source = load("testbed/qwen2-46k")
    model = tiny("qwen2", hidden=64, layers=4, ffn=96, vocab=source.shape.vocab, tied=True)
    model.tokenizer = source.tokenizer
    return checkpoint.save(model, tmp_path_factory.mktemp("small") / "model", dtype=torch.bfloat16)


def compressed(model: Path, text: str, stream: Path | None = None) -> Model:
    return compress_model(str(model), text, calibration="testbed/all", rows=6, block=32, stream=stream)


@pytest.mark.parametrize("text", CHAINS)
def test_streamed_is_whole_to_the_bit(small: Path, tmp_path: Path, text: str) -> None:
    whole, streamed = compressed(small, text), compressed(small, text, tmp_path / "scratch")
    assert streamed.streamed
    assert not whole.streamed
    expected = dict(whole.hf.named_parameters())
    found = dict(streamed.hf.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
    assert streamed.done == whole.done
    assert streamed.config == whole.config
    tokens = random_tokens(vocab=whole.shape.vocab)
    assert torch.equal(streamed.logits(tokens), whole.logits(tokens))


@pytest.mark.parametrize(("model", "text"), [("testbed/t5-265k", "int8"), ("testbed/bert-181k", "wanda@0.3")])
def test_models_that_are_no_decoders_are_compressed_streamed(model: str, text: str, tmp_path: Path) -> None:
    whole = compress_model(model, text, calibration="testbed/all", rows=6)
    streamed = compress_model(model, text, calibration="testbed/all", rows=6, stream=tmp_path / "scratch")
    assert streamed.streamed
    expected, found = dict(whole.hf.named_parameters()), dict(streamed.hf.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
    assert streamed.done == whole.done


def test_a_walk_reads_each_block_a_few_times(small: Path, tmp_path: Path) -> None:
    """However many batches of calibration text there are."""
    dense = load(small, stream=tmp_path / "scratch")
    pager = paging.pager_of(dense.embeddings.weight)
    assert pager is not None
    pager.limit //= 3  # one block
    blocks = 2 * sum(p.numel() for block in dense.blocks for p in block.module.parameters())
    table, batches = 2 * dense.embeddings.weight.numel(), 10
    compress_model(dense, "shortgpt@0.25", calibration="testbed/all", rows=64 * batches, block=64)
    # Blocks: the first for one token, to see what it gives, and all once. Of the table each time the rows that a batch
    # has, and those of the row that finds out what blocks are given.
    assert blocks <= pager.read_bytes <= (1.05 + 1 / 4) * blocks + (batches + 1) * table


MEASURES = (
    "loss:testbed/all(rows=20, block=32)",
    "loss:testbed/all(rows=8, block=32, stride=12)",
    "loss:testbed/all(rows=12, windows=documents)",
    "knowledge:testbed(facts=12)",
    "tasks:testbed/agreement+facts(items=8)",
)


@pytest.mark.parametrize("text", MEASURES)
@pytest.mark.parametrize("held", [1, 10**6])
def test_a_streamed_evaluation_is_that_of_the_whole_model_to_the_bit(
    small: Path, tmp_path: Path, text: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nll, "TOKENS_AT_ONCE", 128)
    monkeypatch.setattr(nll, "ON_A_PROCESSOR", 128)
    monkeypatch.setattr(loss, "TOKENS_AT_ONCE", 128)
    whole, streamed = load(small), load(small, stream=tmp_path / "scratch")
    pager = paging.pager_of(streamed.embeddings.weight)
    assert pager is not None
    pager.limit = held  # one batch at a time, or all of them
    expected, found = (identity.resolve_measure(text).measure(model) for model in (whole, streamed))
    assert found == expected
    assert not (tmp_path / "scratch").exists()  # an evaluation writes nothing


def test_an_evaluation_reads_each_block_once_for_many_batches(small: Path, tmp_path: Path) -> None:
    dense = load(small, stream=tmp_path / "scratch")
    pager = paging.pager_of(dense.embeddings.weight)
    assert pager is not None
    pager.limit //= 3  # one block
    room = pager.limit // 3 // (64 * 4)  # tokens whose stream is a third of it
    tokens = random_tokens(rows=3 * (room // 32), length=32, vocab=dense.shape.vocab)
    nll.token_nll(dense, tokens, batch=4)
    blocks = 2 * sum(p.numel() for block in dense.blocks for p in block.module.parameters())
    table, batches = 2 * dense.embeddings.weight.numel(), -(-len(tokens) // 4)
    # Three times all tokens that are held at once; the table is the head too.
    assert 3 * blocks <= pager.read_bytes <= 4.1 * blocks + 3 * batches * table


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("speed:random", "speed cannot be streamed: it times what a model in memory takes"),
        ("memory:random", "memory cannot be streamed: it finds what a model takes that is loaded whole"),
        ("knowledge:lama", "knowledge cannot be streamed: it follows LAMA's answers token by token"),
        ("tasks:piqa", "tasks cannot be streamed: it leaves it to lm-eval how rows go through the model"),
    ],
)
def test_measures_that_need_the_whole_model_are_refused(small: Path, asked: str, said: str) -> None:
    with pytest.raises(ChainError, match=said):
        identity.resolve_measure(asked).refuse_streamed("causal")


@pytest.mark.skipif(not packed.installed(), reason="needs torchao")
def test_what_torchao_packed_is_loaded_whole(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.save(compressed(small, "fp8"), tmp_path / "packed", dtype=torch.bfloat16)
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 1000)
    asked = ["evaluate", str(folder), "--measure", "loss:testbed/all(rows=4, block=32)"]
    assert "loss" in CliRunner().invoke(app, [*asked, "--json"]).stdout
    refused = CliRunner().invoke(app, [*asked, "--stream"])
    assert refused.exit_code == 2
    assert "cannot be streamed: torchao packed its weights" in " ".join(refused.output.split())


def test_evaluate_streams_from_the_command_line(small: Path) -> None:
    def run(*options: str) -> Any:
        found = CliRunner().invoke(app, ["evaluate", str(small), *options])
        assert found.exit_code == 0, found.output
        return found.stdout

    asked = ("--measure", "loss:testbed/all(rows=8, block=32)", "--json")
    assert json.loads(run(*asked, "--stream")) == json.loads(run(*asked, "--no-stream"))
    takes = json.loads(run(*asked, "--stream", "--dry-run"))["preflight"]
    assert takes["streamed"]
    assert takes["tokens"] == 8 * 32
    assert "streamed block by block: expected peak of memory" in run(*asked[:2], "--stream", "--dry-run")
    refused = CliRunner().invoke(app, ["evaluate", str(small), "--measure", "speed:random", "--stream"])
    assert refused.exit_code == 2
    assert "speed cannot be streamed: it times what a model in memory takes" in " ".join(refused.output.split())


@pytest.mark.parametrize("shards", [10**9, 40_000])
def test_the_checkpoint_is_an_ordinary_one(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    monkeypatch.setattr(paging, "SHARD_BYTES", shards)
    whole = checkpoint.save(compressed(small, "ffn@0.3"), tmp_path / "whole", dtype=torch.bfloat16)
    streamed = compressed(small, "ffn@0.3", tmp_path / "scratch")
    saved = checkpoint.save(streamed, tmp_path / "streamed", dtype=torch.bfloat16)
    for name in ("config.json", "generation_config.json", "README.md", "mariotte.json", "tokenizer.json"):
        assert (saved / name).read_bytes() == (whole / name).read_bytes(), name
    assert (len(list(saved.glob("*.safetensors"))) == 1) == (shards == 10**9)
    found, expected = (load(folder).hf.state_dict() for folder in (saved, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_that_reads_back_otherwise_is_not_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = compressed(small, "rtn@8", tmp_path / "scratch")
    write = paging.write_file

    def damaged(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
        write({name: tensor * 1.5 if "down" in name else tensor for name, tensor in tensors.items()}, path, dtype)

    monkeypatch.setattr(paging, "write_file", damaged)
    with pytest.raises(ModelError, match="loads back to other logits"):
        checkpoint.save(streamed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["ffn@0.3", "heads@0.5", "shortgpt@0.25", "sleb@0.25", "wanda@0.5", "rtn@4"])
def test_a_few_blocks_are_on_the_device_at_once(
    small: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read goes through one place to the device, and is freed: held by the pager or by nobody."""
    there = most = largest = 0
    read = paging.Cell.read

    def freed(n_bytes: int) -> None:
        nonlocal there
        there -= n_bytes

    def counted(cell: paging.Cell) -> torch.Tensor:
        nonlocal there, most, largest
        found = read(cell)
        assert found.device == cell.pager.device
        there, largest = there + found.nbytes, max(largest, found.nbytes)
        most = max(most, there)
        weakref.finalize(found.untyped_storage(), freed, found.nbytes)
        return found

    monkeypatch.setattr(paging.Cell, "read", counted)
    whole = load(small)
    blocks = 4 * sum(p.numel() for block in whole.blocks for p in block.module.parameters())
    streamed = compressed(small, text, tmp_path / "scratch")
    checkpoint.save(streamed, tmp_path / "out")
    assert most <= 3 * blocks / 4 + 2 * largest
    del streamed
    gc.collect()
    assert there == 0


def test_tables_of_a_vocabulary_are_turned_some_rows_at_a_time(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest matrices of all, which in float64 would be many blocks."""
    whole, widened = compressed(small, "slicegpt@0.25"), set[tuple[int, ...]]()
    double = torch.Tensor.double

    def seen(x: torch.Tensor) -> torch.Tensor:
        widened.add(tuple(x.shape))
        return double(x)

    monkeypatch.setattr(torch.Tensor, "double", seen)
    monkeypatch.setattr(paging, "PIECE_BYTES", 1 << 12)
    streamed = compressed(small, "slicegpt@0.25", tmp_path / "scratch")
    vocab = whole.shape.vocab
    assert (vocab, 64) not in widened
    assert (32, 64) in widened  # a piece of 4 KiB
    assert torch.equal(streamed.embeddings.weight, whole.embeddings.weight)
    assert torch.equal(streamed.head.weight, whole.head.weight)


def test_a_run_that_is_asked_to_stop_leaves_nothing_beside_its_target(small: Path, tmp_path: Path) -> None:
    words = ["compress", str(small), "ffn@0.3 | sleb@0.5", "--calibration", "testbed/all", "--rows", "512", "--stream"]
    run = subprocess.Popen(
        [sys.executable, "-m", "mariotte", *words, "--out", str(tmp_path / "out" / "cut")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob("out/.cut-*/*")):
        assert run.poll() is None, "it ended before it was asked to"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.terminate()
    assert run.wait(60) == 128 + signal.SIGTERM
    assert not any((tmp_path / "out").iterdir())


def test_models_share_a_scratch_folder(small: Path, tmp_path: Path) -> None:
    first, second = (compressed(small, text, tmp_path / "scratch") for text in ("rtn@4", "rtn@8"))
    expected = [dict(compressed(small, text).hf.named_parameters()) for text in ("rtn@4", "rtn@8")]
    for model, wanted in zip((first, second), expected, strict=True):
        assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.hf.named_parameters())
    del first, model
    gc.collect()
    assert all(torch.equal(parameter, expected[1][name]) for name, parameter in second.hf.named_parameters())


def test_nothing_is_left_in_scratch(small: Path, tmp_path: Path) -> None:
    streamed = compressed(small, "ffn@0.3 | rtn@4", tmp_path / "scratch")
    checkpoint.save(streamed, tmp_path / "out")
    kept = list((tmp_path / "scratch").iterdir())
    assert kept
    assert all(path.suffix == ".bin" for path in kept)  # no preparation, and of the steps the last one's weights
    total = sum(path.stat().st_size for path in kept)
    assert total <= sum(p.numel() * p.dtype.itemsize for p in streamed.hf.parameters())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora@1k", "lora cannot be streamed: it trains the model, and each of its many steps goes through all blocks"),
        ("llm-pruner@0.3", "llm-pruner cannot be streamed: it takes gradients of the loss through all blocks at once"),
        ("shortgpt@0.25 | lora@1k", "lora cannot be streamed"),
        (
            "fp8",
            "fp8 cannot be streamed: it leaves the checkpoint to torchao, which packs .* at once, in memory: take int8",
        ),
        ("int4", "int4 cannot be streamed: it leaves the checkpoint to torchao, which .*: take rtn@4"),
        ("prunenet@0.3", "prunenet cannot be streamed: it trains its policy on a matrix of every block"),
        ("ffn@0.3(criterion=taylor)", "ffn cannot be streamed: it takes gradients through all blocks"),
        ("heads@0.3(criterion=taylor)", "heads cannot be streamed: it takes gradients through all blocks"),
        ("magnitude@0.3(per=layer, allocation=greedy)", "magnitude cannot be streamed: it measures the loss"),
        ("wanda@0.3(allocation=greedy)", "wanda cannot be streamed: it measures the loss"),
    ],
)
def test_what_needs_the_whole_model_is_refused_before_any_work(
    small: Path, tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ChainError, match=said):
        compressed(tmp_path / "no such model", text, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    # Also of a model that somebody streamed before.
    with pytest.raises(ChainError, match=said):
        compress_model(load(small, stream=tmp_path / "scratch"), text, calibration="testbed/all")


DECODERS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gpt2", "opt", "gemma2", "gemma3_text")
OTHERS = ("phi", "phi3", "olmo2", "falcon", "gpt_neox", "qwen3_moe", "mixtral", "gpt_oss")
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")


@pytest.mark.parametrize("family", [*MIXTURES, "gpt_neox"])
@pytest.mark.parametrize(
    "text", ["shortgpt@0.5", "laco@0.5", "experts@0.5", "expert-ffn@0.5", "heads@0.5", "magnitude@0.5", "int8"]
)
def test_families_whose_files_are_laid_out_otherwise(family: str, text: str, tmp_path: Path) -> None:
    """Names and layout of the streamed checkpoint are those of the whole one, to the bit."""
    words = load("testbed/qwen2-46k")
    model = tiny(family, vocab=words.shape.vocab, experts=12)
    model.tokenizer = words.tokenizer
    folder = checkpoint.save(model, tmp_path / "model")
    step = identity.resolve(chains.parse(text))[0].step
    if reason := step.refuse(model):
        with pytest.raises(ModelError, match=re.escape(reason)):
            compressed(folder, text, tmp_path / "scratch")
        return
    whole, streamed = compressed(folder, text), compressed(folder, text, tmp_path / "scratch")
    assert streamed.streamed
    assert streamed.done == whole.done
    expected = weights(checkpoint.save(whole, tmp_path / "whole", dtype=torch.bfloat16))
    found = weights(checkpoint.save(streamed, tmp_path / "streamed", dtype=torch.bfloat16))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


EVERYWHERE = (
    "expert-ffn@0.5",
    "experts@0.5",
    "ffn@0.5",
    "flap@0.3",
    "gptq@4",
    "heads@0.5",
    "int8",
    "int8-dynamic",
    "laco@0.5",
    "magnitude@0.5",
    "magnitude-structured@0.5",
    "modegpt@0.4",
    "prunenet-random@0.5",
    "random@0.5",
    "shortgpt@0.5",
    "sleb@0.5",
    "slice@0.5",
    "slicegpt@0.5",
    "sparsegpt@0.5",
    "svd-llm@0.4",
    "wanda@0.5",
)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DECODERS, *OTHERS])
def test_every_method_streams_on_every_decoder(family: str, tmp_path: Path) -> None:
    words = load("testbed/qwen2-46k")
    model = tiny(family, vocab=words.shape.vocab)
    model.tokenizer = words.tokenizer
    folder = checkpoint.save(model, tmp_path / "model")
    done = 0
    for text in EVERYWHERE:
        if identity.resolve(chains.parse(text))[0].step.refuse(model):
            continue
        whole, streamed = compressed(folder, text), compressed(folder, text, tmp_path / "scratch")
        assert streamed.done == whole.done, text
        found = dict(streamed.hf.named_parameters())
        for name, parameter in whole.hf.named_parameters():
            assert torch.equal(found[name], parameter), (text, name)
        done += 1
    assert done >= 10


def test_layouts_that_are_not_known_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.save(tiny("mixtral"), tmp_path / "model")
    monkeypatch.setattr(layouts, "MergeModulelist", Concatenate)
    with pytest.raises(
        ModelError, match=r"cannot be streamed: files of mixtral hold \.experts\.gate_up_proj in a layout"
    ):
        load(folder, stream=tmp_path / "scratch")


def test_experts_that_lack_parts_are_refused(tmp_path: Path) -> None:
    folder = checkpoint.save(tiny("mixtral"), tmp_path / "model")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj experts that are not alike"):
        load(folder, stream=tmp_path / "scratch")


def test_files_that_do_not_fit_the_config_are_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks weights that its config asks for, such as {name}"):
        load(tmp_path / "model", stream=tmp_path / "scratch")
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="other shapes than its config says"):
        load(tmp_path / "model", stream=tmp_path / "scratch")
    save_file({**tensors, "model.layers.9.weight": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"weights that its config does not know, such as model\.layers\.9"):
        load(tmp_path / "model", stream=tmp_path / "scratch")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="are one, and holds two different ones"):
        load(tmp_path / "model", stream=tmp_path / "scratch")


@pytest.mark.parametrize("family", [*DECODERS, *OTHERS])
@pytest.mark.parametrize("tied", [True, False])
def test_a_streamed_model_computes_as_a_loaded_one(family: str, tied: bool, tmp_path: Path) -> None:
    folder = checkpoint.save(tiny(family, tied=tied), tmp_path / "model")
    loaded, streamed = load(folder), load(folder, stream=tmp_path / "scratch")
    tokens = random_tokens()
    assert torch.equal(streamed.logits(tokens), loaded.logits(tokens))
    assert torch.equal(nll.token_nll(streamed, tokens, batch=5), nll.token_nll(loaded, tokens, batch=5))
    assert (streamed.fingerprint, streamed.shape, streamed.zeros()) == (
        loaded.fingerprint,
        loaded.shape,
        loaded.zeros(),
    )
    assert streamed.measured_params() == loaded.measured_params()


class TestPreflight:
    def takes(self, model: Path, text: str, stream: bool | None = None, block: int | None = None):
        parts = identity.resolve(chains.parse(text))
        how = {"calibration": "testbed/all", "rows": 4, "block": block, "device": "cpu", "dtype": None}
        return preflight(str(model), parts, stream=stream, **how)

    def test_the_length_of_calibration_rows_is_the_corpus_own(self, tmp_path: Path) -> None:
        """And never the number of positions, which a config may say in the hundred thousands."""
        large(tmp_path / "model", hidden=32, layers=2, ffn=32)
        assert self.takes(tmp_path / "model", "ffn@0.3").calibration_tokens == 4 * 64
        found = compress_model(str(tmp_path / "model"), "wanda@0.5", calibration="testbed/all", rows=2)
        assert found.config["max_position_embeddings"] == 131072

    def test_streams_what_does_not_fit(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(estimate, "free_bytes", lambda device: 10**12)
        assert not self.takes(small, "ffn@0.3").streamed
        assert self.takes(small, "ffn@0.3", stream=True).streamed
        monkeypatch.setattr(estimate, "free_bytes", lambda device: 1000)
        found = self.takes(small, "ffn@0.3")
        assert found.streamed
        assert found.peak_bytes == found.streamed_bytes
        assert not self.takes(small, "ffn@0.3", stream=False).streamed
        # What cannot be streamed is tried whole: the estimate may be wrong by a factor of two.
        found = self.takes(small, "ffn@0.3 | lora@1k")
        assert not found.streamed
        assert (
            found.cannot_stream
            == "lora cannot be streamed: it trains the model, and each of its many steps goes through all blocks"
        )
        monkeypatch.setattr(estimate, "free_bytes", lambda device: None)
        assert not self.takes(small, "ffn@0.3").streamed

    def test_of_a_large_model_a_few_blocks_are_held(self, tmp_path: Path) -> None:
        n_bytes = large(tmp_path / "model", hidden=128, layers=60, ffn=128)
        found = self.takes(tmp_path / "model", "rtn@4")
        assert found.n_bytes == n_bytes
        assert found.streamed_bytes < n_bytes / 4 < n_bytes * 2 < found.whole_bytes
        assert found.scratch_bytes == 0
        assert self.takes(tmp_path / "model", "rtn@4", stream=True).scratch_bytes == n_bytes
        assert found.seconds is not None
        assert found.seconds > 0
        looks = {text: self.takes(tmp_path / "model", text).tokens for text in ("shortgpt@0.1", "sleb@0.1", "laco@0.1")}
        assert looks["shortgpt@0.1"] == 2 * found.calibration_tokens
        # Six blocks go one after another, each the best of what is left: 60 to 55 tries of as many blocks but one.
        tries = sum((left + 1) * left for left in range(54, 60)) / 60 + 1
        assert looks["sleb@0.1"] == round(tries * found.calibration_tokens)
        assert looks["laco@0.1"] > looks["shortgpt@0.1"]


def test_free_memory_is_within_the_limits_of_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import resource, mariotte.models.hardware as h\n"
            "print(h.free_bytes())\n"
            "resource.setrlimit(resource.RLIMIT_DATA, (h.stated_bytes('/proc/self/status', 'VmData') + 10**8,) * 2)\n"
            "print(h.free_bytes())",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert after <= min(before, 10**8)

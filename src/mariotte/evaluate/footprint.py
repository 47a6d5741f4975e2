"""What a model takes up: its tensors counted, and a process of its own that loads it, runs it and is watched.

Run as a program with a folder as its argument, this file is that process: see `watched`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.modeling_outputs import BaseModelOutput

import mariotte
from mariotte.errors import MariotteError, ModelError
from mariotte.models.checkpoint import save
from mariotte.models.load import load
from mariotte.models.model import Model

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux says what a process has in memory, and where it is told to forget the peak."""

PAGE = 4096
"""Bytes that the system gives at least."""

RETURNED_FROM = 1 << 16
"""Bytes from which a block that is freed goes back to the system at once."""

LOADING, REHEARSING, PREFILL, DECODE = "loaded the model", "rehearsed", "read the prompt", "wrote tokens"

_NO_ROOM = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch's allocators say, whatever class of error they raise."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What was in memory at most, in bytes; None for what a model has not.

    Parameters
    ----------
    prefill : while the prompt was read, weights included
    decode : while tokens were written, weights and cache included; None for a model that writes none
    loaded : parameters and buffers, shared ones once
    cache : of the cache's tensors at the end
    cached : tokens in it, all sequences together
    cross : likewise of what a decoder keeps of the encoder's tokens
    crossed : encoder tokens in it
    load : until the model was loaded; None where it was not watched
    baseline : of the process without the model, which the others do not include; None where there is none
    """

    prefill: int
    decode: int | None
    loaded: int
    cache: int | None = None
    cached: int | None = None
    cross: int | None = None
    crossed: int | None = None
    load: int | None = None
    baseline: int | None = None


class Gauge(Protocol):
    """What knows how much memory is taken."""

    def reset(self) -> None:
        """Forget the peak so far."""
        ...

    def peak(self) -> int:
        """Bytes at most since then."""
        ...


def _plain(values: Iterable[object]) -> Iterator[Tensor]:
    """The ordinary tensors inside of tensors, packed parameters and tuples."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _plain(cast("tuple[object, ...]", value))
        elif isinstance(value, Tensor):
            if is_traceable_wrapper_subclass(value):
                names, _ = value.__tensor_flatten__()
                yield from _plain(getattr(value, name) for name in names)
            else:
                yield value


def tensor_bytes(values: Iterable[object]) -> int:
    """Bytes of tensors, each once however often it comes.

    Parameters
    ----------
    values : tensors, or tuples of them; of a quantized tensor its integers and its scales count
    """
    found: dict[tuple[object, ...], Tensor] = {}
    # All kept while others are counted: a place in memory that is free is given away again.
    for tensor in _plain(values):
        found[tensor.data_ptr(), tensor.shape, tensor.dtype] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def stored_bytes(hf: nn.Module) -> int:
    """Bytes of the tensors of a checkpoint, without the header of its file."""
    return tensor_bytes(hf.state_dict().values())


def loaded_bytes(hf: nn.Module) -> int:
    """Bytes of parameters and buffers in memory, packed ones and those that no checkpoint keeps included."""
    return tensor_bytes((*hf.parameters(), *hf.buffers(), *hf.state_dict().values()))


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of the keys and values of a transformers cache, and tokens in it, all sequences together."""
    layers: list[Any] = list(cache.layers)
    keys_BKTH: Tensor = layers[0].keys
    return (
        tensor_bytes(tensor for layer in layers for tensor in (layer.keys, layer.values)),
        keys_BKTH.shape[0] * int(cache.get_seq_length()),
    )


@torch.inference_mode()
def run(model: Model, prompt_BT: Tensor, new: int, gauge: Gauge, stage: Callable[[str], None]) -> Peaks:
    """Read a prompt, then write tokens greedily with the cache, never stopping early; the gauge is asked after each.

    Parameters
    ----------
    model : one that only fills in masks reads, and writes nothing
    prompt_BT : (B, T) token ids
    new : forward passes of one token each, after the prompt's
    stage : told what begins
    """
    given: dict[str, Any] = {"input_ids": prompt_BT}
    if model.kind != "masked":
        given |= {"use_cache": True}
    if model.kind == "causal":
        given |= {"logits_to_keep": 1}  # others give logits of all positions whatever is asked
    if model.kind == "seq2seq":
        start = model.hf.config.decoder_start_token_id
        given |= {"decoder_input_ids": torch.full_like(prompt_BT[:, :1], int(start or 0))}
    stage(PREFILL)
    gauge.reset()
    out = model.hf(**given)
    prefill, loaded = gauge.peak(), loaded_bytes(model.hf)
    if model.kind == "masked":
        return Peaks(prefill=prefill, decode=None, loaded=loaded)
    stage(DECODE)
    # Nothing of the prompt's pass but its cache, and what a decoder reads of the encoder, is kept while it writes.
    last_B1, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    read: dict[str, Any] = {}
    if model.kind == "seq2seq":
        read = {"encoder_outputs": BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)}
    del out
    gauge.reset()
    for _ in range(new):
        given = {"decoder_input_ids" if read else "input_ids": last_B1, **read}
        if not read:
            given |= {"logits_to_keep": 1}
        last_B1 = model.hf(**given, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    decode = gauge.peak()
    cross = crossed = None
    if read:
        cross, crossed = cache_bytes(cache.cross_attention_cache)
        cache = cache.self_attention_cache
    cached, tokens = cache_bytes(cache)
    return Peaks(
        prefill=prefill, decode=decode, loaded=loaded, cache=cached, cached=tokens, cross=cross, crossed=crossed
    )


def prompt(model: Model, batch: int, length: int) -> Tensor:
    """(batch, length) uniform token ids, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.shape.vocab, (batch, length), generator=generator)


# A GPU: its allocator counts to the byte.


@dataclass(frozen=True)
class Allocator:
    """torch's allocator of a CUDA device: what it gave beyond what was there before, and the model itself.

    Parameters
    ----------
    device : which one
    before : bytes allocated when nothing was run yet: this model and all others
    loaded : bytes of this model alone
    """

    device: torch.device
    before: int
    loaded: int

    def reset(self) -> None:
        """Forget the peak so far."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes at most since then."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before + self.loaded


def allocated(model: Model, batch: int, length: int, new: int) -> Peaks:
    """Run a model that lies on a CUDA device and ask the device's allocator.

    A rehearsal of the same size goes first: libraries take workspaces when they are first used, once for all models.

    Raises
    ------
    ModelError
        When the device has not the memory.
    """
    prompt_BT = prompt(model, batch, length).to(model.device)
    at = REHEARSING

    def stage(name: str) -> None:
        nonlocal at
        at = name

    try:
        run(model, prompt_BT, 1, Allocator(model.device, 0, 0), lambda name: None)
        gc.collect()
        loaded = loaded_bytes(model.hf)
        gauge = Allocator(model.device, torch.cuda.memory_allocated(model.device), loaded)
        return run(model, prompt_BT, new, gauge, stage)
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(_no_room(str(model.device), at)) from error


def _no_room(where: str, at: str) -> str:
    return f"memory: {where} has not enough memory, it ran out while it {at}: ask for a smaller batch or prompt"


# A CPU: a process of its own, whose resident memory the system counts.


class Resident:
    """The resident memory of this process, less what was there before."""

    def __init__(self) -> None:
        self.baseline = 0
        self.baseline = self._read("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far."""
        RESET.write_text("5")

    def peak(self) -> int:
        """Bytes at most since then."""
        return self._read("VmHWM") - self.baseline

    @staticmethod
    def _read(key: str) -> int:
        for line in STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
        raise ModelError(f"memory: {STATUS} must state {key}, and does not: measure on Linux, or on a GPU")


def watchable() -> bool:
    """Whether this system says what a process had in memory at most, and can be told to forget it."""
    return STATUS.is_file() and os.access(RESET, os.W_OK)


def _settle() -> None:
    """Give back everything that is free."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library than glibc keeps little
        ctypes.CDLL(None).malloc_trim(0)


def _touch(hf: nn.Module) -> None:
    """Read a byte of every page: weights may be mapped from their file, and are in memory only where they were read."""
    for tensor in _plain((*hf.parameters(), *hf.buffers())):
        storage = tensor.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(storage)[::PAGE].sum()  # pyright: ignore[reportUnknownMemberType]


def _watch(job: Mapping[str, Any], stage: Callable[[str], None]) -> Peaks:
    """Load a checkpoint and run it; in a process that is there for nothing else.

    Everything is done once before it counts: code is loaded, and libraries take what they keep. The baseline is this
    process when that model is gone again.
    """
    gauge = Resident()

    def loaded() -> Model:
        stage(LOADING)
        model = load(job["checkpoint"], "cpu", job["dtype"])
        _touch(model.hf)
        return model

    model = loaded()
    prompt_BT = prompt(model, job["batch"], job["prompt"])
    run(model, prompt_BT, 1, gauge, stage)
    del model
    _settle()
    gauge = Resident()
    gauge.reset()
    model = loaded()
    load_peak = gauge.peak()
    _settle()
    found = run(model, prompt_BT, job["new"], gauge, stage)
    return Peaks(**{**asdict(found), "load": load_peak, "baseline": gauge.baseline})


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however it went: nobody would read what it finds."""
    os.read(0, 1)  # the descriptor: a lock of sys.stdin would be held when this process ends by itself
    os._exit(1)


def main(folder: Path) -> None:
    """Do the job in a folder as the process that is there for it alone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Where memory runs out, the system ends this process rather than the one that waits for it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(1)
    perform(folder)


def perform(folder: Path) -> None:
    """Do the job in a folder, and write what was found, or a sentence that says why not, beside it."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    at = LOADING

    def stage(name: str) -> None:
        nonlocal at
        at = name
        (folder / "stage").write_text(name, encoding="utf-8")

    found: dict[str, Any]
    try:
        found = asdict(_watch(job, stage))
    except MariotteError as error:
        found = {"error": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in _NO_ROOM):
            raise
        found = {"error": _no_room("this machine", at)}
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def watched(model: Model, batch: int, length: int, new: int) -> Peaks:
    """Save a model, and let a process of one thread load and run it, whose resident memory is watched.

    Nothing of this process is in the numbers: neither its own memory nor that of other models.

    Raises
    ------
    ModelError
        When the model cannot be saved, or the process fails or is killed.
    """
    with tempfile.TemporaryDirectory(prefix="mariotte-") as scratch:
        folder = Path(scratch)
        bare = Model(
            model.hf, None, name=model.name, fingerprint=model.fingerprint, stored_dtype=model.stored_dtype
        )  # a tokenizer has no part in it, and its vocabulary would weigh more than a small model
        dtype = str(model.hf.dtype).removeprefix("torch.")
        checkpoint = save(bare, folder / "checkpoint")
        job = {"checkpoint": str(checkpoint), "dtype": dtype, "batch": batch, "prompt": length, "new": new}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        return Peaks(**_child(folder))


def _environment() -> dict[str, str]:
    package = str(Path(mariotte.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        # What glibc keeps of freed memory depends on everything that was freed before: it keeps nothing of any size.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(RETURNED_FROM),
        "MALLOC_TRIM_THRESHOLD_": str(RETURNED_FROM),
    }


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-P", "-m", __name__, str(folder)]


def _child(folder: Path) -> dict[str, Any]:
    """What the process found that does the job in `folder`."""
    with (folder / "stderr").open("w+b") as said:
        # Its standard input stays open as long as this process lives: that is how it knows.
        process = subprocess.Popen(
            _command(folder), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, env=_environment()
        )
        try:
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            cast(Any, process.stdin).close()
    stage, found = folder / "stage", folder / "found.json"
    at = stage.read_text(encoding="utf-8") if stage.is_file() else LOADING
    if code == 0 and found.is_file():
        results = cast("dict[str, Any]", json.loads(found.read_text(encoding="utf-8")))
        if "error" in results:
            raise ModelError(results["error"])
        return results
    if code == -signal.SIGKILL:
        raise ModelError(
            f"memory: the process that was measured was killed while it {at}, most likely because this machine has "
            "not enough memory: ask for a smaller batch or prompt"
        )
    lines = (folder / "stderr").read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    raise ModelError(
        f"memory: the process that was measured ended with code {code} while it {at}: {last[:300]}; "
        "please report it with the model and the chain"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

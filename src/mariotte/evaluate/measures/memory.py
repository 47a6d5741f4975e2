"""Memory: what a model takes up while it reads and while it writes, its own bytes, and a token's in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from mariotte.architectures import Kind, Shape
from mariotte.data.tokens import check_block
from mariotte.errors import ChainError, ModelError
from mariotte.evaluate.base import Measure, Measurement, MetricKind
from mariotte.evaluate.footprint import RETURNED_FROM, Peaks, allocated, stored_bytes, watchable, watched
from mariotte.models.hardware import hardware
from mariotte.models.model import Model

__all__ = ["Memory"]


def kv_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes that one token of one sequence takes up in the cache: a key and a value of K heads, every layer.

    Parameters
    ----------
    shape : of the model
    itemsize : bytes of a number
    """
    return sum(shape.heads_of(layer)[1] * sum(shape.widths_of(layer)) for layer in range(shape.layers)) * itemsize


@dataclass(frozen=True, kw_only=True)
class Memory(Measure):
    """Bytes in memory at most while a prompt is read (prefill) and while tokens are written after it (decode).

    Parameters
    ----------
    on : random: uniform token ids; what the tokens are takes up no memory
    batch : sequences at once
    prompt : tokens of each that are read in one pass
    new : tokens of each that are then written, one pass each, greedily with the cache and without an early stop

    Notes
    -----
    ``prefill_peak_bytes`` and ``decode_peak_bytes`` are what must be free for the model to run: weights, activations
    and cache, each peak by itself. On a GPU they are torch's allocator's, to the byte, less what other models in the
    same process take up; memory that the allocator holds without using it, and that of the CUDA context, is not in
    them. On a CPU the model is saved, and a process of one thread loads and runs it: the peaks are its resident memory
    less the baseline, which is the same process after a rehearsal of the same size whose model is gone again, so that
    code and what libraries keep for all models are not in them. There the C library is told to return every freed block
    of 64 KiB or more at once; what is left of its habits and pages is some tens of kilobytes, which differ between
    runs: the protocol says so, and such a record's numbers have no part in its fingerprint. With habits of their own,
    programs take up more. Loading is not in the peaks; the details say what it took up.

    ``loaded_bytes`` are parameters and buffers in memory, ``stored_bytes`` those of a checkpoint in the dtype that is
    computed in, shared ones once. Weights that are zero take up what others do, on disk and in memory: unstructured
    pruning saves nothing here.

    ``kv_bytes_per_token`` is what one token of one sequence adds to the cache, measured from the cache's tensors; the
    details have beside it what shapes alone say. The two are equal unless layers forget tokens, as a sliding window
    does. An encoder has neither a cache nor a decode peak, and its numbers have neither. Of an encoder-decoder,
    prefill is the encoder's pass and the decoder's first, and the cache is that of its own tokens; what it keeps of the
    encoder's is in the details.
    """

    on: str = "random"
    batch: int = 1
    prompt: int = 64
    new: int = 16

    metrics: ClassVar = {
        "prefill_peak_bytes": "size",
        "decode_peak_bytes": "size",
        "loaded_bytes": "size",
        "stored_bytes": "size",
        "kv_bytes_per_token": "size",
    }

    def __post_init__(self) -> None:
        if self.on != "random":
            raise ChainError(f"memory is measured on random tokens, got {self.on!r}: write memory:random")
        for name, value in (("batch", self.batch), ("prompt", self.prompt), ("new", self.new)):
            if value < 1:
                raise ChainError(f"memory: {name} must be at least 1, got {value}")

    @property
    @override
    def finds(self) -> Mapping[str, MetricKind]:
        return self.metrics

    @property
    @override
    def tokens(self) -> int:
        return self.batch * (2 * self.prompt + self.new + 1)  # the rehearsal writes one

    @override
    def whole(self, kind: Kind) -> str | None:
        return "finds what a model takes that is loaded whole: measure it where that fits into memory"

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        longest = max(self.prompt, self.new + 1) if model.kind == "seq2seq" else self.prompt + self.new
        check_block(self.prompt if model.kind == "masked" else longest, model, "memory")
        device = model.device.type
        if device not in ("cpu", "cuda"):
            raise ModelError(f"memory is measured on cpu or cuda, got a model on {device}: load it on one of them")
        if device == "cpu" and not watchable():
            raise ModelError(
                "memory: on a CPU peaks are read in /proc, which this system does not have: measure on Linux, or on a "
                "GPU with --device cuda"
            )
        found: dict[str, Any] = {
            "repeatable": False,
            "tokens": self.on,
            "batch": self.batch,
            "prompt": self.prompt,
            "new": self.new,
            "decoding": "greedy, with a cache, no early stop",
            "device": device,
            "hardware": hardware(model.device),
            "dtype": str(model.hf.dtype).removeprefix("torch."),
            "attention": str(model.hf.config._attn_implementation),  # pyright: ignore[reportPrivateUsage]
            "rehearsal": "prefill and one token, of the same size",
        }
        if device == "cuda":
            return {**found, "gauge": "allocator", "baseline": "what was allocated before, this model excepted"}
        return {
            **found,
            "gauge": "resident memory of a process of its own",
            "baseline": "the process after the rehearsal, its model gone",
            "returned_from": RETURNED_FROM,
            "threads": 1,
        }

    @override
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        protocol = self.protocol(model)
        peaks = (allocated if model.device.type == "cuda" else watched)(model, self.batch, self.prompt, self.new)
        metrics: dict[str, float] = {
            "prefill_peak_bytes": peaks.prefill,
            "loaded_bytes": peaks.loaded,
            "stored_bytes": stored_bytes(model.hf),
        }
        details: dict[str, Any] = {
            "prefill": {"beyond_model": peaks.prefill - peaks.loaded},
            "load_peak_bytes": peaks.load,
            "baseline_bytes": peaks.baseline,
        }
        if peaks.decode is not None:
            metrics["decode_peak_bytes"] = peaks.decode
            details["decode"] = {"beyond_model": peaks.decode - peaks.loaded}
        if peaks.cache is not None and peaks.cached:
            metrics["kv_bytes_per_token"] = peaks.cache / peaks.cached
            details["cache"] = self._cache(model, peaks)
        return Measurement(metrics=metrics, protocol=protocol, details=details)

    def _cache(self, model: Model, peaks: Peaks) -> dict[str, Any]:
        found: dict[str, Any] = {
            "bytes": peaks.cache,
            "tokens": peaks.cached,
            "kv_bytes_per_token_from_shapes": kv_bytes(model.shape, model.hf.dtype.itemsize),
        }
        if peaks.cross is not None and peaks.crossed:
            found |= {"cross_bytes": peaks.cross, "cross_bytes_per_token": peaks.cross / peaks.crossed}
        return found

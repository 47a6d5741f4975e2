"""How fast a shape decodes on a machine that ``mariotte doctor --bench`` has measured: a roofline of three numbers."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from mariotte.accounting import BYTES, count_shape
from mariotte.architectures import Shape
from mariotte.errors import MariotteError
from mariotte.shapes import Left, Sized, cache_bytes_per_token

FORMAT = 1

OPERATIONS = 70
"""Of a block's forward pass, each with its call; about what blocks of Llama and Qwen2 have, as in dry runs."""

TRAINING = 3.0
"""A step of training costs about three forward passes: forward, and two products a weight backward."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a machine does at most.

    Parameters
    ----------
    machine : processor and, beside it, the device: ``cpu`` or what the accelerator is called
    device : ``cpu``, ``cuda`` ...
    dtype : in which it was measured
    threads : of torch on a processor
    flops_per_s : multiplications and additions of large matrices
    bytes_per_s : read from memory while a large matrix meets one vector
    operation_s : of the smallest operation, with its call
    block_s, step_s : what a decoding step of a tiny model takes for each block, and beside all blocks; None in
        calibrations of earlier versions
    measured : UTC, ISO 8601
    """

    machine: str
    device: str
    dtype: str
    threads: int
    flops_per_s: float
    bytes_per_s: float
    operation_s: float
    measured: str
    block_s: float | None = None
    step_s: float | None = None


def calibration_file() -> Path:
    """Where calibrations of this user's machines are: ``MARIOTTE_CACHE``, or ``mariotte`` in the user's cache."""
    given = os.environ.get("MARIOTTE_CACHE")
    if given:
        return Path(given) / "speed.json"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "mariotte" / "speed.json"


def processor() -> str:
    """Name of this machine's processor, with its number of cores: what a calibration belongs to."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} x {os.cpu_count() or 1}"


def read_calibrations() -> dict[str, Calibration]:
    """All calibrations by processor and device; none where nothing was measured.

    Raises
    ------
    MariotteError
        When the file is damaged or of a newer layout.
    """
    file = calibration_file()
    if not file.is_file():
        return {}
    try:
        stored = cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
        if stored["format"] != FORMAT:
            raise ValueError(f"layout {stored['format']!r}, this version reads {FORMAT}")
        found = {key: Calibration(**values) for key, values in stored["calibrations"].items()}
        for one in found.values():
            if not all(math.isfinite(v) and v > 0 for v in (one.flops_per_s, one.bytes_per_s, one.operation_s)):
                raise ValueError("speeds must be above 0")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MariotteError(
            f"the calibration of speed {file} cannot be read ({error}): run 'mariotte doctor --bench' to write it again"
        ) from error
    return found


def find_calibration(device: str = "cpu") -> Calibration | None:
    """The calibration of this machine's device, None where it was not measured.

    Raises
    ------
    MariotteError
        When the file is damaged.
    """
    return read_calibrations().get(_key(device))


def write_calibration(calibration: Calibration) -> Path:
    """Keep a calibration of this machine, in place of an earlier one of the same device; where it is."""
    file = calibration_file()
    try:
        known = read_calibrations()
    except MariotteError:
        known = {}  # what is damaged is written again, as the message advises
    known[_key(calibration.device)] = calibration
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "calibrations": {k: asdict(v) for k, v in known.items()}}, indent=1)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(file)
    return file


def _key(device: str) -> str:
    return f"{processor()} | {device.partition(':')[0]}"


def decode_seconds(model: Sized, left: Left, context: int, batch: int, calibration: Calibration) -> float:
    """Seconds of one decoding step of `batch` sequences with `context` tokens in the cache.

    Notes
    -----
    The larger of what memory and what arithmetic take, and the calls of operations beside it. Memory reads the weights
    of the blocks and the head once, and the cache; a table of embeddings that is not the head gives one row a token and
    costs nothing. Quantized weights are read packed, as kernels for them do.
    """
    shape = left.shape
    scale = BYTES[calibration.dtype] / BYTES[model.dtype]
    table = 0 if shape.tied else shape.vocab * shape.embedding_size * BYTES[model.dtype]
    quantized = left.bits is not None
    weights = (left.n_bytes - table) * (1.0 if quantized else scale)
    cache = context * batch * cache_bytes_per_token(shape, BYTES[calibration.dtype])
    flops = batch * count_shape(shape, context=context).flops_per_token
    return max((weights + cache) / calibration.bytes_per_s, flops / calibration.flops_per_s) + _calls(
        shape, calibration
    )


def prompt_seconds(shape: Shape, tokens: int, calibration: Calibration) -> float:
    """Seconds of reading a prompt of so many tokens: arithmetic, and the calls of operations beside it."""
    flops = tokens * count_shape(shape, context=tokens // 2).flops_per_token
    return flops / calibration.flops_per_s + _calls(shape, calibration)


def _calls(shape: Shape, calibration: Calibration) -> float:
    """Seconds of the calls of one forward pass, however little they compute: a matrix that is a product takes two."""
    products = sum(rank > 0 for ranks in shape.ranks or () for rank in ranks) * calibration.operation_s
    if calibration.block_s is None or calibration.step_s is None:
        return shape.layers * OPERATIONS * calibration.operation_s + products
    return shape.layers * calibration.block_s + calibration.step_s + products


def training_seconds(shape: Shape, tokens: float, calibration: Calibration) -> float:
    """Seconds of training on `tokens`, of arithmetic alone."""
    return TRAINING * count_shape(shape).flops_per_token * tokens / calibration.flops_per_s


def reading_seconds(shape: Shape, tokens: float, calibration: Calibration) -> float:
    """Seconds of a forward pass over `tokens`, of arithmetic alone."""
    return count_shape(shape).flops_per_token * tokens / calibration.flops_per_s


__all__ = [
    "Calibration",
    "calibration_file",
    "decode_seconds",
    "find_calibration",
    "processor",
    "prompt_seconds",
    "read_calibrations",
    "reading_seconds",
    "training_seconds",
    "write_calibration",
]

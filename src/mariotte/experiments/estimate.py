"""What a study will cost, before anything of it is done: time, memory and disk.

An estimate, not a promise: multiplications are counted from shapes and divided by what this machine reaches on
matrices of these sizes; small models, which wait more than they multiply, by the time of their operations. Expect a
factor of two. When the store holds records of the study, what they took is used instead.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mariotte import accounting, architectures
from mariotte.accounting import Counts
from mariotte.architectures import Shape
from mariotte.data import corpora
from mariotte.errors import ChainError, ModelError
from mariotte.evaluate.base import Measure
from mariotte.experiments import identity
from mariotte.experiments.identity import Part
from mariotte.experiments.study import Study
from mariotte.experiments.tree import Node, grow
from mariotte.locate import read_config
from mariotte.models.hardware import free_bytes, resident_bytes
from mariotte.models.load import find_device, find_dtype, locate, weight_files
from mariotte.models.packed import is_packed
from mariotte.models.step import Step
from mariotte.models.streaming import BLOCKS_HELD
from mariotte.store.record import Record

_OPERATIONS = 70
"""Of a block's forward pass, each with its call from Python; about what Llama and Qwen2 blocks have."""

_EFFICIENCY = 0.5
"""What a whole pass reaches of the speed of its matrices alone: the rest is softmax, norms and logits. Measured on the
testbed's models of 0.1M to 2.3M parameters, one thread."""

_BACKWARD = 4.0
"""A training step costs about four forward passes: three by its multiplications, and adapters and optimizer besides;
measured on the same models."""

_AT_ONCE = 4096
"""Tokens of one call in an evaluation."""

_ROW, _ROWS = 64, 4
"""Tokens of a training row and rows of a step, where nothing else is known."""

_PREPARED_BYTES = 16
"""Kept on disk by a preparation for every parameter of the blocks: factors and products in float64."""

_TRUNK_BYTES = 12
"""Kept for every trained parameter where an amount leaves a trunk: the parameter and two moments, float32."""

_ADAPTER_SHARE = 0.1
"""Trained parameters of a recovery with adapters, of the model's, at most; full training keeps all."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a study is expected to take on this machine.

    Parameters
    ----------
    flops : floating-point operations, two a multiplication, of the work as the study shares it; None as below
    seconds : of the whole study with its workers, None when no model's config could be read, or when the study's device
        is not here and nothing of it was measured
    unshared_seconds : of one process, with every chain run alone: its own load, dense evaluation and preparation; None
        when the device is not here
    measured : whether the times of records of this study are in it
    memory_bytes : of one worker at its largest model: dense, one copy a level of the tree, gradients and moments
    disk_bytes : preparations and trunks at their largest, until the study is complete
    kept_bytes : checkpoints that the study keeps
    unknown : models whose config is not here, and which are not in the numbers
    """

    flops: float | None
    seconds: float | None
    unshared_seconds: float | None
    measured: bool
    memory_bytes: int
    disk_bytes: int
    kept_bytes: int
    unknown: tuple[str, ...]


@functools.lru_cache(maxsize=32)
def multiplications_per_second(hidden: int, ffn: int, device: str) -> float:
    """What one thread of this machine reaches on a matrix of these sizes and 256 tokens, in FLOP/s."""
    x_MD, w_DF = torch.randn(256, hidden, device=device), torch.randn(hidden, ffn, device=device)
    return 2.0 * 256 * hidden * ffn / _seconds_of(lambda: x_MD @ w_DF, device)


@functools.lru_cache(maxsize=4)
def operation_seconds(device: str) -> float:
    """What the smallest operation costs here, in seconds."""
    x = torch.randn(8, 8, device=device)
    return _seconds_of(lambda: x + x, device, repeat=64)


def _seconds_of(operation: Any, device: str, repeat: int = 1) -> float:
    on_gpu = torch.device(device).type == "cuda"
    # On a processor its own time, so that an estimate does not depend on what else the machine is doing just now.
    clock = time.perf_counter if on_gpu else time.thread_time
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if not on_gpu else threads)
    found: list[float] = []
    try:
        for _ in range(5):
            began = clock()
            for _ in range(repeat):
                operation()
            if on_gpu:
                torch.cuda.synchronize()
            found.append((clock() - began) / repeat)
    finally:
        torch.set_num_threads(threads)
    return min(found)


def forward_seconds(shape: Shape, tokens: float, at_once: float, device: str) -> float:
    """A forward pass over `tokens`, `at_once` in one call."""
    flops = accounting.count_shape(shape).flops_per_token * tokens
    calls = tokens / at_once
    waiting = calls * shape.layers * _OPERATIONS * operation_seconds(device)
    return flops / (_EFFICIENCY * multiplications_per_second(shape.hidden, shape.ffn, device)) + waiting


def _flops(per_token: float, tokens: float, at_once: float) -> float:
    del at_once
    return per_token * tokens


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is done of one model, in tokens that pass through it.

    Parameters
    ----------
    measures : of each, its tokens, and whether it is of all chains
    recovered : of each chain, whether it ends in a recovery
    calibration : tokens of the text that steps look at
    cuts : preparations of steps that are no recovery
    trained, alone : tokens of recovery as trunks share them, and of every chain by itself
    seeds : of everything
    """

    measures: tuple[tuple[int, bool], ...]
    recovered: tuple[bool, ...]
    calibration: int
    cuts: int
    trained: float
    alone: int
    seeds: int

    def shared(self, of_pass: Callable[[float, float], float]) -> float:
        """All of it as the tree shares it, `of_pass` saying what some tokens take, so many of them in one call."""
        text, step = self._text(of_pass), self._step(of_pass)
        return self.seeds * (self._evaluations(of_pass) + self.cuts * text + self.trained * step) + self._all(of_pass)

    def unshared(self, of_pass: Callable[[float, float], float]) -> float:
        """All of it when every chain prepares, and measures the dense model, for itself."""
        each = self._all(of_pass) + self._text(of_pass)
        chains = len(self.recovered) * each
        return self.seeds * (self._evaluations(of_pass) + chains + self.alone * self._step(of_pass))

    def _all(self, of_pass: Callable[[float, float], float]) -> float:
        return sum(of_pass(tokens, _AT_ONCE) for tokens, _ in self.measures)

    def _evaluations(self, of_pass: Callable[[float, float], float]) -> float:
        whole = self._all(of_pass)
        of_all = sum(of_pass(tokens, _AT_ONCE) for tokens, every in self.measures if every)
        return sum(of_all if recovered else whole for recovered in self.recovered)

    def _text(self, of_pass: Callable[[float, float], float]) -> float:
        return 2 * of_pass(self.calibration, _AT_ONCE)

    def _step(self, of_pass: Callable[[float, float], float]) -> float:
        return _BACKWARD * of_pass(_ROW * _ROWS, _ROW * _ROWS) / (_ROW * _ROWS)


def estimate(study: Study, configs: Mapping[str, Mapping[str, Any]], records: Iterable[Record] = ()) -> Estimate:
    """What a study will take.

    Parameters
    ----------
    study : the study
    configs : of those of its models whose config is here
    records : of this study, if some of it was run on this machine; what they cost is taken for the rest
    """
    taken: dict[str, list[float]] = {}
    for record in records:
        if record.study == study.name:
            taken.setdefault(record.model, []).append(sum(record.cost.values()))
    device, seeds = study.run.device, len(set(study.seeds))
    here = _is_here(device)
    by_model: list[float] = []
    flops = unshared = 0.0
    memory = disk = kept = 0
    for model, config in configs.items():
        measures = [(identity.resolve_measure(entry.measure), entry.of) for entry in study.measured(model)]
        shape = architectures.shape(config)
        counts = accounting.count(config)
        root = grow(identity.resolve(chain) for chain in study.expanded(model))
        nodes = list(root.walk())
        wanted = [node for node in nodes if node.wanted and node.parts]
        groups = [group for node in nodes for group in node.groups]
        calibration = 0 if study.calibration is None else study.calibration.rows * (study.calibration.block or _ROW)
        trained = sum(
            group.step.training_tokens([int(a) for a in group.children])
            for group in groups
            if group.step.family == "recovery"
        )
        alone = sum(int(part.amount) for node in wanted for part in node.parts if part.recovers)
        cuts = sum(group.step.family != "recovery" for group in groups)

        work = _Work(
            measures=tuple((measure.tokens, of == "all") for measure, of in measures),
            recovered=tuple(_recovers(node) for node in wanted),
            calibration=calibration,
            cuts=cuts,
            trained=trained,
            alone=alone,
            seeds=seeds,
        )
        flops += work.shared(partial(_flops, counts.flops_per_token))
        if model in taken:
            records_wanted = sum(sum(of == "all" or not _recovers(node) for _, of in measures) for node in wanted)
            by_model.append(median(taken[model]) * seeds * records_wanted)
        elif here:
            by_model.append(work.shared(partial(forward_seconds, shape, device=device)))
        if here:
            unshared += work.unshared(partial(forward_seconds, shape, device=device))
        depth = max((len(node.parts) for node in nodes), default=0)
        trains = any(group.step.family == "recovery" for group in groups)
        memory = max(memory, counts.n_params * 4 * (depth + 1 + (3 if trains else 0)))
        reads = study.calibration is not None
        disk += sum(_kept_by(group.step, len(group.children), counts.n_params, reads) for group in groups) * seeds
        kept += _kept(study.run.keep, wanted, counts.n_params * 4) * seeds
    workers = min(study.run.workers, max(1, len(by_model)))
    timed = len(by_model) == len(configs) > 0
    return Estimate(
        flops=flops if configs else None,
        seconds=max(sum(by_model) / workers, max(by_model)) if timed else None,
        unshared_seconds=unshared if configs and here else None,
        measured=bool(taken),
        memory_bytes=memory,
        disk_bytes=disk,
        kept_bytes=kept,
        unknown=tuple(name for name in study.models if name not in configs),
    )


def _is_here(device: str) -> bool:
    """Whether this machine can compute on a device, and so knows how fast it is."""
    try:
        find_device(device)
    except ModelError:
        return False
    return True


def _recovers(node: Node) -> bool:
    return any(part.recovers for part in node.parts)


def _kept_by(step: Step, amounts: int, n_params: int, reads: bool) -> int:
    """Bytes on disk of a preparation or a trunk; without text to read there are no factors and products to keep."""
    if step.family == "recovery":
        return round(_TRUNK_BYTES * _ADAPTER_SHARE * n_params * amounts)
    return _PREPARED_BYTES * n_params if reads else 0


def _kept(keep: str, wanted: list[Node], n_bytes: int) -> int:
    """Bytes of the checkpoints that stay, each taken as large as the share of the model that its first cut leaves."""
    if keep == "none":
        return 0
    sizes = [n_bytes * max(0.0, 1 - float(node.parts[0].amount)) for node in wanted]
    if keep == "all":
        return round(sum(sizes))
    return round(sum({node.parts[0].amount: size for node, size in zip(wanted, sizes, strict=True)}.values()))


_MOMENTS_HELD = 6
"""Second moments at once while one is worked with: itself, damped, ordered, factor, inverse, and a product."""

_MOMENT_FLOPS = 12.0
"""Operations on one of I inputs, in I³: factors, inverses, and an order found column by column, in float64."""

_MATRICES_HELD = 4
"""Of the largest matrix at once, in eight bytes a number: as float64, its scores, and what becomes of it."""

_PROBE_TOKENS = 128
"""With which a saved checkpoint is compared with what was in memory."""

_READ_AT_LEAST = 1 << 26
"""Bytes that say how fast weights are read."""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What one chain on one model is expected to take on this machine: expect a factor of two.

    Parameters
    ----------
    n_params, n_bytes : of the model, in the dtype of its files
    streamed : whether it is to be streamed
    whole_bytes, streamed_bytes : peak of memory when it is loaded whole, and when it is streamed; beside the program
    program_bytes : of this process before it
    free_bytes : that this process may still take, None when nobody says
    scratch_bytes : on disk meanwhile, the checkpoint not among them
    seconds : of the work; None when the device is not here
    cannot_stream : why the chain cannot be streamed, None when it can
    calibration_tokens : that are looked at, 0 of an evaluation
    tokens : that go through the model, about
    """

    n_params: int
    n_bytes: int
    streamed: bool
    whole_bytes: int
    streamed_bytes: int
    program_bytes: int
    free_bytes: int | None
    scratch_bytes: int
    seconds: float | None
    cannot_stream: str | None
    calibration_tokens: int
    tokens: int = 0

    @property
    def peak_bytes(self) -> int:
        """Of memory, beside the program."""
        return self.streamed_bytes if self.streamed else self.whole_bytes


def preflight(
    model: str,
    parts: Sequence[Part],
    *,
    calibration: str | None,
    rows: int,
    block: int | None,
    device: str,
    dtype: str | None,
    stream: bool | None,
) -> Preflight:
    """What a chain will take, before anything of it is done.

    Parameters
    ----------
    model : as for `mariotte.load`; its files are looked at, and a little of them is read
    parts : of the chain
    calibration, rows, block, device, dtype : as for `compress_model`
    stream : whether to stream; None streams what does not fit into memory whole, if the chain can be streamed

    Raises
    ------
    MariotteError
        When there is no such model or corpus.
    """
    folder = locate(model)
    config, files = read_config(folder), weight_files(folder)
    shape, counts = architectures.shape(config), accounting.count(config)
    width = _width(counts, device, dtype)
    length = 0
    if calibration is not None:
        length = block or min(corpora.find(calibration).block, architectures.of(config).longest(config) or 1 << 62)
    tokens = rows * length
    moment = max((part.step.moment(shape) for part in parts), default=0)
    works = (
        _MOMENTS_HELD * 8 * moment**2
        + _MATRICES_HELD * 8 * shape.hidden * max(shape.ffn, shape.heads * shape.head_dim)
        + width * min(tokens, max(_AT_ONCE, length)) * (4 * shape.hidden + 3 * shape.ffn)
    )
    stack = _block_parameters(shape, counts)
    # When results are compared, in float32: the head or as much of the blocks, and logits of two models and between.
    compared = 4 * max(shape.vocab * shape.embedding_size, BLOCKS_HELD * stack) + 3 * 4 * _PROBE_TOKENS * shape.vocab
    streamed_bytes = max(BLOCKS_HELD * stack * width + works + tokens * shape.hidden * width, compared)
    # What enters, what each step makes of it, and when it is saved a copy and two of float32 to compare.
    whole_bytes = counts.n_params * (width * (1 + len(parts)) + width + 8) + works
    reasons = _not_streamed(model, config)
    reasons += [
        f"{part.step.name()} cannot be streamed: it {reason}" for part in parts if (reason := part.step.whole())
    ]
    free = free_bytes(device)
    if stream is None:
        stream = free is not None and whole_bytes > free and not reasons
    trains = sum(float(part.amount) for part in parts if part.recovers)
    seconds = None
    if _is_here(device):
        looks = sum(part.step.passes(shape, part.amount) for part in parts if not part.recovers)
        passes = looks * tokens + 2 * _PROBE_TOKENS
        seconds = forward_seconds(shape, passes, _AT_ONCE, device)
        seconds += _BACKWARD * forward_seconds(shape, trains, _ROW * _ROWS, device) if trains else 0.0
        cubes = sum(part.step.moment(shape) ** 3 for part in parts) * shape.blocks
        seconds += _MOMENT_FLOPS * cubes / multiplications_per_second(shape.hidden, shape.ffn, device)
        # Read or written, of all weights.
        times = 2 + (4 * len(parts) + looks if stream else 1)
        seconds += times * counts.n_bytes / _bytes_per_second(files[0])
    return Preflight(
        n_params=counts.n_params,
        n_bytes=counts.n_bytes,
        streamed=stream,
        whole_bytes=whole_bytes,
        streamed_bytes=streamed_bytes,
        program_bytes=resident_bytes(),
        free_bytes=free,
        scratch_bytes=(counts.n_params * width * len(parts) if stream else 0) + 2 * 8 * moment**2 * shape.blocks,
        seconds=seconds,
        cannot_stream=next(iter(reasons), None),
        calibration_tokens=tokens,
        tokens=round(tokens * sum(part.step.passes(shape, part.amount) for part in parts if not part.recovers)),
    )


def preflight_evaluation(
    model: str, measures: Sequence[Measure], *, device: str, dtype: str | None, stream: bool | None
) -> Preflight:
    """What measuring a model will take, before anything of it is done.

    Parameters
    ----------
    model : as for `mariotte.load`; its files are looked at, and a little of them is read
    measures : of it
    device, dtype : as for `mariotte.load`
    stream : whether to stream; None streams what does not fit into memory whole, if all measures can be streamed

    Raises
    ------
    MariotteError
        When there is no such model or corpus.
    """
    folder = locate(model)
    config, files = read_config(folder), weight_files(folder)
    shape, counts, kind = architectures.shape(config), accounting.count(config), architectures.of(config).kind
    width = _width(counts, device, dtype)
    each = [measure.tokens for measure in measures]
    at_once = min(_AT_ONCE, max(each, default=0))
    # Logits as they come, without the last place, and as logarithms: the last two in float32.
    works = at_once * (shape.vocab * (width + 8) + width * (4 * shape.hidden + 3 * shape.ffn))
    block = _block_parameters(shape, counts) * width
    stream_bytes = max(min(block, max(each, default=0) * shape.hidden * width), at_once * shape.hidden * width)
    head = shape.vocab * shape.embedding_size * width
    streamed_bytes = max(BLOCKS_HELD * block, head) + stream_bytes + works
    whole_bytes = counts.n_params * width + works
    reasons = _not_streamed(model, config)
    for measure in measures:
        try:
            measure.refuse_streamed(kind)
        except ChainError as error:
            reasons.append(str(error))
    free = free_bytes(device)
    if stream is None:
        stream = free is not None and whole_bytes > free and not reasons
    seconds = None
    if _is_here(device):
        per_pass = max(1, stream_bytes // (shape.hidden * width))
        passes = sum(-(-tokens // per_pass) for tokens in each) if stream else 1
        # Once more for the fingerprint.
        seconds = (passes + 1) * counts.n_bytes / _bytes_per_second(files[0])
        seconds += sum(forward_seconds(shape, tokens, _AT_ONCE, device) for tokens in each)
    return Preflight(
        n_params=counts.n_params,
        n_bytes=counts.n_bytes,
        streamed=stream,
        whole_bytes=whole_bytes,
        streamed_bytes=streamed_bytes,
        program_bytes=resident_bytes(),
        free_bytes=free,
        scratch_bytes=0,
        seconds=seconds,
        cannot_stream=next(iter(reasons), None),
        calibration_tokens=0,
        tokens=sum(each),
    )


def _width(counts: Counts, device: str, dtype: str | None) -> int:
    """Bytes of a number as the model is computed with."""
    if dtype is not None:
        return find_dtype(dtype).itemsize
    return 4 if device == "cpu" else counts.n_bytes // counts.n_params


def _not_streamed(model: str, config: Mapping[str, Any]) -> list[str]:
    """Why the files of a model cannot be read block by block, if they cannot."""
    if not is_packed(config):
        return []
    return [f"{model} cannot be streamed: torchao packed its weights, and unpacks them all at once; load it whole"]


def _block_parameters(shape: Shape, counts: Counts) -> int:
    return (counts.attention + counts.ffn + counts.shortcuts) // shape.blocks


def _bytes_per_second(file: Path) -> float:
    """How fast weights come from a file and into another dtype."""
    began, done = time.perf_counter(), 0
    with file.open("rb", buffering=0) as content:
        # As halves, whatever they are: files that torchao packed hold kinds of numbers that are not read here.
        while done < _READ_AT_LEAST and len(piece := content.read(_READ_AT_LEAST // 16)) > 1:
            torch.frombuffer(bytearray(piece), dtype=torch.float16, count=len(piece) // 2).double()
            done += len(piece)
    return max(done, 1) / max(time.perf_counter() - began, 1e-9)

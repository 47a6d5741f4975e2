"""What a study will cost, before anything of it is done: time, memory and disk.

An estimate, not a promise: multiplications are counted from shapes and divided by what this machine reaches on
matrices of these sizes; small models, which wait more than they multiply, by the time of their operations. Expect a
factor of two. When the store holds records of the study, what they took is used instead.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from mariotte import accounting, architectures
from mariotte.architectures import Shape
from mariotte.experiments import identity
from mariotte.experiments.study import Study
from mariotte.experiments.tree import Node, grow
from mariotte.models.step import Step
from mariotte.store.record import Record

_OPERATIONS = 70
"""Of a block's forward pass, each with its call from Python; about what Llama and Qwen2 blocks have."""

_EFFICIENCY = 0.5
"""What a whole pass reaches of the speed of its matrices alone: the rest is softmax, norms and logits. Measured on the
testbed's models of 0.1M to 2.3M parameters, one thread."""

_BACKWARD = 4.0
"""A training step costs about four forward passes: three by its multiplications, and adapters and optimizer besides;
measured on the same models."""

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
    seconds : of the whole study with its workers, None when no model's config could be read
    unshared_seconds : of one process, with every chain run alone: its own load, dense evaluation and preparation
    measured : whether the times of records of this study are in it
    memory_bytes : of one worker at its largest model: dense, one copy a level of the tree, gradients and moments
    disk_bytes : preparations and trunks at their largest, until the study is complete
    kept_bytes : checkpoints that the study keeps
    unknown : models whose config is not here, and which are not in the numbers
    """

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
    by_model: list[float] = []
    unshared = 0.0
    memory = disk = kept = 0
    for model, config in configs.items():
        measures = [(identity.resolve_measure(entry.measure), entry.of) for entry in study.measured(model)]
        shape = architectures.shape(config)
        counts = accounting.count(config)
        root = grow(identity.resolve(chain) for chain in study.expanded(model))
        nodes = list(root.walk())
        wanted = [node for node in nodes if node.wanted and node.parts]
        evaluation = sum(forward_seconds(shape, measure.tokens, 4096, device) for measure, _ in measures)
        unrecovered = sum(
            forward_seconds(shape, measure.tokens, 4096, device) for measure, of in measures if of == "all"
        )
        calibration = 0 if study.calibration is None else study.calibration.rows * (study.calibration.block or _ROW)
        preparation = 2 * forward_seconds(shape, calibration, 4096, device)
        evaluations = sum(unrecovered if _recovers(node) else evaluation for node in wanted)
        groups = [group for node in nodes for group in node.groups]
        step = _BACKWARD * forward_seconds(shape, _ROW * _ROWS, _ROW * _ROWS, device) / (_ROW * _ROWS)
        trained = sum(
            group.step.training_tokens([int(a) for a in group.children])
            for group in groups
            if group.step.family == "recovery"
        )
        alone = sum(int(part.amount) for node in wanted for part in node.parts if part.recovers)
        cuts = sum(group.step.family != "recovery" for group in groups)
        shared = seeds * (evaluations + cuts * preparation + trained * step) + evaluation
        if model in taken:
            shared = (
                median(taken[model])
                * seeds
                * sum(len([of for _, of in measures if of == "all" or not _recovers(node)]) for node in wanted)
            )
        by_model.append(shared)
        unshared += seeds * (evaluations + len(wanted) * (evaluation + preparation) + alone * step)
        depth = max((len(node.parts) for node in nodes), default=0)
        trains = any(group.step.family == "recovery" for group in groups)
        memory = max(memory, counts.n_params * 4 * (depth + 1 + (3 if trains else 0)))
        disk += sum(_kept_by(group.step, len(group.children), counts.n_params) for group in groups) * seeds
        kept += _kept(study.run.keep, wanted, counts.n_params * 4) * seeds
    workers = min(study.run.workers, max(1, len(by_model)))
    return Estimate(
        seconds=max(sum(by_model) / workers, max(by_model)) if by_model else None,
        unshared_seconds=unshared if by_model else None,
        measured=bool(taken),
        memory_bytes=memory,
        disk_bytes=disk,
        kept_bytes=kept,
        unknown=tuple(name for name in study.models if name not in configs),
    )


def _recovers(node: Node) -> bool:
    return any(part.recovers for part in node.parts)


def _kept_by(step: Step, amounts: int, n_params: int) -> int:
    if step.family == "recovery":
        return round(_TRUNK_BYTES * _ADAPTER_SHARE * n_params * amounts)
    return _PREPARED_BYTES * n_params


def _kept(keep: str, wanted: list[Node], n_bytes: int) -> int:
    """Bytes of the checkpoints that stay, each taken as large as the share of the model that its first cut leaves."""
    if keep == "none":
        return 0
    sizes = [n_bytes * max(0.0, 1 - float(node.parts[0].amount)) for node in wanted]
    if keep == "all":
        return round(sum(sizes))
    return round(sum({node.parts[0].amount: size for node, size in zip(wanted, sizes, strict=True)}.values()))

"""Speed: prefill and decode apart, the dense and the compressed model by turns, and what is only noise."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.architectures import Kind
from mariotte.data.tokens import check_block
from mariotte.errors import ChainError
from mariotte.evaluate.base import Measure, Measurement, MetricKind
from mariotte.models.hardware import hardware
from mariotte.models.model import Model

__all__ = ["Speed"]

LEVEL = 0.95
"""Of the interval that decides whether a difference is noise."""

ENOUGH = 0.01
"""Half width of every interval, as a share of its median, at which more rounds would be wasted."""

WARM_UP = 2
"""Runs of each model before the first that counts: allocator, caches, clock of the processor."""

MOST_ROUNDS = 200


class Times(NamedTuple):
    """Seconds of one run of one model."""

    prefill: float
    decode: float


class Interval(NamedTuple):
    """The median of some numbers, and the interval that holds the true median."""

    median: float
    lo: float
    hi: float


def median_interval(numbers: Sequence[float]) -> Interval:
    """Median with its interval by order statistics, at least `LEVEL` whatever the distribution.

    Notes
    -----
    The k-th smallest and the k-th largest of n numbers enclose the true median unless fewer than k fall on one side of
    it, which has probability 2 P(Binomial(n, 1/2) < k). The largest such k is taken; with fewer than six numbers there
    is none, and the interval is everything. No resampling, hence no seed, and no assumption on the tails, which a busy
    machine makes long on one side.
    """
    found = sorted(numbers)
    n, missed, k = len(found), 0.0, 0
    while k < n // 2:
        missed += 2 * math.comb(n, k) / 2**n
        if missed > 1 - LEVEL:
            break
        k += 1
    lo, hi = (found[k - 1], found[-k]) if k else (-math.inf, math.inf)
    return Interval(statistics.median(found), lo, hi)


def alternate(
    runs: Sequence[Callable[[], Times]],
    *,
    seconds: float,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[Times, ...]]:
    """Run each in turn, round after round, until medians are known well or time is up.

    Parameters
    ----------
    runs : one a model; a run says how long its parts took
    seconds : no further round is begun after this long
    rounds : but at least so many are done
    clock : seconds since any moment

    Returns
    -------
    one tuple a round, in the order of `runs`

    Notes
    -----
    The order within a round is turned round every time, so that a machine that slows down or speeds up steadily
    favours neither. Rounds end when the interval of every part's ratio of the first run to the last (with one run: of
    its time) is within `ENOUGH` of its median: a rule that looks at widths only, so that it prefers no answer.
    """
    for run in runs:
        for _ in range(WARM_UP):
            run()
    found: list[tuple[Times, ...]] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall on whichever model happens to run
    try:
        started = clock()
        while len(found) < MOST_ROUNDS:
            order = range(len(runs)) if len(found) % 2 == 0 else reversed(range(len(runs)))
            times = {i: runs[i]() for i in order}
            found.append(tuple(times[i] for i in range(len(runs))))
            if len(found) < rounds:
                continue
            if clock() - started >= seconds or all(map(_known, _compared(found))):
                break
    finally:
        if collecting:
            gc.enable()
    return found


def _compared(rounds: Sequence[tuple[Times, ...]]) -> list[list[float]]:
    """Of each part the numbers, one a round, whose median is asked for."""
    if len(rounds[0]) == 1:
        return [[times[part] for (times,) in rounds] for part in range(2)]
    return [[first[part] / last[part] for first, *_, last in rounds] for part in range(2)]


def _known(numbers: Sequence[float]) -> bool:
    median, lo, hi = median_interval(numbers)
    return hi - lo <= 2 * ENOUGH * median


def verdict(speedup: Interval) -> str:
    """``faster``, ``slower``, or ``inside the noise`` when the interval holds 1."""
    if speedup.lo <= 1 <= speedup.hi:
        return "inside the noise"
    return "faster" if speedup.median > 1 else "slower"


def timer(device: torch.device, clock: str) -> Callable[[], Callable[[], float]]:
    """A function that starts timing what `device` does and gives another that waits for its end and says the seconds.

    On an accelerator both marks are events in its queue, so that the time is the device's own, and work queued
    before the start has no part in it.
    """
    if device.type != "cuda":
        now = time.perf_counter if clock == "wall" else time.thread_time

        def start_here() -> Callable[[], float]:
            began = now()
            return lambda: now() - began

        return start_here

    def start_there() -> Callable[[], float]:
        torch.cuda.synchronize(device)
        stream = torch.cuda.current_stream(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(stream)

        def stop() -> float:
            last.record(stream)
            last.synchronize()
            return first.elapsed_time(last) / 1000  # milliseconds

        return stop

    return start_there


@torch.inference_mode()
def generate(model: Model, prompt_BT: Tensor, new: int, clock: str = "wall") -> Times:
    """Read a prompt, then write `new` tokens greedily with the cache, never stopping early.

    Parameters
    ----------
    prompt_BT : (B, T) token ids
    new : forward passes of one token each, after the prompt's
    clock : wall or cpu
    """
    start = timer(model.device, clock)
    stop = start()
    out = model.hf(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    last_B1 = out.logits[:, -1:].argmax(-1)
    prefill = stop()
    stop = start()
    for _ in range(new):
        out = model.hf(input_ids=last_B1, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        last_B1 = out.logits[:, -1:].argmax(-1)
    return Times(prefill, stop())


@dataclass(frozen=True, kw_only=True)
class Speed(Measure):
    """Time to read a prompt (prefill) and to write tokens after it (decode), against the dense model.

    Parameters
    ----------
    on : random: uniform token ids, the same for both models; what the tokens are changes no time
    batch : sequences at once
    prompt : tokens of each that are read in one pass
    new : tokens of each that are then written, one pass each, greedily with the cache and without an early stop
    seconds : no further round is begun after this long
    rounds : but at least so many are done; six are the fewest that can tell anything from noise
    clock : wall: time as it passes; cpu: time for which the processor works on this, on one thread

    Notes
    -----
    A round runs the dense and the compressed model one after the other in this process, the next round in the other
    order. ``speedup_prefill`` and ``speedup_decode`` are S, the median over rounds of the dense model's time divided by
    the compressed model's: 1 means no change, 1.6 that 1.6 times as many tokens pass in a second, below 1 that the
    compressed model is slower. (1 - 1/S is the share of time saved: "60 % faster" may mean S = 1.6, or 60 % of the time
    saved, which is S = 2.5; so that S is what is stored.) The dense model has S = 1 by definition, without error.

    Tokens a second are of these rounds too, for both models: those of different hours do not compare on a busy machine.
    The details give for each part the medians and quartiles in seconds, S with its 95 % interval, the change S - 1
    with its sign, and the verdict: faster, slower, or inside the noise when the interval holds 1. Two copies of one
    model can differ by a percent or two for reasons that rounds do not average out, such as where their weights lie in
    memory. ``clock=cpu`` counts the time that the processor works for this process alone, which is the better clock on
    a machine that others use too; it needs a CPU and one thread.

    Numbers of timings cannot be repeated: the protocol says so, and such a record's numbers have no part in its
    fingerprint. Device, its name, threads and dtype are part of the protocol, so that numbers of two machines are never
    pooled. Small models spend their time between kernels rather than in them: fewer blocks make them faster, narrower
    ones hardly do until `batch` and `prompt` are large.
    """

    on: str = "random"
    batch: int = 1
    prompt: int = 64
    new: int = 16
    seconds: float = 1.0
    rounds: int = 7
    clock: str = "wall"

    metrics: ClassVar = {
        "speedup_prefill": "speed",
        "speedup_decode": "speed",
        "prefill_tokens_per_s": "speed",
        "decode_tokens_per_s": "speed",
    }

    def __post_init__(self) -> None:
        if self.on != "random":
            raise ChainError(f"speed is measured on random tokens, got {self.on!r}: write speed:random")
        for name, value, least in (("batch", self.batch, 1), ("prompt", self.prompt, 1), ("new", self.new, 1)):
            if value < least:
                raise ChainError(f"speed: {name} must be at least {least}, got {value}")
        if self.rounds < 6:
            raise ChainError(
                f"speed: rounds must be at least 6, got {self.rounds}: fewer cannot tell a difference from noise"
            )
        if not 0 <= self.seconds < math.inf:
            raise ChainError(f"speed: seconds must be 0 or more, got {self.seconds}")
        if self.clock not in ("wall", "cpu"):
            raise ChainError(f"speed: clock must be wall or cpu, got {self.clock!r}")

    @property
    @override
    def finds(self) -> Mapping[str, MetricKind]:
        return self.metrics

    @property
    @override
    def tokens(self) -> int:
        return 2 * (WARM_UP + self.rounds) * self.batch * (self.prompt + self.new)  # two models, the fewest rounds

    @override
    def whole(self, kind: Kind) -> str | None:
        return "times what a model in memory takes, and a streamed one waits for its disk: time it where it fits"

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        check_block(self.prompt + self.new, model, "speed")
        threads = torch.get_num_threads()
        if self.clock == "cpu" and (model.device.type != "cpu" or threads != 1):
            raise ChainError(
                f"speed: clock=cpu counts the work of one thread of a CPU, got {threads} on {model.device.type}: "
                "compute with one thread, or take clock=wall"
            )
        return {
            "repeatable": False,
            "tokens": self.on,
            "batch": self.batch,
            "prompt": self.prompt,
            "new": self.new,
            "decoding": "greedy, with a cache, no early stop",
            "seconds": self.seconds,
            "rounds": self.rounds,
            "warm_up": WARM_UP,
            "device": model.device.type,
            "hardware": hardware(model.device),
            "threads": threads,
            "clock": self.clock,
            "dtype": str(model.hf.dtype).removeprefix("torch."),
            "attention": str(model.hf.config._attn_implementation),  # pyright: ignore[reportPrivateUsage]
        }

    @override
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        """Measure a model alone; without the dense model beside it, only what is dense itself has a speed-up."""
        metrics, details = self._alone([own for (own,) in self._times([model])])
        if dense is None:
            metrics |= {f"speedup_{part}": 1.0 for part in Times._fields}
        return Measurement(metrics=metrics, protocol=self.protocol(model), details=details)

    @override
    def compare(self, model: Model, reference: Model, dense: Measurement) -> Measurement:
        rounds = self._times([reference, model])
        metrics, details = self._alone([own for _, own in rounds])
        base, of_dense = self._alone([own for own, _ in rounds])
        for part, ratios in zip(Times._fields, _compared(rounds), strict=True):
            found = median_interval(ratios)
            base[f"speedup_{part}"] = 1.0
            metrics[f"speedup_{part}"] = found.median
            metrics[f"speedup_{part}_se"] = _standard_error(ratios)
            details[part] |= {
                "dense_seconds": of_dense[part]["seconds"],
                "speedup": found.median,
                "interval": [found.lo, found.hi],
                "change": found.median - 1,
                "verdict": verdict(found),
            }
        # The dense model's tokens a second in these rounds: when it was measured alone, the machine was otherwise busy.
        return Measurement(metrics=metrics, protocol=self.protocol(model), details=details, base=base)

    def _times(self, models: Sequence[Model]) -> list[tuple[Times, ...]]:
        generator = torch.Generator().manual_seed(0)
        prompt_BT = torch.randint(0, models[0].shape.vocab, (self.batch, self.prompt), generator=generator)

        def run(model: Model) -> Callable[[], Times]:
            own_BT = prompt_BT.to(model.device)
            return lambda: generate(model, own_BT, self.new, self.clock)

        return alternate([run(model) for model in models], seconds=self.seconds, rounds=self.rounds)

    def _alone(self, rounds: Sequence[Times]) -> tuple[dict[str, float], dict[str, Any]]:
        """Throughput, and what it was computed from."""
        details: dict[str, Any] = {"rounds": len(rounds)}
        metrics: dict[str, float] = {}
        for part, passed, times in zip(Times._fields, (self.prompt, self.new), zip(*rounds, strict=True), strict=True):
            spread = _spread(times)
            details[part] = {"seconds": spread}
            metrics[f"{part}_tokens_per_s"] = self.batch * passed / spread["median"]
        return metrics, details


def _spread(seconds: Sequence[float]) -> Mapping[str, float]:
    """Median and quartiles."""
    first, middle, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": middle, "q1": first, "q3": third}


def _standard_error(numbers: Sequence[float]) -> float:
    """Of a median, from the median absolute deviation: right for many normal numbers, hardly moved by outliers."""
    middle = statistics.median(numbers)
    deviation = statistics.median(abs(number - middle) for number in numbers)
    return math.sqrt(math.pi / 2 / len(numbers)) * deviation / statistics.NormalDist().inv_cdf(0.75)

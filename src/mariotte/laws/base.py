"""What a law is: points go in, a stateless formula with named parameters describes them.

Shape legend: M points, P parameters of a law.
"""

from __future__ import annotations

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mariotte.errors import FitError

Array = NDArray[np.float64]
Kind = Literal["loss", "score", "speed", "size"]

FALLING: frozenset[Kind] = frozenset({"score", "size"})
"""Kinds that are lowered as more is removed; the others rise."""

COLLAPSE = 2.0
"""A loss above this many times the dense one is a collapsed model; its exact height says little."""

LIMITS: Mapping[Kind, tuple[float, float]] = {
    "loss": (0.0, 30.0),
    "score": (0.0, 1.0),
    "speed": (0.0, 1e9),
    "size": (0.0, 1e18),
}
"""Predictions are clipped to these: nats, or fractions, the hold-out protocol's own choice; speeds and sizes have no
limit."""

LARGEST = 1e100
"""Sizes of values beyond this, or dense values below its inverse, overflow in the squares that a fit sums."""

_LOSS_WORDS = re.compile(r"loss|ppl|perplexity|nats|nll|entropy|bits_per_byte|bpb")
_SPEED_WORDS = re.compile(r"speed|_per_s$|throughput")
_SIZE_WORDS = re.compile(r"(^|_)bytes(_|$)")
_BITS_WORDS = re.compile(r"bits|bpb|log_?2")


@functools.lru_cache(maxsize=1024)
def metric_kind(metric: str) -> Kind:
    """Whether compression raises the metric (a loss, a speed) or lowers it (a score, a fraction; a size)."""
    if _SPEED_WORDS.search(metric.lower()):
        return "speed"
    if _LOSS_WORDS.search(metric.lower()):
        return "loss"
    return "size" if _SIZE_WORDS.search(metric.lower()) else "score"


def metric_unit(metric: str) -> str:
    """What a metric counts, as its name says: fraction for a score, bits or nats for a loss, a rate, or bytes."""
    kind = metric_kind(metric)
    if kind == "score":
        return "fraction"
    if kind == "speed":
        return "times dense" if "speedup" in metric.lower() else "a second"
    if kind == "size":
        return "bytes"
    return "bits" if _BITS_WORDS.search(metric.lower()) else "nats"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One compressed model measured once.

    Parameters
    ----------
    value : loss in nats per token (a perplexity enters as its logarithm), score as a fraction, speed, or size in bytes
    base : the same metric of the dense model under the same protocol, same unit
    ratio : how much was compressed, below 1; what it counts is `ratio_kind`. Can be slightly negative
    ratio_kind : what `ratio` is a share of; kinds are never pooled
    metric : name of the metric; its words decide whether it is a loss, a score, a speed or a size
    protocol : everything that is part of the number; protocols are never pooled
    tokens : recovery tokens (or samples, where a source says only those), 0 for none
    params : parameters of the dense model
    bits : bits a weight where the point is quantised, None otherwise
    se : standard error of `value`, same unit
    chance : score of a guesser, for a loss that of a guesser too (ln of the vocabulary); None when unknown
    cluster : what is independent of the other clusters; None means model × method
    model, method, family : dense model, first compressing step without its amount, its pruning family
    recovery : what followed that step, empty for nothing; part of the series
    source : where the number was published, empty for our own
    """

    value: float
    base: float
    ratio: float
    ratio_kind: str
    metric: str
    protocol: str
    tokens: float = 0.0
    params: float | None = None
    bits: float | None = None
    se: float | None = None
    chance: float | None = None
    cluster: str | None = None
    model: str = ""
    method: str = ""
    family: str | None = None
    recovery: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not -1.0 < self.ratio < 1.0:
            raise FitError(f"a ratio must lie in (-1, 1), got {self.ratio:g}: give the share removed as a fraction")
        if not (math.isfinite(self.value) and math.isfinite(self.base)):
            raise FitError(
                f"a value and its base must be finite, got {self.value} and {self.base} at ratio {self.ratio:g}"
            )
        if self.base <= 0:
            raise FitError(f"the dense value of {self.metric!r} must be positive, got {self.base:g}")
        if abs(self.value) > LARGEST or not 1 / LARGEST < self.base < LARGEST:
            raise FitError(
                f"{self.metric!r} has {self.value:g} and the dense value {self.base:g}, too large or too small to "
                "compute with: correct the number or leave it out"
            )
        if not 0 <= self.tokens < math.inf:
            raise FitError(f"recovery tokens must be 0 or more, got {self.tokens:g}")
        if self.kind == "score" and not (0 <= self.value <= 1 and self.base <= 1):
            raise FitError(
                f"{self.metric!r} is read as a score and must be a fraction in [0, 1], got {self.value:g}: "
                "divide percents by 100, or name a loss so that it contains 'loss', 'ppl' or 'nats'"
            )

    @property
    def kind(self) -> Kind:
        """Whether the metric is a loss, a score, a speed or a size."""
        return metric_kind(self.metric)

    @property
    def recovered(self) -> bool:
        """Whether training followed the cut; a source's text such as "50k samples" says so where tokens are unknown."""
        return self.tokens > 0 or bool(self.source and self.recovery and not self.recovery.startswith("0 "))

    @property
    def group(self) -> str:
        """The cluster: points of different clusters are taken as independent, points of one are not."""
        return self.cluster if self.cluster is not None else f"{self.model} × {self.method}"

    @property
    def series(self) -> Series:
        """The curve over ratios that the point lies on."""
        bits = "" if self.bits is None else f"{self.bits:g}"
        return Series(
            self.model,
            self.method,
            self.metric,
            self.protocol,
            self.recovery,
            f"{self.tokens:g}",
            self.source,
            self.ratio_kind,
            bits,
        )

    @property
    def before_collapse(self) -> bool:
        """Loss at most twice the dense one; score above chance by a quarter of the dense margin; any speed or size."""
        return not collapsed(self.value, self.base, self.kind, self.chance)


class Series(NamedTuple):
    """What the points of one curve share."""

    model: str
    method: str
    metric: str
    protocol: str
    recovery: str
    tokens: str
    source: str
    ratio_kind: str
    bits: str

    def __str__(self) -> str:
        after = f" | {self.recovery}" if self.recovery else ""
        return f"{self.model} × {self.method}{after}"


def collapsed(value: float, base: float, kind: Kind, chance: float | None = None) -> bool:
    """Whether a value is beyond what laws describe; an unknown chance counts as 0, the lenient side."""
    if kind in ("speed", "size"):
        return False
    if kind == "loss":
        return value > COLLAPSE * base
    floor = chance or 0.0
    return value < floor + 0.25 * (base - floor)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The covariates of M points, as arrays.

    Parameters
    ----------
    base_M, ratio_M, tokens_M : dense value, ratio and recovery data
    params_M, bits_M, chance_M, se_M : dense parameters, bits a weight, score of a guesser and standard error of the
        value; nan where unknown
    families : pruning family of each point, None where unknown
    metrics : name of each point's metric
    recovered_M : whether training followed the cut
    series_M : number of the curve that each point lies on
    """

    base_M: Array
    ratio_M: Array
    tokens_M: Array
    params_M: Array
    bits_M: Array
    chance_M: Array
    se_M: Array
    families: tuple[str | None, ...]
    metrics: tuple[str, ...]
    recovered_M: NDArray[np.bool_]
    series_M: NDArray[np.int64]

    @classmethod
    def of(cls, points: Iterable[Point]) -> Inputs:
        """The covariates of `points`, in their order."""
        points = list(points)
        # As floats, None is nan.
        table = np.array(
            [(p.base, p.ratio, p.tokens, p.params, p.bits, p.chance, p.se) for p in points], dtype=np.float64
        ).reshape(-1, 7)
        numbers: dict[Series, int] = {}
        return cls(
            *table.T,
            families=tuple(p.family for p in points),
            metrics=tuple(p.metric for p in points),
            recovered_M=np.array([p.recovered for p in points], dtype=np.bool_),
            series_M=np.array([numbers.setdefault(p.series, len(numbers)) for p in points], dtype=np.int64),
        )

    @classmethod
    def at(
        cls,
        base: float,
        ratio: float | Array,
        tokens: float,
        *,
        params: float = math.nan,
        bits: float = math.nan,
        chance: float = math.nan,
        se: float = math.nan,
        family: str | None = None,
        metric: str = "loss",
        recovered: bool | None = None,
    ) -> Inputs:
        """One base and token count at one or several ratios, all else alike; tokens mean that it was recovered."""
        ratio_M = np.atleast_1d(np.asarray(ratio, dtype=np.float64))
        same = (np.full_like(ratio_M, value) for value in (tokens, params, bits, chance, se))
        return cls(
            np.full_like(ratio_M, base),
            ratio_M,
            *same,
            families=(family,) * len(ratio_M),
            metrics=(metric,) * len(ratio_M),
            recovered_M=np.full(len(ratio_M), tokens > 0 if recovered is None else recovered, dtype=np.bool_),
            series_M=np.zeros(len(ratio_M), dtype=np.int64),
        )


def values(points: Sequence[Point]) -> Array:
    """(M,) the measured values of points."""
    return np.array([p.value for p in points], dtype=np.float64)


@dataclass(frozen=True)
class Param:
    """A parameter of a law.

    Parameters
    ----------
    name : the paper's symbol
    typical : a plausible value for a loss: what conformance tests generate data with
    log : whether it is estimated through its logarithm (and so is positive)
    lo, hi : bounds of a search; a direct solution has none
    """

    name: str
    typical: float = 1.0
    log: bool = False
    lo: float = -math.inf
    hi: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a search for parameters ended: what a reader needs to see that it was not stopped early.

    Parameters
    ----------
    starts : from how many places it was begun
    agreeing : how many of them reached the best value of the cost, within a millionth
    spread : the largest relative difference between the parameters of those that agree; None for one
    status : why the best of them stopped, in the optimiser's words
    gradient : largest absolute component of the cost's gradient there, on the estimated scale; 0 at a bound
    """

    starts: int
    agreeing: int
    spread: float | None
    status: str
    gradient: float


@dataclass(frozen=True, eq=False)
class Estimate:
    """What an estimator found; the mechanical half of a fit.

    Parameters
    ----------
    theta : (P,) parameters as published; a parameter left out has the value at which its term vanishes
    covariance : (P, P) of the parameters on the scale they were estimated on (logarithm where `Param.log`);
        rows of parameters left out are 0; None with as many parameters as points
    dof : points minus estimated parameters
    dropped : parameters left out and why
    condition : condition number of the column-scaled design (or Jacobian)
    recipe : the estimator in words
    f_statistic, f_dof : of the regression, where the estimator is one; uncentred when it has no intercept
    given : parameters that have a value but no interval (set from elsewhere, or ended at a bound), and why
    search : how they were searched for; None for a direct solution
    """

    theta: Array
    covariance: Array | None
    dof: int
    dropped: Mapping[str, str]
    condition: float
    recipe: str
    f_statistic: float | None = None
    f_dof: tuple[int, int] | None = None
    given: Mapping[str, str] = field(default_factory=dict[str, str])
    search: Search | None = None


class Law(ABC):
    """A stateless description of a law; fitting one changes nothing here, and two of one class are equal."""

    name: ClassVar[str]
    formula: ClassVar[str]
    reference: ClassVar[str]
    """Key in references.bib, empty for a form of no single source."""
    inputs: ClassVar[tuple[str, ...]]
    """Which of base, ratio, tokens, params, bits and chance the formula uses."""
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss", "score")
    params: ClassVar[tuple[Param, ...]]
    anchored: ClassVar[bool]
    """Whether nothing removed gives back the dense value, whatever the parameters."""
    ratio_param: ClassVar[str | None]
    """The parameter without which the curve does not move with the ratio, None when it never does."""
    log_link: ClassVar[bool]
    """Whether errors are taken on the logarithm of the value."""
    baseline: ClassVar[bool] = False
    """Whether it only exists to be beaten; never chosen by ``auto``."""
    screened: ClassVar[bool] = True
    """Whether a hold-out that names no laws tries it; slow and special forms are tried where they are named."""
    defects: ClassVar[tuple[str, ...]] = ()
    """What is known to be wrong with it, one sentence each."""

    @override
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    @override
    def __hash__(self) -> int:
        return hash(type(self))

    @abstractmethod
    def f(self, theta: Array, x: Inputs) -> Array:
        """(M,) values predicted with parameters `theta` (P,), unclipped."""

    @abstractmethod
    def jac(self, theta: Array, x: Inputs) -> Array:
        """(M, P) derivatives of `f` with respect to the parameters."""

    @abstractmethod
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        """Fit the parameters to values `y_M`.

        Raises
        ------
        FitError
            When the points cannot determine them.
        """

    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        """The ratio at which the law equals `target`, in closed form; None without a closed form or a solution."""
        del theta, target, base, tokens
        return None

    def remarks(self, estimate: Estimate, x: Inputs, kind: Kind) -> list[str]:
        """What a reader of this fit must know, one sentence each; the law's own conditions among them."""
        del estimate, x, kind
        return []

"""What a plan says: options with predicted quality and price, rivals, what is not known, what to measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mariotte.plan.budget import Budget

Verdict = Literal["compress", "take the small one", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A metric of a compressed model.

    Parameters
    ----------
    metric, protocol : which
    base : of the dense model
    mean : what is expected: the median
    lo, hi : of the interval at the plan's level
    limit : the floor, None where there is none
    probability : of keeping the floor
    measured : whether it was measured, so that nothing is predicted
    """

    metric: str
    protocol: str
    base: float
    mean: float
    lo: float
    hi: float
    limit: float | None
    probability: float
    measured: bool


@dataclass(frozen=True, kw_only=True)
class Option:
    """One chain and all that is expected of it.

    Parameters
    ----------
    chain : canonical text
    quality : one forecast a metric of the budget, the first decides between options
    n_params, n_bytes, memory : after the chain; bytes as in `Budget`
    slack : parameters by which `n_params` may be off, where text decides what goes; memory is then the most it can be
    decided : what text decides, a clause each
    saving : parameters removed ÷ dense ones
    bytes_share : bytes ÷ the dense model's
    speedup, latency_s : of decoding at the budget's context and batch, None where speed is not calibrated
    recovery_tokens : of training
    gpu_hours, money : of making it, None where speed is not calibrated or the hour has no price
    probability : of keeping all floors, taken as independent
    misses : what of the budget it does not meet, besides floors
    meets : whether it meets the whole budget, floors as surely as is asked
    """

    chain: str
    quality: tuple[Forecast, ...]
    n_params: int
    n_bytes: int
    memory: int
    saving: float
    bytes_share: float
    speedup: float | None
    latency_s: float | None
    recovery_tokens: int
    gpu_hours: float | None
    money: float | None
    probability: float
    misses: tuple[str, ...]
    meets: bool
    slack: int = 0
    decided: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A smaller native model of the same family, against the best compression to its size.

    Parameters
    ----------
    model, n_params : the small model
    metric, protocol : what both are judged by
    value : of the small model, measured
    within : whether it keeps the first floor itself
    chain : the compression of the big model with at most so many parameters that is expected to do best; None where
        nothing becomes so small
    mean, lo, hi : of that compression, at the plan's level
    verdict : which is better; undecided where the interval holds the small model's value
    """

    model: str
    n_params: int
    metric: str
    protocol: str
    value: float
    within: bool
    chain: str | None
    mean: float | None
    lo: float | None
    hi: float | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A measurement that would tell something.

    Parameters
    ----------
    chain : what to measure
    gain : expected gain of the decision: share of parameters saved, or nats of the first metric
    narrows : share by which the interval of the plan's choice is expected to shrink
    why : in words
    """

    chain: str
    gain: float
    narrows: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A prediction beside the measurement that followed it.

    Parameters
    ----------
    predicted : before
    measured : after
    inside : whether the interval held
    kept : whether the floor was kept, None where there is none
    """

    predicted: Forecast
    measured: float
    inside: bool
    kept: bool | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer.

    Parameters
    ----------
    model : which
    budget : what was asked
    level : of the intervals
    n_params, n_bytes, memory : of the dense model
    options : best first: those that meet the budget, then the others by how nearly they do
    winner : the first option if it meets the budget
    rule : how options are ranked, in words
    rivals : smaller models of the family
    unknowns : what is not known, a sentence each
    experiments : what would tell most, best first
    probes : what was measured for this plan
    verified : predicted beside measured, after the winner was made
    measure : texts of the measures that the floors are of
    """

    model: str
    budget: Budget
    level: float
    n_params: int
    n_bytes: int
    memory: int
    options: tuple[Option, ...]
    winner: Option | None
    rule: str
    rivals: tuple[Rival, ...]
    unknowns: tuple[str, ...]
    experiments: tuple[Experiment, ...]
    probes: tuple[str, ...] = ()
    verified: tuple[Verified, ...] = ()
    measures: tuple[str, ...] = ()

    def plain(self) -> Mapping[str, Any]:
        """JSON values of all of it."""
        return asdict(self)

"""What a claim is, and the statistics that papers' claims share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from mariotte.store.record import Record

Array = NDArray[np.float64]
Verdict = Literal["holds", "does not hold", "not settled", "not testable here"]
T = TypeVar("T")

LEVEL = 0.95
_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of a paper and what the records say of it.

    Parameters
    ----------
    sentence : the claim, in our words, with the paper's numbers
    statistic : ours, with its interval and how many things it is of
    verdict : not settled means that the interval allows both; not testable, that the records lack what it needs
    """

    sentence: str
    statistic: str
    verdict: Verdict


class Paper(ABC):
    """The claims of one paper."""

    title: ClassVar[str]
    reference: ClassVar[str]

    @abstractmethod
    def claims(self, records: Sequence[Record]) -> list[Claim]:
        """Every claim, checked against records of any models; those of recovery and of the dense models among them."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of one method on one model and one text, without recovery, by the nominal amount.

    Parameters
    ----------
    model, method, family, measure, metric : what it is of
    base_params : of the dense model
    base : the dense value
    amount_M, removed_M, params_M, value_M : the asked amount, the share of the dense parameters removed or zeroed,
        parameters left, and the value, mean over seeds, in order of the amount
    """

    model: str
    model_type: str
    method: str
    family: str
    measure: str
    metric: str
    base_params: int
    base: float
    amount_M: Array
    removed_M: Array
    params_M: Array
    value_M: Array

    @property
    def cluster(self) -> str:
        """What cuts that are not independent share: the model and the method."""
        return f"{self.model} {self.method}"


def curves(records: Iterable[Record], measure: str, metric: str | None = None) -> list[Curve]:
    """The curves of one metric of one kind of measure, every recovery left out.

    Parameters
    ----------
    measure : its name, such as ``loss``
    metric : None takes the metric called like the measure
    """
    wanted = metric or measure
    found: dict[tuple[str, str, str], dict[float, list[Record]]] = {}
    for record in records:
        if record.recovery is not None or record.method is None or record.amount is None:
            continue
        if record.measure.split(":")[0].split("(")[0] == measure and wanted in record.metrics:
            key = (record.model, record.method, record.measure)
            found.setdefault(key, {}).setdefault(record.amount, []).append(record)
    result: list[Curve] = []
    for (model, method, text), by_amount in found.items():
        amounts = sorted(by_amount)
        first = by_amount[amounts[0]][0]

        def mean(value: Callable[[Record], float], by: Mapping[float, list[Record]] = by_amount) -> Array:
            return np.array([fmean(value(record) for record in by[amount]) for amount in sorted(by)])

        result.append(
            Curve(
                model=model,
                model_type=first.model_type,
                method=method,
                family=first.family or "",
                measure=text,
                metric=wanted,
                base_params=first.base_params,
                base=first.base[wanted],
                amount_M=np.array(amounts),
                removed_M=mean(lambda record: record.removed),
                params_M=mean(lambda record: float(record.n_params)),
                value_M=mean(lambda record: record.metrics[wanted]),
            )
        )
    return result


def grouped(things: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    """Things by key, keys in order of their first thing."""
    found: dict[str, list[T]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return found


def interval(clusters: Sequence[Sequence[T]], statistic: Callable[[Sequence[T]], float]) -> tuple[float, float]:
    """The bootstrap interval of a statistic, drawing whole clusters with replacement; seeded, 95 %."""
    random = np.random.default_rng(0)

    def pick(n: int) -> list[int]:
        return random.integers(n, size=n).tolist()

    drawn = [statistic([thing for i in pick(len(clusters)) for thing in clusters[i]]) for _ in range(_DRAWS)]
    tail = (1 - LEVEL) / 2
    finite = np.array(drawn)[np.isfinite(drawn)]
    return float(np.quantile(finite, tail)), float(np.quantile(finite, 1 - tail))


def exponent(some: Sequence[Curve]) -> float:
    """β of L = L0^α (1 + r)^β, least squares of ln L without an intercept, as the paper fits it; r is the amount."""
    design = np.concatenate(
        [np.column_stack([np.full(len(c.amount_M), np.log(c.base)), np.log1p(c.amount_M)]) for c in some]
    )
    value_M = np.concatenate([np.log(np.maximum(c.value_M, 1e-9)) for c in some])
    return float(np.linalg.lstsq(design, value_M, rcond=None)[0][1])


def power(curve: Curve) -> tuple[float, float]:
    """The logarithm of P0, and α, of L = L0 P0 (1 - r)^α, least squares of ln L; r is the amount."""
    design = np.column_stack([np.ones_like(curve.amount_M), np.log1p(-curve.amount_M)])
    target_M = np.log(np.maximum(curve.value_M, 1e-9) / curve.base)
    level, alpha = np.linalg.lstsq(design, target_M, rcond=None)[0]
    return float(level), float(alpha)


def contains(low: float, high: float, value: float) -> Verdict:
    """Whether an interval holds a value."""
    return "holds" if low <= value <= high else "does not hold"


def below(low: float, high: float, value: float) -> Verdict:
    """Whether an interval lies below a value."""
    return "holds" if high < value else "does not hold" if low > value else "not settled"


def missing(sentence: str, what: str) -> Claim:
    """A claim that the records cannot answer, and why."""
    return Claim(sentence=sentence, statistic=f"no {what} among the records", verdict="not testable here")

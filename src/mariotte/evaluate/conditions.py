"""What a comparison may not exceed: ``loss > +3%`` as a condition on the change of a metric."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mariotte.errors import ChainError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_WRITTEN = re.compile(
    # Signs may stand within the brackets of a measure alone: `loss:x(rows=4).loss > +3%`.
    r"\s*(?P<metric>[^\s<>=()](?:[^<>=()]|\([^<>()]*\))*?)\s*(?P<sign><=|>=|<|>)\s*"
    r"(?P<number>[+\-\N{MINUS SIGN}]\s*(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>%|pp)?\s*"
)


@dataclass(frozen=True)
class Condition:
    """A condition on the change of a metric from the base to the other model.

    Parameters
    ----------
    text : as written
    metric : its name, see `names_of`
    sign : ``<``, ``<=``, ``>`` or ``>=``
    number : what the change is compared with, in `unit`
    unit : ``%`` of the base's value, ``pp`` percentage points of a share, or nothing: the metric's own
    """

    text: str
    metric: str
    sign: str
    number: float
    unit: str

    def change(self, base: float, other: float) -> float:
        """The change in the condition's unit; relative to a base of 0, any change is infinite."""
        difference = other - base
        if self.unit == "pp":
            return 100 * difference
        if self.unit != "%" or difference == 0:
            return difference
        return 100 * difference / abs(base) if base else math.copysign(math.inf, difference)

    def holds(self, base: float, other: float) -> bool:
        """Whether the change from `base` to `other` is what the condition says."""
        return _OPERATORS[self.sign](self.change(base, other), self.number)


def parse(text: str) -> Condition:
    """Read METRIC OP ±NUMBER(% | pp | nothing).

    Raises
    ------
    ChainError
        When the text is none.
    """
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise ChainError(
            f"a condition is METRIC OP ±NUMBER with < <= > >= and %, pp or nothing after the signed number, such as "
            f"'loss > +3%' or 'knowledge.top1 < -2pp', got {text!r}"
        )
    number = float(found["number"].replace("\N{MINUS SIGN}", "-").replace(" ", ""))
    if not math.isfinite(number):
        raise ChainError(f"the number of a condition must be finite, got {text!r}: write a smaller one")
    return Condition(text.strip(), found["metric"], found["sign"], number, found["unit"] or "")


def names_of(measure: str, metric: str) -> tuple[str, str, str]:
    """What a metric may be called in a condition: ``top1``, ``knowledge.top1``, ``knowledge:testbed.top1``."""
    return metric, f"{re.split('[:(]', measure, maxsplit=1)[0]}.{metric}", f"{measure}.{metric}"


def find(condition: Condition, metrics: Iterable[tuple[str, str]]) -> int:
    """Place of the metric that a condition is on.

    Parameters
    ----------
    metrics : of each metric that was found the measure and its name

    Raises
    ------
    ChainError
        When there is none, or more than one.
    """
    given = list(metrics)
    found = [place for place, (measure, metric) in enumerate(given) if condition.metric in names_of(measure, metric)]
    if len(found) == 1:
        return found[0]
    if found:
        known = ", ".join(names_of(*given[place])[2] for place in found)
        raise ChainError(f"{condition.metric!r} in {condition.text!r} is ambiguous: write one of {known}")
    known = ", ".join(dict.fromkeys(names_of(*one)[1] for one in given))
    raise ChainError(
        f"no metric named {condition.metric!r} was measured, which {condition.text!r} asks for; there are {known}"
    )

"""What a comparison may not exceed: ``loss > +3%`` as a condition on the change of a metric."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mariotte.chain import parse_change
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
    r"(?P<change>[^<>=]*)"
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
    try:
        number, unit = parse_change(found["change"] if found else "")
    except ChainError as error:
        raise ChainError(
            f"a condition is METRIC OP ±NUMBER with < <= > >= and a finite number with %, pp or nothing, such as "
            f"'loss > +3%' or 'knowledge.top1 < -2pp', got {text!r}"
        ) from error
    assert found is not None
    return Condition(text.strip(), found["metric"], found["sign"], number, unit)


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

"""Steps one after another: damages of pruning and quantisation add in nats, and recovery takes a share of them away.

On the published joint grids of one model addition misses by 0.002 to 0.012 nats in the median, the larger of the two
damages by 0.009 to 0.043; a product of losses is as good as addition on two of the three grids and worse on the third
(benchmarks/composition.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mariotte.errors import FitError, unknown
from mariotte.laws.base import collapsed
from mariotte.laws.facts import Prediction
from mariotte.laws.result import Fit

RULES: Mapping[str, Callable[[float, Sequence[float]], float]] = {
    "add": lambda base, values: base + sum(value - base for value in values),
    "max": lambda base, values: base + max(value - base for value in values),
    "multiply": lambda base, values: base * math.prod(value / base for value in values),
}
"""How values after single steps make the value after all; the first is ours, the others are there to be beaten."""


def composed(base: float, values: Sequence[float], rule: str = "add") -> float:
    """The loss after several steps, from the losses after each of them alone.

    Parameters
    ----------
    base : loss of the dense model, nats
    values : losses after one step each, nats, same protocol
    rule : one of `RULES`

    Raises
    ------
    FitError
        When there is nothing to compose, a number is no positive one, or the rule does not exist.
    """
    if rule not in RULES:
        raise FitError(str(unknown("rule of composition", rule, sorted(RULES))))
    if not values:
        raise FitError("a composition needs the loss after at least one step, got none: give one a step")
    if not all(math.isfinite(v) and v > 0 for v in (base, *values)):
        came = ", ".join(f"{v:g}" for v in (base, *values))
        raise FitError(f"a composition needs positive losses in nats, got {came}: a perplexity enters as its logarithm")
    return RULES[rule](base, values)


def compose(base: float, steps: Sequence[Prediction]) -> Prediction:
    """The prediction after several steps of one model, damages adding in nats.

    The ends of the intervals add as the means do: that every step is off to the same side at once is the widest that
    the single intervals allow, and no independence is assumed that nothing has shown.

    Parameters
    ----------
    base : loss of the dense model, nats
    steps : a loss predicted after each step alone, at the same level

    Raises
    ------
    FitError
        When there is nothing to compose, or a number is no positive one.
    """
    mean = composed(base, [step.mean for step in steps])
    lo: float | None = None
    hi: float | None = None
    notes = [step.note for step in steps if step.note]
    if all(step.lo is not None and step.hi is not None for step in steps):
        lo = max(0.0, base + sum((step.lo or 0.0) - base for step in steps))
        hi = base + sum((step.hi or 0.0) - base for step in steps)
    elif any(step.lo is not None for step in steps):
        notes.append("not calibrated: a step has no interval")
    return Prediction(
        mean=mean,
        lo=lo,
        hi=hi,
        inside_box=all(step.inside_box for step in steps),
        collapsed=collapsed(mean, base, "loss"),
        note="; ".join(notes),
    )


def recovered(base: float, cut: Prediction, curve: Fit, tokens: float) -> Prediction:
    """The prediction after recovery with `tokens`, from that of the model that was only cut.

    Recovery leaves the share of the damage that it left in the fit of `curve`, whatever the damage is here.

    Parameters
    ----------
    base : loss of the dense model, nats
    cut : the loss before recovery
    curve : a fit of ``recovery-curve``
    tokens : recovery data, in the unit of that fit

    Raises
    ------
    FitError
        When the fit is of another law, or its own cut did no damage.
    """
    if curve.law.name != "recovery-curve":
        raise FitError(f"recovery on top needs a fit of recovery-curve, got one of {curve.law.name}: fit that law")
    dense = curve.facts.base
    before, after = (curve.predict(0.0, tokens=d) for d in (0.0, tokens))
    if before.mean <= dense:
        raise FitError(
            f"recovery on top needs a curve that begins with damage, got {before.mean:.4g} before any recovery and "
            f"{dense:.4g} of the dense model: fit a model that was cut further"
        )
    share = (after.mean - dense) / (before.mean - dense)

    def left(value: float | None) -> float | None:
        return None if value is None else max(0.0, base + (value - base) * share)

    mean = left(cut.mean)
    assert mean is not None
    low, high = curve.facts.box["tokens"]
    inside = low <= tokens <= high
    notes = [cut.note] if cut.note else []
    if cut.lo is not None:
        notes.append("the interval is that of the cut, the curve's own error is not in it")
    return Prediction(
        mean=mean,
        lo=left(cut.lo),
        hi=left(cut.hi),
        inside_box=cut.inside_box and inside,
        collapsed=collapsed(mean, base, "loss"),
        note="; ".join(notes),
    )

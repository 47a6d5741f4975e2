"""The winner made and measured: predicted beside measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from mariotte.errors import MariotteError
from mariotte.plan.answer import Forecast, Plan, Verified
from mariotte.plan.pool import of_records
from mariotte.plan.probes import Bench
from mariotte.plan.ranking import Planner

SLACK = 1e-4
"""Of the dense value: what other threads and machines may make of the same numbers."""


def _moved(forecast: Forecast, by: float, limit: float) -> Forecast:
    """A forecast of the same damage from another dense value."""
    values = {name: getattr(forecast, name) + by for name in ("base", "mean", "lo", "hi")}
    return replace(forecast, limit=None if math.isinf(limit) else limit, **values)


def execute(planner: Planner, bench: Bench, *, told: Callable[[str], None] = lambda chain: None) -> Plan:
    """Compress with the winner, measure, and put what was measured beside what was predicted.

    Parameters
    ----------
    planner : what is known
    bench : measures
    told : of the winner before it is made

    Raises
    ------
    MariotteError
        When nothing meets the budget, so that there is no winner, or the bench refuses or fails.
    """
    plan = planner.plan()
    if plan.winner is None:
        likeliest = plan.options[0]
        raise MariotteError(
            f"nothing that is known keeps the budget's floors with probability {plan.budget.sure:g}: {likeliest.chain} "
            f"does with {likeliest.probability:.2f}; allow more, lower --sure, or probe more"
        )
    chain = plan.winner.chain
    told(chain)
    measures = list(dict.fromkeys(quality.measure for quality in planner.qualities))
    entries = of_records(bench([chain], measures), source="probe")
    verified: list[Verified] = []
    for quality, forecast in zip(planner.qualities, plan.winner.quality, strict=True):
        found = [e for e in entries if e.model == plan.model and e.chain == chain and quality.accepts(e)]
        if not found:
            raise MariotteError(
                f"{forecast.metric} of {chain} was to be measured as {quality.protocol}, and came back otherwise: give "
                "--measure, or a --store with numbers of this protocol"
            )
        value, limit = found[0].value, quality.floor.limit(found[0].base)
        if quality.assumed:
            # Predicted from another model's dense value: the damage is what was predicted.
            forecast = _moved(forecast, found[0].base - forecast.base, limit)
        slack = SLACK * abs(forecast.base)
        verified.append(
            Verified(
                predicted=forecast,
                measured=value,
                inside=forecast.lo - slack <= value <= forecast.hi + slack,
                kept=None if math.isinf(limit) else replace(quality, base=found[0].base).keeps(value),
            )
        )
    return replace(plan, verified=tuple(verified))

"""Measurements that sharpen a plan: the experiment that tells most is made, and the plan made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mariotte.errors import MariotteError
from mariotte.plan.pool import Entry, of_records
from mariotte.plan.ranking import Planner
from mariotte.store.record import Record

Bench = Callable[[Sequence[str], Sequence[str]], Sequence[Record]]
"""Measures chains, given with the texts of measures, of the plan's model: the bench, which only the caller has."""

MOST = 100


def probe(
    planner: Planner, count: int, bench: Bench, *, told: Callable[[str, float], None] = lambda chain, gain: None
) -> Planner:
    """Make the `count` experiments that improve the decision most, one after the other, each with what the last found.

    Parameters
    ----------
    planner : what is known
    count : how many; fewer where nothing is left to measure
    bench : measures
    told : of every experiment before it is made: its chain, and the gain that is expected of it

    Raises
    ------
    MariotteError
        When the count cannot be, the plan has no metric to measure, or the bench refuses or fails.
    """
    if not 1 <= count <= MOST:
        raise MariotteError(f"probes must be from 1 to {MOST}, got {count}")
    measures = list(dict.fromkeys(quality.measure for quality in planner.qualities))
    for left in range(count, 0, -1):
        plan = planner.plan(experiments=1, ahead=left)
        if not plan.experiments:
            break
        chosen = plan.experiments[0]
        told(chosen.chain, chosen.gain)
        records = bench([chosen.chain], measures)
        planner = planner.learned(_of_model(planner, records, chosen.chain))
    return planner


def _of_model(planner: Planner, records: Sequence[Record], chain: str) -> list[Entry]:
    found = [e for e in of_records(records, source="probe") if e.model == planner.model.name]
    wanted = {quality.protocol for quality in planner.qualities}
    if not all(any(e.chain == chain and quality.accepts(e) for e in found) for quality in planner.qualities):
        measured = ", ".join(sorted({e.protocol for e in found})) or "nothing"
        raise MariotteError(
            f"{chain} was to be measured by {', '.join(sorted(wanted))}, and {measured} came back: the pool's numbers "
            "are of another protocol; give --measure, or a --store with numbers of this one"
        )
    return found

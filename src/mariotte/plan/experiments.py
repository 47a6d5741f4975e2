"""Which measurements would improve a plan's decision most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mariotte.plan.answer import Experiment, Forecast, Option
from mariotte.plan.candidates import Candidate
from mariotte.plan.worth import Decision, State

if TYPE_CHECKING:
    from mariotte.plan.ranking import Planner

NEARLY = 0.02
"""Of experiments whose gain is this near to the best's the mildest is made."""

TELLING = 1e-3
"""Gain of a further experiment that is worth proposing: share of the parameters, or nats."""

_NOTHING = 1e-6


def propose(planner: Planner, count: int, winner: Option | None, ahead: int = 1) -> list[Experiment]:
    """The measurements that would improve the decision most, best first, each of another method.

    Every cut without more is imagined to be measured, see `mariotte.plan.worth`. Of those nearly as good as the best
    the mildest is taken: what a mild cut shows is transferred best.

    Parameters
    ----------
    planner : what is known
    count : how many to propose; fewer where nothing else would tell
    winner : the choice as it is now
    ahead : how many may be made, one after the other
    """
    if not planner.qualities:
        return []
    quality = planner.qualities[0]
    cuts = [c for c in planner.candidates if c.alone]
    forecasts = quality.forecasts([c.asked for c in cuts])
    open_ = [c for c, f in zip(cuts, forecasts, strict=True) if not f.measured]
    if not open_:
        return []
    decision = _decision(planner, cuts, forecasts, open_)
    gains = decision.gains(ahead)
    tried: list[int] = np.flatnonzero(decision.may_O).tolist()
    found: list[Experiment] = []
    while tried and len(found) < count:
        best = max(float(gains[place]) for place in tried)
        if found and best <= TELLING:
            break
        near = [place for place in tried if gains[place] >= best - NEARLY * abs(best) - 1e-12]
        if best <= _NOTHING:
            if winner is not None and winner.quality[0].measured:
                break  # nothing would change the decision, and nothing of it is left to predict
            # Nothing would change the decision: make sure of it, by what narrows its interval most.
            near = [max(tried, key=lambda place: decision.narrows(place, _at(decision, open_, winner)))]
        chosen = min(near, key=lambda place: (open_[place].asked.amount, open_[place].chain))
        method = open_[chosen].asked.parts.cut
        shots = quality.shots(method)
        found.append(
            Experiment(
                chain=open_[chosen].chain,
                gain=max(float(gains[chosen]), 0.0),
                narrows=decision.narrows(chosen, _at(decision, open_, winner, chosen)),
                why=f"point {shots + 1} of {method}" if shots else f"the first point of {method} on this model",
            )
        )
        tried = [place for place in tried if open_[place].asked.parts.cut != method]
    return found


def _at(decision: Decision, open_: Sequence[Candidate], winner: Option | None, otherwise: int = 0) -> int:
    """The cut whose interval matters: the choice if it is not measured, else the one nearest to the floor."""
    chains = [c.chain for c in open_]
    if winner is not None and winner.chain in chains:
        return chains.index(winner.chain)
    if math.isinf(decision.log_allowed):
        return otherwise
    return int(np.argmin(np.abs(decision.state.mean_O - decision.log_allowed)))


def _decision(
    planner: Planner, cuts: Sequence[Candidate], forecasts: Sequence[Forecast], open_: Sequence[Candidate]
) -> Decision:
    """The choice among cuts that are not measured yet, beside the best of those that are."""
    quality, by_damage = planner.qualities[0], planner.budget.asks_for_size
    places = [(c.asked.parts.cut, c.asked.amount) for c in open_]
    belief = quality.belief(places)
    options = {c.chain: planner.option(c, (f,)) for c, f in zip(cuts, forecasts, strict=True)}
    rest = [[f.probability for f in other.forecasts([c.asked for c in open_])] for other in planner.qualities[1:]]
    kept = [o for o in options.values() if o.quality[0].measured and not o.misses and o.quality[0].probability >= 1]
    if by_damage:
        done = max((-max(planner.damage(o.quality[0]), 0.0) for o in kept), default=-math.inf)
    else:
        done = max((o.saving for o in kept), default=0.0)
    allowed = quality.allowed
    broken: dict[str, float] = {}
    for c, f in zip(cuts, forecasts, strict=True):
        if f.measured and f.probability < 1:
            broken[c.asked.parts.cut] = min(broken.get(c.asked.parts.cut, math.inf), c.asked.amount)
    alive_O = np.array([amount < broken.get(cut, math.inf) for cut, amount in places])
    numbers = {cut: number for number, cut in enumerate(dict.fromkeys(cut for cut, _ in places))}
    return Decision(
        state=State(belief.mean_Q, belief.covariance_QQ, alive_O, np.array(done)),
        wide_O=quality.widened(belief, places) / belief.sd,
        jitter=belief.jitter,
        resolution=quality.scale.resolution,
        log_allowed=math.inf if math.isinf(allowed) else quality.scale.ceiled(max(allowed, 1e-12)),
        others_O=np.prod(np.array(rest), axis=0) if rest else np.ones(len(open_)),
        saving_O=np.array([1 - c.left.n_params / planner.model.counts.n_params for c in open_]),
        fits_O=np.array([not options[c.chain].misses for c in open_]),
        may_O=alive_O if alive_O.any() else np.ones_like(alive_O),
        curve_O=np.array([numbers[cut] for cut, _ in places]),
        amount_O=np.array([amount for _, amount in places]),
        sure=planner.budget.sure,
        by_damage=by_damage,
    )

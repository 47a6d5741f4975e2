"""Which chain meets a budget: what is known of a model is gathered, candidates are made, and both are handed on."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mariotte import architectures, shapes
from mariotte.architectures import Kind
from mariotte.chain import Chain, parse
from mariotte.errors import MariotteError, ModelError, unknown
from mariotte.locate import config_of
from mariotte.plan import speed
from mariotte.plan.answer import Plan
from mariotte.plan.budget import Budget, Floor
from mariotte.plan.candidates import CUTS, QUANTIZERS, Damage, candidates_of, together
from mariotte.plan.pool import (
    PUBLISHED,
    STANDS,
    TOGETHER,
    Entry,
    Parted,
    of_records,
    parted,
    published,
    shipped,
    usable,
)
from mariotte.plan.quality import Quality, amount_of_recovery, believe
from mariotte.plan.ranking import Planner
from mariotte.shapes import Sized, foretold


def planner(
    model: str,
    budget: Budget,
    *,
    store: str | Path | None = None,
    measure: str | None = None,
    methods: Sequence[str] | None = None,
    step: float = 0.05,
    level: float = 0.9,
    pool: Sequence[Entry] | None = None,
    device: str = "cpu",
) -> Planner:
    """Gather what a plan is made from; see `plan` for the parameters.

    Raises
    ------
    MariotteError
        As `plan`.
    """
    if not 0.005 <= step <= 0.45:
        raise MariotteError(f"step is the distance of amounts and must be in [0.005, 0.45], got {step:g}: such as 0.05")
    if not 0.5 <= level < 1:
        raise MariotteError(f"a level of intervals must be in [0.5, 1), got {level:g}: such as 0.9")
    if not budget.floors and not budget.asks_for_size:
        raise MariotteError(
            "a budget must ask for something: give --max-loss or --keep for quality, or --bytes, --memory, --speedup "
            "or --latency for size and speed"
        )
    sized = Sized.of(model, config_of(model))
    calibration = speed.find_calibration(device)
    if calibration is None:
        asked = {
            "--speedup": budget.speedup,
            "--latency": budget.latency_s,
            "--hours": budget.gpu_hours,
            "--money": budget.money,
        }
        if wanted := [name for name, value in asked.items() if value is not None]:
            raise MariotteError(
                f"{wanted[0]} needs this machine's speed, which was not measured: run 'mariotte doctor --bench' first"
            )
    entries = [*(shipped() if pool is None else pool), *_stored(store)]
    entries = [e for e in entries if usable(e)]
    testbed = model.startswith("testbed/")
    if not testbed and pool is None:
        # Other models' language and damage are of another kind: nothing of a testbed is said of real models.
        entries = [e for e in entries if not e.model.startswith("testbed/")]
        entries += _also_published(entries, model, measure)
    # A loss of an encoder is another quantity than a decoder's, and so is its damage.
    entries = [e for e in entries if e.model == model or _kind(e.family) == sized.entry.kind]
    chosen, several = _methods(entries, methods)
    floors = budget.floors or (Floor("", "loss", math.inf, ""),)
    qualities = tuple(
        believe(
            floor,
            entries,
            model=model,
            params=float(sized.counts.n_params),
            measure=measure,
            methods=list(dict.fromkeys([*chosen, *(cut for cuts in several for cut in cuts)])),
            level=level,
        )
        for floor in floors
    )
    quantizers = _quantizers(qualities) if budget.bytes is not None or budget.memory is not None else []
    recoveries = _recoveries(qualities, budget.recovery_tokens)
    found = candidates_of(sized, chosen, step=step, quantizers=quantizers, recoveries=recoveries)
    measured = [e.chain for e in entries if e.model == model]
    for cuts in several:
        if not all(cut in quality.curves.methods for quality in qualities for cut in cuts):
            continue  # no record of one of them by this measure
        own = [
            chain for chain in measured if (p := parted(chain)) is not None and p == Parted(TOGETHER.join(cuts), "", "")
        ]
        found += together(
            sized,
            cuts,
            _expected(qualities[0]),
            step=step,
            quantizers=quantizers,
            recoveries=recoveries,
            measured=own,
        )
    found = [c for c in found if all(quality.knows(c.asked) for quality in qualities)]
    untold = _untold(sized, [*chosen, *(cut for cuts in several for cut in cuts)], quantizers)
    if methods is not None and untold and not found:
        raise MariotteError(untold[0])
    return Planner(
        model=sized,
        budget=budget,
        candidates=tuple(found),
        qualities=qualities,
        entries=tuple(entries),
        calibration=calibration,
        level=level,
        untold=tuple(untold),
    )


def _methods(entries: Sequence[Entry], asked: Sequence[str] | None) -> tuple[list[str], list[tuple[str, ...]]]:
    """The cuts that are considered, each without amount, and the combinations of cuts.

    Parameters
    ----------
    entries : of all models
    asked : by the user, combinations as chains; None for all that take parameters away, as far as something is known

    Raises
    ------
    UnknownNameError
        When nothing is known of one that is asked for.
    """
    known = [p for e in entries if (p := parted(e.chain)) is not None and p.cut]
    cuts = {p.cut for p in known if not p.combined}
    if asked is not None:
        links = {name: [str(replace(link, amount=None)) for link in parse(name).links] for name in asked}
        if strange := [cut for some in links.values() for cut in some if cut not in cuts]:
            raise unknown("method with measurements", strange[0], cuts)
        single = [some[0] for some in links.values() if len(some) == 1]
        return single, [tuple(some) for some in links.values() if len(some) > 1]
    remove = {cut for cut in cuts if parse(cut).links[0].name in shapes.CUTS}
    several = {p.cuts for p in known if p.combined and remove.issuperset(p.cuts)}
    return [*(name for name in CUTS if name in cuts), *sorted(remove.difference(CUTS))], sorted(several)


def _quantizers(qualities: Sequence[Quality]) -> list[str]:
    """Quantizers that are considered: of those that the package brings records of `QUANTIZERS`, and all others."""
    known = [q for q in qualities[0].quantizers if all(q in quality.quantizers for quality in qualities)]
    brought = {e.chain for e in shipped()}
    return [q for q in QUANTIZERS if q in known] + sorted(
        q for q in known if q not in QUANTIZERS and (q not in brought or q.partition("@")[0] not in _BROUGHT)
    )


_BROUGHT = {quantizer.partition("@")[0] for quantizer in QUANTIZERS}


def _untold(model: Sized, cuts: Sequence[str], quantizers: Sequence[str]) -> list[str]:
    """Why methods of which something is known are not among the options, a sentence each."""
    said: list[str] = []
    for cut in dict.fromkeys(cuts):
        try:
            foretold(model, Chain((replace(parse(cut).links[0], amount=_TRIED),)))
        except ModelError as error:
            said.append(str(error))
    for quantizer in quantizers:
        try:
            foretold(model, parse(quantizer))
        except ModelError as error:
            said.append(str(error))
    return said


_TRIED = 0.5
"""Amount at which a method is tried on a model, of which only its sizes are known."""


def _expected(quality: Quality) -> Damage:
    """The damage that is expected of a cut at an amount."""
    found: dict[tuple[str, float], float] = {}

    def damage(cut: str, amount: float) -> float:
        if (cut, amount) not in found:
            found[cut, amount] = quality.middle(cut, amount)
        return found[cut, amount]

    return damage


def _recoveries(qualities: Sequence[Quality], tokens: int) -> list[str]:
    """Recoveries within so many tokens, one text each: that of the measure's own corpus, if it is among those known."""
    found: dict[tuple[str, int], str] = {}
    for text in sorted(text for text in qualities[0].recoveries if all(text in q.recoveries for q in qualities)):
        link, amount = parse(text).links[0], amount_of_recovery(text)
        corpus = str(link.fields.get("corpus", ""))
        if amount <= tokens and ((link.name, amount) not in found or corpus in qualities[0].measure):
            found[(link.name, amount)] = text
    return list(found.values())


def plan(
    model: str,
    budget: Budget,
    *,
    store: str | Path | None = None,
    measure: str | None = None,
    methods: Sequence[str] | None = None,
    step: float = 0.05,
    level: float = 0.9,
    device: str = "cpu",
) -> Plan:
    """Which chain meets a budget, from shapes, laws and a store alone.

    Parameters
    ----------
    model : a folder, ``testbed/NAME`` or a hub id; only its config is read
    budget : what is asked; see `read_budget` for texts
    store : measurements of your own, of this model or others; None for none
    measure : by which floors are judged, such as ``loss:wikitext2``; None takes the one that is known best
    methods : cuts to consider, or several together as in ``heads | ffn``; None for all that take parameters away, and
        all combinations, as far as something is known of them
    step : distance of the amounts that are considered, in each method's own unit
    level : of intervals
    device : whose speed is predicted

    Raises
    ------
    MariotteError
        When the model's config cannot be had, nothing is known of a metric, or the budget is impossible.
    """
    return planner(
        model, budget, store=store, measure=measure, methods=methods, step=step, level=level, device=device
    ).plan()


@functools.cache
def _kind(family: str) -> Kind:
    """What models of a family predict; published ones, which do not say it, are decoders."""
    return architectures.find(family).kind if family in architectures.FAMILIES else "causal"


def _also_published(entries: Sequence[Entry], model: str, measure: str | None) -> list[Entry]:
    """Published numbers, in the protocol in which this model was measured if it was, else for the measure asked for.

    Damages in nats hardly depend on the protocol, which the dense value does; so a model's own numbers are predicted
    from published damages, and never mixed with published values.
    """
    own = {e.protocol: e for e in entries if e.metric == "loss" and e.model == model}
    if measure is not None:
        own = {protocol: e for protocol, e in own.items() if e.measure == measure}
    if not own:
        asked = measure if measure is not None and measure.startswith("loss:") else PUBLISHED
        return [replace(e, measure=asked, protocol=f"{asked}{STANDS}") for e in published()]
    target = max(own.values(), key=lambda e: sum(x.protocol == e.protocol for x in entries))
    return [
        replace(
            e, protocol=target.protocol, measure=target.measure, base=target.base, value=target.base + e.value - e.base
        )
        for e in published()
        if e.value - e.base > -0.5 * target.base
    ]


def _stored(store: str | Path | None) -> list[Entry]:
    if store is None:
        return []
    from mariotte.store.sql import open_store

    with open_store(store) as opened:
        return of_records(opened.records())

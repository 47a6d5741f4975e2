"""Which chain meets a budget: candidates from shapes, their quality from what is known, ranked."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mariotte import architectures
from mariotte.architectures import Kind
from mariotte.chain import Link, parse
from mariotte.errors import MariotteError, unknown
from mariotte.plan import speed
from mariotte.plan.answer import Experiment, Forecast, Option, Plan, Rival, Verdict
from mariotte.plan.budget import Budget, Floor
from mariotte.plan.curves import NEAR_SIZE, Array
from mariotte.plan.locate import config_of
from mariotte.plan.pool import PUBLISHED, STANDS, Entry, Parted, of_records, parted, published, shipped, usable
from mariotte.plan.quality import Asked, Quality, amount_of_recovery, believe
from mariotte.plan.shapes import Left, Sized, left_by, memory_bytes

CUTS = ("ffn", "slice", "slicegpt", "shortgpt", "prunenet-random")
"""Methods that a plan considers unless told otherwise: those that take parameters away. Zeros alone save nothing."""

QUANTIZERS = ("rtn@4", "rtn@3")
"""Considered where bytes or memory are asked for, as far as something is known of them."""

NEARLY = 0.02
"""Of experiments whose gain is this near to the best's the mildest is made."""

CALIBRATION_TOKENS = 256 * 64
"""Read by a cut, about."""

_NODES = (-1.96, -1.28, -0.84, -0.52, -0.25, 0.0, 0.25, 0.52, 0.84, 1.28, 1.96)
"""Of a measurement that is imagined, in standard deviations; about evenly spread over its probabilities."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A chain and what shapes say of it."""

    asked: Asked
    left: Left
    tokens: int

    @property
    def chain(self) -> str:
        """Canonical text."""
        return self.asked.chain


@dataclass(frozen=True, kw_only=True, eq=False)
class Planner:
    """Everything that a plan is made from; a probe adds measurements and makes the next plan.

    Parameters
    ----------
    model : sizes of the dense model
    budget : what is asked
    candidates : chains
    qualities : of each floor's metric, in the order of the floors
    entries : what is known of all models
    calibration : of speed, None where there is none
    level : of intervals
    probes : chains that were measured for this plan
    """

    model: Sized
    budget: Budget
    candidates: tuple[Candidate, ...]
    qualities: tuple[Quality, ...]
    entries: tuple[Entry, ...]
    calibration: speed.Calibration | None
    level: float
    probes: tuple[str, ...] = ()

    def learned(self, measured: Sequence[Entry]) -> Planner:
        """The planner that knows more of this model."""
        name = self.model.name
        qualities = [
            quality.with_points([e for e in measured if e.model == name and quality.accepts(e)])
            for quality in self.qualities
        ]
        probes = tuple(dict.fromkeys([*self.probes, *(e.chain for e in measured if not e.dense)]))
        return replace(self, qualities=tuple(qualities), entries=(*self.entries, *measured), probes=probes)

    def plan(self, *, experiments: int = 3) -> Plan:
        """Rank the candidates.

        Parameters
        ----------
        experiments : how many to propose

        Raises
        ------
        MariotteError
            When no candidate is as small or as fast as is asked, whatever its quality.
        """
        options = self.options()
        if not any(not option.misses for option in options):
            raise MariotteError(self._impossible(options))
        ranked = sorted(options, key=self._rank)
        winner = ranked[0] if ranked and ranked[0].meets else None
        dense = self.model.counts
        left = Left(
            shape=self.model.shape,
            n_params=dense.n_params,
            n_bytes=dense.n_bytes,
            obtained=0.0,
            zeros=0,
            flops_per_token=dense.flops_per_token,
        )
        return Plan(
            model=self.model.name,
            budget=self.budget,
            level=self.level,
            n_params=dense.n_params,
            n_bytes=dense.n_bytes,
            memory=memory_bytes(self.model, left, self.budget.context, self.budget.batch),
            options=tuple(ranked),
            winner=winner,
            rule=self._rule(),
            rivals=self.rivals(),
            unknowns=tuple(self._unknowns(winner)),
            experiments=tuple(self.experiments(experiments, winner)) if experiments else (),
            probes=self.probes,
            measures=tuple(dict.fromkeys(quality.measure for quality in self.qualities)),
        )

    def _rule(self) -> str:
        floors = f"the budget's floors kept with probability {self.budget.sure:g} or more"
        return (
            f"of what is as small and fast as is asked, the least expected loss of quality; {floors}"
            if self.budget.asks_for_size
            else f"the most parameters removed; {floors}"
        )

    def options(self) -> list[Option]:
        """Every candidate with what is expected of it, in no order of merit."""
        forecasts = [quality.forecasts([c.asked for c in self.candidates]) for quality in self.qualities]
        return [
            self.option(candidate, tuple(each[place] for each in forecasts))
            for place, candidate in enumerate(self.candidates)
        ]

    def option(self, candidate: Candidate, quality: tuple[Forecast, ...]) -> Option:
        """One candidate against the budget, of whatever quality is expected of it."""
        b, dense, left = self.budget, self.model.counts, candidate.left
        memory = memory_bytes(self.model, left, b.context, b.batch)
        latency = speedup = hours = None
        if self.calibration is not None:
            latency = speed.decode_seconds(self.model, left, b.context, b.batch, self.calibration)
            whole = left_by(self.model, parse("dense"))
            assert whole is not None
            speedup = speed.decode_seconds(self.model, whole, b.context, b.batch, self.calibration) / latency
            seconds = speed.reading_seconds(self.model.shape, CALIBRATION_TOKENS, self.calibration)
            seconds += speed.training_seconds(left.shape, candidate.tokens, self.calibration)
            hours = seconds / 3600
        money = None if hours is None or b.price_per_hour is None else hours * b.price_per_hour
        misses: list[str] = []
        if b.bytes is not None and left.n_bytes > b.bytes.of(dense.n_bytes):
            misses.append(f"bytes {left.n_bytes:,} > {b.bytes.of(dense.n_bytes):,.0f}")
        if b.memory is not None:
            most = b.memory.of(
                memory_bytes(
                    self.model, replace(left, shape=self.model.shape, n_bytes=dense.n_bytes), b.context, b.batch
                )
            )
            if memory > most:
                misses.append(f"memory {memory:,} > {most:,.0f}")
        if b.speedup is not None and speedup is not None and speedup < b.speedup:
            misses.append(f"speed-up {speedup:.2f} < {b.speedup:g}")
        if b.latency_s is not None and latency is not None and latency > b.latency_s:
            misses.append(f"latency {latency:.3g} s > {b.latency_s:g} s")
        if b.gpu_hours is not None and hours is not None and hours > b.gpu_hours:
            misses.append(f"hours {hours:.3g} > {b.gpu_hours:g}")
        if b.money is not None and money is not None and money > b.money:
            misses.append(f"money {money:.3g} > {b.money:g}")
        if candidate.tokens > b.recovery_tokens:
            misses.append(f"recovery {candidate.tokens:,} tokens > {b.recovery_tokens:,}")
        probability = math.prod(each.probability for each in quality)
        return Option(
            chain=candidate.chain,
            quality=quality,
            n_params=left.n_params,
            n_bytes=left.n_bytes,
            memory=memory,
            saving=1 - left.n_params / dense.n_params,
            bytes_share=left.n_bytes / dense.n_bytes,
            speedup=speedup,
            latency_s=latency,
            recovery_tokens=candidate.tokens,
            gpu_hours=hours,
            money=money,
            probability=probability,
            misses=tuple(misses),
            meets=not misses and probability >= b.sure,
        )

    def _rank(self, option: Option) -> tuple[Any, ...]:
        """Best first: what meets everything by the rule, then what is likeliest to."""
        damage = self.damage(option.quality[0])
        if option.meets:
            first = (damage, -option.saving) if self.budget.asks_for_size else (-option.saving, damage)
            return (0, *first, option.recovery_tokens, option.chain)
        return (1, len(option.misses), -option.probability, -option.saving, option.recovery_tokens, option.chain)

    def damage(self, forecast: Forecast) -> float:
        """How far the first metric is expected to move to the worse."""
        rises = self.qualities[0].scale.kind == "loss"
        return (forecast.mean - forecast.base) * (1 if rises else -1)

    def _impossible(self, options: Sequence[Option]) -> str:
        """Why nothing is as small or as fast as is asked."""
        b = self.budget
        if not options:
            return f"no chain of which anything is known fits {self.model.name}: give --store with measured models"
        name = self.model.name
        least = min(options, key=lambda o: (len(o.misses), o.n_bytes))
        if b.bytes is not None and all(o.n_bytes > b.bytes.of(self.model.counts.n_bytes) for o in options):
            least = min(options, key=lambda o: o.n_bytes)
            return (
                f"nothing that is known makes {name} as small as {b.bytes.text}: the smallest, {least.chain}, leaves "
                f"{least.n_bytes:,} of {self.model.counts.n_bytes:,} bytes; allow more, or take a smaller model"
            )
        if b.memory is not None and any(miss.startswith("memory") for o in options for miss in o.misses):
            least = min(options, key=lambda o: o.memory)
            return (
                f"nothing that is known runs {name} in {b.memory.text} at {b.batch} x {b.context} tokens: the "
                f"smallest, {least.chain}, takes {least.memory:,} bytes; allow more, or a shorter context"
            )
        return (
            f"nothing that is known gives {name} all that is asked: {least.chain} comes nearest, and misses "
            f"{' and '.join(least.misses)}; ask for less"
        )

    def rivals(self) -> tuple[Rival, ...]:
        """Every smaller model of the family whose quality was measured alike, against the best cut to its size."""
        if not self.qualities:
            return ()
        quality, dense = self.qualities[0], self.model.counts.n_params
        family = str(self.model.config.get("model_type"))
        natives = {
            e.model: e
            for e in self.entries
            if e.protocol == quality.protocol
            and e.metric == quality.floor.name
            and e.family == family
            and e.model != self.model.name
        }
        found: list[Rival] = []
        # Without quantizers: bytes would be compared with parameters.
        candidates = [
            c for c in self.candidates if not c.asked.parts.quantizer and c.tokens <= self.budget.recovery_tokens
        ]
        forecasts = quality.forecasts([c.asked for c in candidates])
        for name, entry in sorted(natives.items(), key=lambda item: -item[1].params):
            if entry.params >= dense:
                continue
            rises = quality.scale.kind == "loss"
            small = [(f, c) for f, c in zip(forecasts, candidates, strict=True) if c.left.n_params <= entry.params]
            best = min(small, key=lambda pair: (pair[0].mean if rises else -pair[0].mean, pair[1].chain), default=None)
            verdict: Verdict = "take the small one"
            if best is not None:
                better, worse = (best[0].hi, best[0].lo) if rises else (-best[0].lo, -best[0].hi)
                value = entry.base if rises else -entry.base
                verdict = "compress" if better < value else "take the small one" if worse > value else "undecided"
            found.append(
                Rival(
                    model=name,
                    n_params=round(entry.params),
                    metric=quality.floor.name,
                    protocol=quality.protocol,
                    value=entry.base,
                    within=quality.keeps(entry.base),
                    chain=None if best is None else best[1].chain,
                    mean=None if best is None else best[0].mean,
                    lo=None if best is None else best[0].lo,
                    hi=None if best is None else best[0].hi,
                    verdict=verdict,
                )
            )
        return tuple(found)

    def _unknowns(self, winner: Option | None) -> list[str]:
        """What is not known, a sentence each."""
        said: list[str] = []
        for quality in self.qualities:
            metric = quality.floor.name
            if quality.assumed:
                said.append(
                    f"{metric} of {self.model.name} itself was not measured by {quality.measure}: {quality.base:.4g}, "
                    "the median of other models, stands for it"
                )
            if any(e.source == "published" and e.protocol == quality.protocol for e in self.entries):
                said.append(
                    f"{metric} is predicted from published tables, whose methods and protocols are only like ours: two "
                    "people's runs of one method differ by about a fifth in damage"
                )
            low, high = quality.curves.sizes
            if not low / NEAR_SIZE <= quality.params <= high * NEAR_SIZE:
                said.append(
                    f"{self.model.name} has {quality.params:,.0f} parameters, far from the {low:,.0f} to {high:,.0f} "
                    f"of the models that {metric} is predicted from"
                )
            if not quality.own:
                said.append(
                    f"no cut of {self.model.name} was measured for {metric}: intervals are those between models"
                )
            if not quality.curves.inflation:
                said.append(
                    f"intervals of {metric} are not calibrated: that takes curves of three other models, there are "
                    f"{len(quality.curves.models)}"
                )
        sizes = self.budget.bytes is not None or self.budget.memory is not None
        if sizes and not any(c.asked.parts.quantizer for c in self.candidates):
            said.append("what quantizing costs such a model: nothing was measured, so that no chain here quantizes")
        if self.calibration is None:
            said.append("speed is not calibrated on this machine: 'mariotte doctor --bench' measures what it takes")
        if winner is not None:
            parts = parted(winner.chain)
            if parts is not None and parts.quantizer and not winner.quality[0].measured:
                said.append(
                    "what quantizing adds is known from few models, and that damages add was tested on grids of others"
                )
            if parts is not None and parts.recovery and not winner.quality[0].measured:
                said.append(f"what {parts.recovery} leaves is known from other models' cuts, not from this one's")
        return said

    def experiments(self, count: int, winner: Option | None) -> list[Experiment]:
        """The measurements that would improve the decision most.

        Every cut without more is imagined to be measured, with each of several results as likely as now believed; the
        beliefs of all other cuts follow, since curves of one model go together, and the decision is made again. Of
        those nearly as good as the best the mildest is taken: what a mild cut shows is transferred best. A method of
        which nothing was measured on this model is first measured where it should keep the floor.
        """
        if not self.qualities:
            return []
        cuts = [c for c in self.candidates if _alone(c.asked)]
        if not cuts:
            return []
        quality = self.qualities[0]
        forecasts = quality.forecasts([c.asked for c in cuts])
        open_: list[int] = [i for i, f in enumerate(forecasts) if not f.measured]
        if not open_:
            return []
        decision = _Decision.of(self, cuts, forecasts, open_)
        gains = decision.gains()
        tried: list[int] = [i for i in range(len(open_)) if decision.allowed[i]] or list(range(len(open_)))
        found: list[Experiment] = []
        while tried and len(found) < count:
            best = max(gains[i] for i in tried)
            if found and best <= 1e-3:
                break  # further ones would tell next to nothing
            near = [i for i in tried if gains[i] >= best - NEARLY * abs(best) - 1e-12]
            if best <= 1e-6:
                if winner is not None and winner.quality[0].measured:
                    break  # nothing would change the decision, and nothing of it is left to predict
                # Nothing would change the decision: make sure of it, by what narrows its interval most.
                near = sorted(tried, key=lambda i: -decision.narrows(i, winner))[:1]
            chosen = min(near, key=lambda i: (cuts[open_[i]].asked.amount, cuts[open_[i]].chain))
            chain = cuts[open_[chosen]].chain
            narrows = decision.narrows(chosen, winner)
            parts = cuts[open_[chosen]].asked.parts
            why = (
                f"the first point of {parts.cut} on this model"
                if not quality.shots(parts.cut)
                else f"point {quality.shots(parts.cut) + 1} of {parts.cut}"
            )
            found.append(Experiment(chain=chain, gain=max(float(gains[chosen]), 0.0), narrows=narrows, why=why))
            tried = (
                [i for i in tried if i != chosen and cuts[open_[i]].asked.parts.cut != parts.cut] if count > 1 else []
            )
        return found


@dataclass(frozen=True, eq=False)
class _Decision:
    """The decision between cuts as a function of what is believed of one metric; O cuts are not measured yet."""

    mean_O: Array
    covariance_OO: Array
    wide_O: Array
    jitter: float
    resolution: float
    log_allowed: float
    others_O: Array
    saving_O: Array
    fits_O: Array
    done: float
    sure: float
    by_damage: bool
    allowed: tuple[bool, ...]
    place_of: Mapping[str, int]

    @classmethod
    def of(
        cls, planner: Planner, cuts: Sequence[Candidate], forecasts: Sequence[Forecast], open_: Sequence[int]
    ) -> _Decision:
        quality, budget = planner.qualities[0], planner.budget
        places = [(cuts[i].asked.parts.cut, cuts[i].asked.amount) for i in open_]
        belief = quality.belief(places)
        wide = quality.widened(belief, places) / belief.sd
        options = {c.chain: planner.option(c, (f,)) for c, f in zip(cuts, forecasts, strict=True)}
        rest = [
            [f.probability for f in other.forecasts([cuts[i].asked for i in open_])] for other in planner.qualities[1:]
        ]
        others = np.prod(np.array(rest), axis=0) if rest else np.ones(len(open_))
        by_damage = budget.asks_for_size
        kept = [o for o in options.values() if o.quality[0].measured and not o.misses and o.quality[0].probability >= 1]
        if by_damage:
            done = max((-max(planner.damage(o.quality[0]), 0.0) for o in kept), default=-math.inf)
        else:
            done = max((o.saving for o in kept), default=0.0)
        allowed = quality.allowed
        log_allowed = math.inf if math.isinf(allowed) else quality.scale.ceiled(max(allowed, 1e-12))
        mild = tuple(
            quality.shots(cut) > 0 or float(mean) <= log_allowed
            for (cut, _), mean in zip(places, belief.mean_Q, strict=True)
        )
        fits = np.array([not options[cuts[i].chain].misses for i in open_])
        return cls(
            mean_O=belief.mean_Q,
            covariance_OO=belief.covariance_QQ,
            wide_O=wide,
            jitter=belief.jitter,
            resolution=quality.scale.resolution,
            log_allowed=log_allowed,
            others_O=others,
            saving_O=np.array([1 - cuts[i].left.n_params / planner.model.counts.n_params for i in open_]),
            fits_O=fits,
            done=done,
            sure=budget.sure,
            by_damage=by_damage,
            allowed=mild,
            place_of={cuts[i].chain: place for place, i in enumerate(open_)},
        )

    def _worth(self, mean: Array, sd: Array) -> Array:
        """What the best choice is worth, for rows of beliefs (..., O)."""
        probability = self.others_O * _cdf((self.log_allowed - mean) / np.maximum(sd, 1e-9))
        good = self.fits_O * (probability >= self.sure)
        worth = -np.exp(np.minimum(mean, 5.0)) if self.by_damage else np.broadcast_to(self.saving_O, mean.shape)
        best = np.where(good, worth, -np.inf).max(axis=-1)
        floor = -1.0 if self.by_damage else 0.0  # of a budget that nothing meets: as bad as a nat
        return np.maximum(np.maximum(best, self.done), floor)

    def gains(self) -> Array:
        """Expected gain of measuring each cut, (O,)."""
        sd = np.sqrt(np.maximum(np.diag(self.covariance_OO), 0) + self.jitter**2)
        now = float(self._worth(self.mean_O, sd * self.wide_O))
        nodes = np.array(_NODES)
        gains = np.zeros(len(self.mean_O))
        for place in range(len(gains)):
            noise = self.jitter**2 + (self.resolution / max(math.exp(float(self.mean_O[place])), self.resolution)) ** 2
            column = self.covariance_OO[:, place]
            total = float(column[place]) + noise
            gain = column / total
            variance = np.maximum(np.diag(self.covariance_OO) - gain * column, 0.0)
            # Half-way (in logarithms) between what is believed and what held-out models needed: imagined too wide,
            # results send probes too far, and imagined too narrow not far enough.
            surprise = nodes * math.sqrt(total * float(self.wide_O[place]))
            mean_NO = self.mean_O + surprise[:, None] * gain
            sd_NO = np.sqrt(variance + self.jitter**2) * self.wide_O
            sd_NO = np.broadcast_to(sd_NO, mean_NO.shape).copy()
            # What is measured is known: the cut itself, whatever lies around the curve.
            mean_NO[:, place] = self.mean_O[place] + surprise
            sd_NO[:, place] = 1e-9
            gains[place] = float(self._worth(mean_NO, sd_NO).mean()) - now
        return gains

    def narrows(self, place: int, winner: Option | None) -> float:
        """Share by which the interval of the choice shrinks when one cut is measured; 1 for the choice itself."""
        at = None if winner is None else self.place_of.get(winner.chain)
        if at is None:
            at = int(np.argmin(np.abs(self.mean_O - self.log_allowed))) if math.isfinite(self.log_allowed) else place
        if at == place:
            return 1.0
        noise = self.jitter**2 + (self.resolution / max(math.exp(float(self.mean_O[place])), self.resolution)) ** 2
        column = self.covariance_OO[:, place]
        before = float(self.covariance_OO[at, at]) + self.jitter**2
        after = before - float(column[at]) ** 2 / (float(column[place]) + noise)
        return 1 - math.sqrt(max(after, 0.0) / before)


def _cdf(x: Array) -> Array:
    """Of the standard normal distribution; by a formula good to 1e-7 (Abramowitz and Stegun 26.2.17)."""
    t = 1 / (1 + 0.2316419 * np.abs(x))
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * np.minimum(x * x, 1e4)) / math.sqrt(2 * math.pi) * poly
    return np.where(x >= 0, 1 - tail, tail)


def _alone(asked: Asked) -> bool:
    return bool(asked.parts.cut) and not asked.parts.quantizer and not asked.parts.recovery


def candidates_of(
    model: Sized,
    methods: Sequence[str],
    *,
    step: float,
    quantizers: Sequence[str] = (),
    recoveries: Sequence[str] = (),
) -> list[Candidate]:
    """Cuts at every `step`, each width once, alone and with each quantizer and recovery; quantizers alone.

    Parameters
    ----------
    methods, quantizers, recoveries : as links of a chain, the methods without amount
    """
    found: dict[tuple[str, int, float], Candidate] = {}
    lefts: dict[str, Left | None] = {}
    tokens_of = {recovery: amount_of_recovery(recovery) for recovery in recoveries}
    amounts = [round(step * k, 6) for k in range(1, int(0.9 / step + 1e-9) + 1)]
    for method in methods:
        link = parse(method).links[0]
        for amount in amounts:
            cut = str(Link(link.name, amount, link.scope, link.fields))
            for recovery in ("", *recoveries):
                for quantizer in ("", *quantizers):
                    sizes = " | ".join(part for part in (cut, quantizer) if part)  # recoveries leave sizes as they are
                    if sizes not in lefts:
                        lefts[sizes] = left_by(model, parse(sizes))
                    left = lefts[sizes]
                    if left is None or left.obtained <= 0:
                        continue
                    chain = " | ".join(part for part in (cut, recovery, quantizer) if part)
                    parts = Parted(method, quantizer, recovery)
                    key = (f"{method} | {recovery} | {quantizer}", left.n_params, round(left.obtained, 6))
                    if key not in found:
                        asked = Asked(chain=chain, parts=parts, amount=left.obtained)
                        found[key] = Candidate(asked=asked, left=left, tokens=tokens_of.get(recovery, 0))
    for quantizer in quantizers:
        left, parts = left_by(model, parse(quantizer)), parted(quantizer)
        if left is not None and parts is not None:
            found[(quantizer, left.n_params, 0.0)] = Candidate(
                asked=Asked(chain=quantizer, parts=parts, amount=0.0), left=left, tokens=0
            )
    return list(found.values())


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
    known = [e.chain for e in entries]
    cuts = {p.cut for chain in known if (p := parted(chain)) is not None and p.cut}
    if methods is None:
        chosen = [name for name in CUTS if name in cuts]
    else:
        if strange := [name for name in methods if name not in cuts]:
            raise unknown("method with measurements", strange[0], cuts)
        chosen = list(methods)
    floors = budget.floors or (Floor("", "loss", math.inf, ""),)
    qualities = tuple(
        believe(
            floor,
            entries,
            model=model,
            params=float(sized.counts.n_params),
            measure=measure,
            methods=chosen,
            level=level,
        )
        for floor in floors
    )
    quantizers = (
        [q for q in QUANTIZERS if all(q in quality.quantizers for quality in qualities)]
        if budget.bytes is not None or budget.memory is not None
        else []
    )
    recoveries = _recoveries(qualities, budget.recovery_tokens)
    found = candidates_of(sized, chosen, step=step, quantizers=quantizers, recoveries=recoveries)
    found = [c for c in found if all(quality.knows(c.asked) for quality in qualities)]
    return Planner(
        model=sized,
        budget=budget,
        candidates=tuple(found),
        qualities=qualities,
        entries=tuple(entries),
        calibration=calibration,
        level=level,
    )


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
    methods : cuts to consider, None for `CUTS` as far as something is known of them
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

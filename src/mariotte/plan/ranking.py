"""Candidates against a budget: what each is expected to be and cost, which is best, and what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mariotte.accounting import BYTES
from mariotte.chain import parse
from mariotte.errors import MariotteError
from mariotte.plan import speed
from mariotte.plan.answer import Forecast, Option, Plan, Rival, Verdict
from mariotte.plan.budget import Budget
from mariotte.plan.candidates import QUANTIZERS, Candidate
from mariotte.plan.curves import NEAR_SIZE
from mariotte.plan.experiments import propose
from mariotte.plan.pool import Entry, parted
from mariotte.plan.quality import Quality
from mariotte.shapes import Sized, foretold, memory_bytes

PACKED = ("fp8", "int4")
"""Quantizers whose checkpoints hold packed weights."""

CALIBRATION_TOKENS = 256 * 64
"""Read by a cut, about."""


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
    untold : why methods of which something is known are not among the candidates, a sentence each
    """

    model: Sized
    budget: Budget
    candidates: tuple[Candidate, ...]
    qualities: tuple[Quality, ...]
    entries: tuple[Entry, ...]
    calibration: speed.Calibration | None
    level: float
    probes: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()

    def learned(self, measured: Sequence[Entry]) -> Planner:
        """The planner that knows more of this model."""
        name = self.model.name
        qualities = [
            quality.with_points([e for e in measured if e.model == name and quality.accepts(e)])
            for quality in self.qualities
        ]
        probes = tuple(dict.fromkeys([*self.probes, *(e.chain for e in measured if not e.dense)]))
        return replace(self, qualities=tuple(qualities), entries=(*self.entries, *measured), probes=probes)

    def plan(self, *, experiments: int = 3, ahead: int = 1) -> Plan:
        """Rank the candidates.

        Parameters
        ----------
        experiments : how many to propose
        ahead : how many of them may be made, one after the other

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
        left = foretold(self.model, parse("dense"))
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
            experiments=tuple(propose(self, experiments, winner, ahead)) if experiments else (),
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
        memory = memory_bytes(self.model, left, b.context, b.batch) + left.slack * BYTES[self.model.dtype]
        latency = speedup = hours = None
        if self.calibration is not None:
            latency = speed.decode_seconds(self.model, left, b.context, b.batch, self.calibration)
            whole = foretold(self.model, parse("dense"))
            speedup = speed.decode_seconds(self.model, whole, b.context, b.batch, self.calibration) / latency
            seconds = speed.reading_seconds(self.model.shape, CALIBRATION_TOKENS, self.calibration)
            seconds += speed.training_seconds(left.shape, candidate.tokens, self.calibration)
            hours = seconds / 3600
        money = None if hours is None or b.price_per_hour is None else hours * b.price_per_hour
        misses: list[str] = []
        # Of what text decides the most that it can come to is held against a budget.
        more = left.slack * BYTES[self.model.dtype]
        if b.bytes is not None and left.n_bytes + more > b.bytes.of(dense.n_bytes):
            misses.append(f"bytes {left.n_bytes + more:,} > {b.bytes.of(dense.n_bytes):,.0f}")
        if b.memory is not None:
            most = b.memory.of(memory_bytes(self.model, foretold(self.model, parse("dense")), b.context, b.batch))
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
            slack=left.slack,
            decided=left.decided,
        )

    def _rank(self, option: Option) -> tuple[Any, ...]:
        """Best first: what meets everything by the rule, then what is likeliest to, then what does least damage."""
        damage = self.damage(option.quality[0])
        if option.meets:
            first = (damage, -option.saving) if self.budget.asks_for_size else (-option.saving, damage)
            return (0, *first, option.recovery_tokens, option.chain)
        unlikely = (len(option.misses), -option.probability, damage)
        return (1, *unlikely, -option.saving, option.recovery_tokens, option.chain)

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
        known = list(dict.fromkeys(q for c in self.candidates if (q := c.asked.parts.quantizer)))
        if self.budget.bytes is not None or self.budget.memory is not None:
            for quantizer in QUANTIZERS:
                if quantizer not in known:
                    said.append(f"what {quantizer} costs such a model: nothing was measured, so no chain here has it")
        if known := [quantizer for quantizer in known if parse(quantizer).links[0].name not in PACKED]:
            said.append(
                f"bytes and memory of {' and '.join(known)} are simulated: they count the weights as packed, while the "
                "step keeps them rounded in the model's own dtype, so that a checkpoint of it is not smaller until "
                "something packs it"
            )
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
            if parts is not None and parts.combined and not winner.quality[0].measured:
                said.append(
                    f"what {parts.cut} do together is not known of this model: taken as the sum of what each does "
                    f"alone, times {math.exp(self.qualities[0].together.mean):.2f}"
                )
            said += [
                f"text decides {what}: the parameters of {winner.chain} are foretold to within {winner.slack:,}, and "
                "its memory is the most that it can be"
                for what in winner.decided
            ]
        said += self.untold
        return said

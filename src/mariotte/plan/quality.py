"""What is believed of one metric of all candidates of one model: the seam between a plan and the laws.

A candidate is a cut at an amount, perhaps with a quantizer and a recovery. Its cut's damage comes from `curves`; a
quantizer adds its own damage (damages add in nats: within .01 nats on published grids of both); a recovery leaves a
share of the damage, whose logarithm is a line in the logarithm of the damage, learned from the pool.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np

from mariotte.chain import Chain, parse
from mariotte.errors import FitError, MariotteError
from mariotte.laws.base import metric_kind
from mariotte.plan.answer import Forecast
from mariotte.plan.budget import Floor
from mariotte.plan.curves import Array, Curves, Posterior, Sample, Scale, learn
from mariotte.plan.pool import STANDS, Entry, Parted, parted

DRAWS = 400
"""Of quantizers and recoveries; a cut alone is exact."""

_NORMAL = NormalDist()

_Expected = tuple[float, float, float, float]
"""Lower end, middle and upper end of a damage, and the probability of keeping the floor."""

_NO_DAMAGE = 1e-6
"""Stands for none, where a logarithm is asked for."""

_RISES = np.array([1.0, 1.0, 1.0, -1.0])
"""Whether each of these rises with the amount, or falls."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A candidate, as laws see it.

    Parameters
    ----------
    chain : canonical text
    parts : of it
    amount : what its cut removes in its own unit, after rounding, or its cuts together; 0 without a cut
    amounts : of each of several cuts; nothing for one
    """

    chain: str
    parts: Parted
    amount: float
    amounts: tuple[float, ...] = ()

    @property
    def places(self) -> tuple[tuple[str, float], ...]:
        """Each cut with its amount."""
        if not self.parts.combined:
            return ((self.parts.cut, self.amount),) if self.parts.cut else ()
        return tuple(zip(self.parts.cuts, self.amounts, strict=True))


@dataclass(frozen=True)
class Level:
    """A quantity of the logarithm of damage that hardly depends on the model: mean and standard deviation."""

    mean: float
    sd: float


ADDS = Level(0.15, 0.4)
"""Of several cuts, before anything is known of combinations: damages add, and a little more. On four testbed decoders
the logarithm of the damage of 42 combinations over the sum was .17 in the mean, with a deviation of .33
(``benchmarks/results/plan_combined.md``)."""

_PRIOR_WEIGHT = 4
"""Measurements of combinations that `ADDS` counts as."""

_COMBINED = 10
"""Seeds of the draws of several cuts, apart from those of a recovery and a quantizer."""


@dataclass(frozen=True)
class Line:
    """What a recovery leaves, on the logarithm of damage: intercept, slope, and standard deviation around the line."""

    intercept: float
    slope: float
    sd: float


@dataclass(frozen=True, eq=False)
class Quality:
    """What is known of one metric.

    Parameters
    ----------
    floor : what must hold of it
    protocol, measure : what was measured; the measure's text
    scale : of damages
    base : of the dense model
    assumed : whether `base` is the pool's typical value, since nobody measured this model
    params : of the dense model
    curves : learned from other models
    own : points of this model
    measured : values of this model by chain, and by what its cut leaves
    quantizers, recoveries : by canonical text
    level : of intervals
    together : logarithm of what several cuts do over the sum of what each does alone
    """

    floor: Floor
    protocol: str
    measure: str
    scale: Scale
    base: float
    assumed: bool
    params: float
    curves: Curves
    own: tuple[Sample, ...]
    measured: Mapping[str, float]
    quantizers: Mapping[str, Level]
    recoveries: Mapping[str, Line]
    level: float
    together: Level = field(default_factory=lambda: ADDS)

    @property
    def limit(self) -> float:
        """The value that may just be reached."""
        return self.floor.limit(self.base)

    @property
    def allowed(self) -> float:
        """The damage that is allowed; infinite without a floor."""
        if math.isinf(self.limit):
            return math.inf
        if self.scale.kind == "score" and self.limit <= self.scale.chance:
            return math.inf
        return max(self.scale.damage(self.base, self.limit), 0.0)

    def accepts(self, entry: Entry) -> bool:
        """Whether a number is of this metric and protocol; published ones give way to any of the same measure."""
        stands = self.protocol.endswith(STANDS) and entry.measure == self.measure
        return entry.metric == self.floor.name and (entry.protocol == self.protocol or stands)

    def knows(self, asked: Asked) -> bool:
        """Whether anything can be said of a candidate."""
        return self._value(asked) is not None or (
            all(cut in self.curves.methods for cut in asked.parts.cuts)
            and (not asked.parts.quantizer or asked.parts.quantizer in self.quantizers)
            and (not asked.parts.recovery or asked.parts.recovery in self.recoveries)
        )

    def shots(self, cut: str) -> int:
        """Points of this model on a cut's curve."""
        return sum(sample.method == cut for sample in self.own)

    def middle(self, cut: str, amount: float) -> float:
        """The damage that is expected of a cut alone, without what points of its own curve bound."""
        return float(self.scale.damage_of(self.belief([(cut, amount)]).mean_Q)[0])

    def belief(self, cuts: Sequence[tuple[str, float]]) -> Posterior:
        """Of the curves at these cuts, all together."""
        return self.curves.posterior(self.params, cuts, self.own)

    def widened(self, belief: Posterior, cuts: Sequence[tuple[str, float]], level: float | None = None) -> Array:
        """Standard deviations as held-out models needed them, with the measure's resolution."""
        level = level or self.level
        normal = _NORMAL.inv_cdf(0.5 + level / 2)
        wide_Q = np.array([self.curves.widening(self.shots(cut), level) / normal for cut, _ in cuts])
        return belief.sd * wide_Q

    def forecasts(self, candidates: Sequence[Asked]) -> list[Forecast]:
        """What is expected of each candidate.

        Notes
        -----
        A larger amount of the same chain does not do less damage. A measured cut therefore bounds all others of its
        curve, and what is said of those that are not measured is put in order: sorting an estimate of a monotone curve,
        and the ends of its interval, makes them no worse anywhere [1]_.

        References
        ----------
        .. [1] V. Chernozhukov, I. Fernandez-Val and A. Galichon, "Improving point and interval estimators of monotone
           functions by rearrangement", Biometrika 96 (2009).
        """
        cuts = [(asked.parts.cut, asked.amount) for asked in candidates]
        known = [i for i, asked in enumerate(candidates) if asked.parts.cut and self._value(asked) is None]
        alone = [i for i in known if not candidates[i].parts.combined]
        means = np.full(len(cuts), -math.inf)
        sds = np.zeros(len(cuts))
        if alone:
            belief = self.belief([cuts[i] for i in alone])
            means[alone], sds[alone] = belief.mean_Q, self.widened(belief, [cuts[i] for i in alone])
        several = self._drawn_together([candidates[i] for i in known if candidates[i].parts.combined])
        said = [
            self._of_draws(self._treated(asked, several[asked.chain]))
            if asked.chain in several
            else self._expected(asked, float(mean), float(sd))
            for asked, mean, sd in zip(candidates, means, sds, strict=True)
        ]
        chains: dict[Parted, list[int]] = {}
        for i in known:
            chains.setdefault(candidates[i].parts, []).append(i)
        for places in chains.values():
            places.sort(key=lambda i: candidates[i].amount)
            columns = np.sort(np.array([said[i] for i in places]) * _RISES, axis=0) * _RISES
            for i, row in zip(places, columns, strict=True):
                said[i] = (float(row[0]), float(row[1]), float(row[2]), float(row[3]))
        return [self._forecast(asked, *each) for asked, each in zip(candidates, said, strict=True)]

    def _value(self, asked: Asked) -> float | None:
        found = self.measured.get(asked.chain)
        if found is not None or asked.parts.combined:
            return found
        return self.measured.get(place(asked.parts, asked.amount))

    def _drawn_together(self, candidates: Sequence[Asked]) -> dict[str, Array]:
        """Draws of the damage of each combination of cuts, before recovery and quantization, by chain.

        Damages add, but for a factor that other models needed; what is not known of one curve of a model is shared by
        the others, so that single damages are drawn together.
        """
        places = list(dict.fromkeys(place for asked in candidates for place in asked.places))
        if not places:
            return {}
        belief = self.belief(places)
        sds_Q = self.widened(belief, places)
        plain_Q = np.maximum(belief.sd, 1e-9)
        found: dict[str, Array] = {}
        for asked in candidates:
            here = [places.index(place) for place in asked.places]
            correlation = belief.covariance_QQ[np.ix_(here, here)] / np.outer(plain_Q[here], plain_Q[here])
            np.fill_diagonal(correlation, 1.0)
            values, vectors = np.linalg.eigh(correlation)
            root = vectors * np.sqrt(np.maximum(values, 0.0))
            steps_CS = root @ np.stack([_stratified(_COMBINED + c) for c in range(len(here))])
            damage_S = np.zeros(DRAWS)
            for (cut, amount), q, steps_S in zip(asked.places, here, steps_CS, strict=True):
                z_S = np.clip(belief.mean_Q[q] + sds_Q[q] * steps_S, *self._bounds(cut, amount))
                damage_S = damage_S + self.scale.damage_of(z_S)
            found[asked.chain] = damage_S * np.exp(self.together.mean + self.together.sd * _stratified(_COMBINED - 1))
        return found

    def _of_draws(self, damage_S: Array) -> _Expected:
        ordered_S = np.sort(damage_S)
        low, middle, high = (float(ordered_S[round(q * (DRAWS - 1))]) for q in self._quantiles)
        return low, middle, high, float(np.mean(damage_S <= self.allowed))

    def _bounds(self, cut: str, amount: float) -> tuple[float, float]:
        """Logarithms of damage between which a cut lies, since smaller and larger ones of its curve were measured."""
        points = [(s.amount, self.scale.damage(s.base, s.value)) for s in self.own if s.method == cut]
        below, above = [d for a, d in points if a < amount and d > 0], [d for a, d in points if a > amount]
        low = self.scale.ceiled(max(below)) if below else -math.inf
        high = self.scale.ceiled(max(min(above), _NO_DAMAGE)) if above else math.inf
        return min(low, high), max(low, high)

    def _expected(self, asked: Asked, mean: float, sd: float) -> _Expected:
        """Lower end, middle and upper end of the damage, and the probability of keeping the floor."""
        if self._value(asked) is not None:
            return 0.0, 0.0, 0.0, 1.0  # nothing is expected of what was measured
        quantile = _NORMAL.inv_cdf(0.5 + self.level / 2)
        bounds = self._bounds(asked.parts.cut, asked.amount) if asked.parts.cut else (-math.inf, math.inf)
        if not asked.parts.quantizer and not asked.parts.recovery:
            if not asked.parts.cut:
                return 0.0, 0.0, 0.0, 1.0
            z = np.clip(mean + sd * quantile * np.array([-1.0, 0, 1]), *bounds)
            low, middle, high = (float(v) for v in self.scale.damage_of(z))
            return low, middle, high, self._probability(mean, sd, bounds)
        return self._of_draws(self._drawn(asked, mean, sd, bounds))

    def _forecast(self, asked: Asked, low: float, middle: float, high: float, probability: float) -> Forecast:
        value = self._value(asked)
        if value is not None:
            return self._said(value, value, value, float(self.keeps(value)), measured=True)
        if not (asked.parts.cut or asked.parts.quantizer or asked.parts.recovery):
            return self._said(self.base, self.base, self.base, 1.0)
        return self._between(low, middle, high, probability)

    @property
    def _quantiles(self) -> tuple[float, float, float]:
        return 0.5 - self.level / 2, 0.5, 0.5 + self.level / 2

    def _between(self, low: float, middle: float, high: float, probability: float) -> Forecast:
        """The forecast of three damages; the measure's resolution lies beyond the outer ones."""
        values = [
            self.scale.value(self.base, d) for d in (low - self.scale.resolution, middle, high + self.scale.resolution)
        ]
        low_end, high_end = (0.0, 1.0) if self.scale.kind == "score" else (0.0, math.inf)
        return self._said(values[1], max(min(values), low_end), min(max(values), high_end), probability)

    def _said(self, mean: float, lo: float, hi: float, probability: float, measured: bool = False) -> Forecast:
        return Forecast(
            metric=self.floor.name,
            protocol=self.protocol,
            base=self.base,
            mean=mean,
            lo=lo,
            hi=hi,
            limit=None if math.isinf(self.limit) else self.limit,
            probability=probability,
            measured=measured,
        )

    def keeps(self, value: float) -> bool:
        """Whether a measured value keeps the floor."""
        return value <= self.limit if self.scale.kind == "loss" else value >= self.limit

    def _probability(self, mean: float, sd: float, bounds: tuple[float, float]) -> float:
        if math.isinf(self.allowed):
            return 1.0
        allowed = self.allowed
        if allowed < 1e-12:
            return 0.0
        z, (low, high) = self.scale.ceiled(allowed), bounds
        return 1.0 if z >= high else 0.0 if z < low else _NORMAL.cdf((z - mean) / max(sd, 1e-9))

    def _drawn(self, asked: Asked, mean: float, sd: float, bounds: tuple[float, float]) -> Array:
        """Draws of the damage of a cut with a quantizer or a recovery."""
        steps_S = _stratified(0)
        cut_S = self.scale.damage_of(np.clip(mean + sd * steps_S, *bounds)) if asked.parts.cut else np.zeros(DRAWS)
        return self._treated(asked, cut_S)

    def _treated(self, asked: Asked, cut_S: Array) -> Array:
        """Draws of the damage of cuts after the recovery and the quantizer behind them."""
        if asked.parts.recovery:
            line = self.recoveries[asked.parts.recovery]
            z_S = np.log(np.maximum(cut_S, self.scale.resolution))
            left_S = line.intercept + line.slope * z_S + line.sd * _stratified(1)
            cut_S = np.minimum(np.exp(z_S + left_S), 2 * cut_S + self.scale.resolution)
        if asked.parts.quantizer:
            found = self.quantizers[asked.parts.quantizer]
            cut_S = cut_S + self.scale.damage_of(found.mean + found.sd * _stratified(2))
        return cut_S

    def with_points(self, entries: Sequence[Entry]) -> Quality:
        """The same with new measurements of this model, which `accepts` takes; their dense value is the model's."""
        if not entries:
            return self
        return replace(
            self,
            protocol=entries[0].protocol,
            base=entries[0].base,
            assumed=False,
            own=(*self.own, *own_samples(entries, self.params)),
            measured={**self.measured, **measured_values(entries)},
        )


def place(parts: Parted, amount: float) -> str:
    """What two chains share that leave the same: two amounts may round to one width."""
    return f"{parts.cut} {amount:.6f} | {parts.quantizer} | {parts.recovery}"


def measured_values(entries: Sequence[Entry]) -> dict[str, float]:
    """Values by chain and by place."""
    found: dict[str, float] = {}
    for entry in entries:
        if entry.dense or (parts := parted(entry.chain)) is None:
            continue
        found[entry.chain] = entry.value
        if not parts.combined:
            found[place(parts, entry.obtained)] = entry.value
    return found


def own_samples(entries: Sequence[Entry], params: float) -> list[Sample]:
    """Points of cuts without more, each place once."""
    found: dict[tuple[str, float], Sample] = {}
    for entry in entries:
        parts = None if entry.dense else parted(entry.chain)
        if parts is None or not parts.cut or parts.quantizer or parts.recovery or not 0 < entry.obtained < 1:
            continue
        if parts.combined:
            continue
        found[(parts.cut, round(entry.obtained, 6))] = Sample(
            model=entry.model,
            params=params,
            method=parts.cut,
            amount=entry.obtained,
            base=entry.base,
            value=entry.value,
        )
    return list(found.values())


@functools.cache
def _stratified(seed: int) -> Array:
    """Standard normal numbers, evenly spread over their probabilities, in an order of their own."""
    even = (np.arange(DRAWS) + 0.5) / DRAWS
    numbers = np.array([_NORMAL.inv_cdf(float(p)) for p in even])
    return np.random.default_rng(seed).permutation(numbers)


def choose_protocol(floor: Floor, entries: Sequence[Entry], model: str, measure: str | None) -> str:
    """The protocol in which a floor is judged: the measure that is asked for, else the one known best.

    Known best is where the model's own dense value is, then where most numbers are, then by name.

    Raises
    ------
    FitError
        When nothing was measured of the metric, or nothing by this measure.
    """
    prefix = floor.metric.rpartition(".")[0]
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.metric != floor.name:
            continue
        if prefix and not (entry.measure == prefix or entry.measure.startswith((f"{prefix}:", f"{prefix}("))):
            continue
        found.setdefault(entry.protocol, []).append(entry)
    if measure is not None:
        named = {p: some for p, some in found.items() if some[0].measure == measure}
        kind = measure.partition(":")[0]
        if not named and any(some[0].measure.partition(":")[0] == kind for some in found.values()):
            known = sorted({some[0].measure for some in found.values()})
            raise FitError(
                f"nothing was measured by {measure!r}: known are {', '.join(known)}; run a study with it first"
            )
        found = named or found
    if not found:
        known = sorted({f"{e.measure.partition(':')[0]}.{e.metric}" for e in entries})
        raise FitError(
            f"no number of {floor.metric!r} is known for such models, which {floor.text or 'every plan'!r} asks for; "
            f"there are {', '.join(known[:12]) or 'none'}: give --store with measured models, or another metric"
        )

    def rank(item: tuple[str, list[Entry]]) -> tuple[bool, int, str]:
        protocol, some = item
        return not any(e.model == model for e in some), -len({e.model for e in some}) * 10**6 - len(some), protocol

    return min(found.items(), key=rank)[0]


def believe(
    floor: Floor,
    entries: Sequence[Entry],
    *,
    model: str,
    params: float,
    measure: str | None,
    methods: Sequence[str],
    level: float,
) -> Quality:
    """What is known of one metric of a model.

    Parameters
    ----------
    floor : what must hold of it; an infinite number for nothing
    entries : of all models
    model, params : which
    measure : by which it is judged; None chooses
    methods : cuts of candidates, of which the pool may know nothing
    level : of intervals

    Raises
    ------
    FitError
        When nothing was measured of the metric, or its fall cannot be predicted.
    """
    protocol = choose_protocol(floor, entries, model, measure)
    same = [e for e in entries if e.protocol == protocol and e.metric == floor.name]
    kind = metric_kind(floor.name)
    if kind not in ("loss", "score"):
        raise MariotteError(
            f"a floor is of a loss or a score, and {floor.name!r} is a {kind}: use --speedup or --bytes"
        )
    scale = Scale(kind=kind, chance=next((e.chance for e in same if e.chance is not None), 0.0))
    mine, others = [e for e in same if e.model == model], [e for e in same if e.model != model and not e.dense]
    bases = {e.model: e.base for e in same}
    base = bases.get(model)
    assumed = base is None
    if base is None:
        base = float(np.median(list(bases.values())))
    usable = [e for e in others if kind == "loss" or e.base - scale.chance >= 0.05]
    pool = [
        sample
        for name in dict.fromkeys(e.model for e in usable)
        for sample in own_samples(
            [e for e in usable if e.model == name], next(e.params for e in usable if e.model == name)
        )
        if not methods or sample.method in methods
    ]
    own = own_samples(mine, params)
    scale.damage(base, base)  # refuses a score at chance before anything is predicted
    curves = learn(pool or own, scale, methods=methods, levels=(0.8, level) if level != 0.8 else (0.8,))
    return Quality(
        floor=floor,
        protocol=protocol,
        measure=same[0].measure,
        scale=scale,
        base=base,
        assumed=assumed,
        params=params,
        curves=curves,
        own=tuple(own),
        measured=measured_values(mine),
        quantizers=_quantizers(entries, floor.name, scale),
        recoveries=_recoveries(same, scale),
        level=level,
        together=_together(same, scale),
    )


def _quantizers(entries: Sequence[Entry], metric: str, scale: Scale) -> dict[str, Level]:
    """Of quantizers alone, whatever the protocol: few were measured, and their damage is small."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        if entry.dense or entry.metric != metric or (parts := parted(entry.chain)) is None:
            continue
        if parts.quantizer and not parts.cut and not parts.recovery:
            found.setdefault(parts.quantizer, []).append(scale.logarithm(scale.damage(entry.base, entry.value)))
    return {
        text: Level(float(np.mean(z)), max(float(np.std(z, ddof=1)), 0.5) if len(z) > 1 else 1.0)
        for text, z in found.items()
    }


def _recoveries(entries: Sequence[Entry], scale: Scale) -> dict[str, Line]:
    """What recoveries leave of the damage of the cut before them, on models that were measured before and after."""
    before = {
        (e.model, _cuts_of(e)): scale.damage(e.base, e.value)
        for e in entries
        if not e.dense and (parts := parted(e.chain)) is not None and not parts.recovery and not parts.quantizer
    }
    pairs: dict[str, list[tuple[float, float]]] = {}
    for e in entries:
        parts = None if e.dense else parted(e.chain)
        if parts is None or not parts.recovery or parts.quantizer:
            continue
        cut = before.get((e.model, _cuts_of(e)))
        if cut is None or cut < 5 * scale.resolution:
            continue
        left = max(scale.damage(e.base, e.value), scale.resolution)
        pairs.setdefault(parts.recovery, []).append((math.log(cut), math.log(left / cut)))
    return {text: _line(some) for text, some in pairs.items() if len(some) >= 3}


def _cuts_of(entry: Entry) -> str:
    """What two chains share whose cuts leave the same, whatever follows."""
    parts = parted(entry.chain)
    assert parts is not None
    if not parts.combined:
        return f"{parts.cut} {entry.obtained:.6f}"
    return str(Chain(parse(entry.chain).links[: len(parts.cuts)]))


def _together(entries: Sequence[Entry], scale: Scale) -> Level:
    """What several cuts do over the sum of what each does alone, on models of which all of it was measured.

    A few measurements move it little: `ADDS` counts as `_PRIOR_WEIGHT` of them.
    """
    alone: dict[tuple[str, str], float] = {}
    for e in entries:
        parts = None if e.dense else parted(e.chain)
        if parts is not None and not (parts.combined or parts.quantizer or parts.recovery):
            alone[(e.model, e.chain)] = scale.damage(e.base, e.value)
    found: list[float] = []
    for e in entries:
        parts = None if e.dense else parted(e.chain)
        if parts is None or not parts.combined or parts.quantizer or parts.recovery:
            continue
        single = [alone.get((e.model, str(link))) for link in parse(e.chain).links]
        damages = [damage for damage in single if damage is not None]
        if len(damages) == len(single) and sum(damages) >= 5 * scale.resolution:
            found.append(math.log(max(scale.damage(e.base, e.value), scale.resolution) / sum(damages)))
    weight = len(found) + _PRIOR_WEIGHT
    mean = (sum(found) + _PRIOR_WEIGHT * ADDS.mean) / weight
    spread = sum((z - mean) ** 2 for z in found) + _PRIOR_WEIGHT * (ADDS.sd**2 + (mean - ADDS.mean) ** 2)
    return Level(mean, math.sqrt(spread / weight))


def _line(pairs: Sequence[tuple[float, float]]) -> Line:
    x, y = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    # A ridge on the slope: a few pairs of nearly equal damage say nothing of it.
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred + 4.0))
    intercept = float(y.mean() - slope * x.mean())
    left = y - intercept - slope * x
    return Line(intercept, slope, max(float(np.sqrt(np.mean(left**2))), 0.1))


def amount_of_recovery(text: str) -> int:
    """Tokens of a recovery's text."""
    (link,) = parse(text).links
    return int(link.amount) if isinstance(link.amount, int | float) else 0

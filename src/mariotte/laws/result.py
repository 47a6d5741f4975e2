"""A fitted law: what it predicts, where it stops knowing, and everything needed to fit it again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np

from mariotte.errors import FitError
from mariotte.laws.base import FALLING, LIMITS, Array, Inputs, Law, collapsed
from mariotte.laws.catalogue import find
from mariotte.laws.facts import Coefficient, FitReport, Prediction, Ratio
from mariotte.laws.posterior import PosteriorLaw, Standardised, bin_of, distance
from mariotte.laws.uncertainty import Calibration, clusters_needed

FORMAT = 1
"""Number of the layout of a fit's JSON."""

_WORDS = {"ratio": "ratio", "base": "the dense value", "tokens": "recovery tokens", "bits": "bits a weight"}


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What a fit's JSON holds."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    format: int
    facts: FitReport
    calibration: Calibration | Standardised | str
    posterior: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with its parameters, immutable.

    Parameters
    ----------
    law : the form
    facts : see `report`
    calibration : errors on points left out, or the reason why there are none
    posterior : upper triangle of the parameters' covariance, row by row, for laws that have one
    """

    law: Law
    facts: FitReport
    calibration: Calibration | Standardised | str
    posterior: tuple[float, ...] | None = None

    @property
    def theta(self) -> Array:
        """(P,) the parameters."""
        return np.array([c.estimate for c in self.facts.coefficients], dtype=np.float64)

    def report(self) -> FitReport:
        """Coefficients, statistics, remarks and the recipe."""
        return self.facts

    def shown(self) -> tuple[Coefficient, ...]:
        """The coefficients that mean something to a reader: not the weights of a smooth residual, nor settings."""
        bare = isinstance(self.law, PosteriorLaw)
        return tuple(c for c in self.facts.coefficients if not bare or c.se is not None)

    def curve(
        self, ratio_M: Array, base: float | None = None, tokens: float | None = None, bits: float | None = None
    ) -> Array:
        """(M,) predictions at several ratios, clipped to what is possible."""
        base, tokens = self._defaults(base, tokens)
        with np.errstate(all="ignore"):
            curve_M = np.clip(self.law.f(self.theta, self._at(base, ratio_M, tokens, bits)), *LIMITS[self.facts.kind])
        if np.any(np.isnan(curve_M)):
            raise FitError(
                f"{self.law.name} gives no number for dense value {base:g} and {tokens:g} tokens at some ratio between "
                f"{np.min(ratio_M):g} and {np.max(ratio_M):g}: ask nearer to the data of the fit"
            )
        return curve_M

    def predict(
        self,
        ratio: float,
        *,
        base: float | None = None,
        tokens: float | None = None,
        bits: float | None = None,
        level: float | None = None,
    ) -> Prediction:
        """The value expected at `ratio`.

        Parameters
        ----------
        ratio : in (-1, 1), of the fit's ratio kind
        base : dense value; None takes the median of the fit's points
        tokens : recovery data; None takes that of the fit's points if they share one, else 0
        bits : a weight, for laws that use them; None takes the median of the fit's points
        level : of the interval, in (0, 1); None asks for none

        Raises
        ------
        FitError
            When an argument is out of range, or the law gives no number there.
        """
        if not -1.0 < ratio < 1.0:
            raise FitError(f"a ratio must lie in (-1, 1), got {ratio:g}: give the share removed as a fraction")
        ignored = self._ignored(base, tokens)
        base, tokens = self._defaults(base, tokens)
        if bits is not None and not 0 < bits < math.inf:
            raise FitError(f"bits a weight must be positive, got {bits}: 4 for four-bit weights")
        if bits is not None and "bits" not in self.law.inputs:
            ignored.append("bits")
        mean = float(self.curve(np.array([ratio]), base, tokens, bits)[0])
        outside = self._outside(ratio, base, tokens, [name for name in ignored if name != "bits"])
        if (
            bits is not None
            and "bits" in self.facts.box
            and not self.facts.box["bits"][0] <= bits <= self.facts.box["bits"][1]
        ):
            outside.append(f"bits {bits:g}")
        lo: float | None = None
        hi: float | None = None
        notes: list[str] = []
        if level is not None:
            lo, hi, note = self._interval(level, ratio, mean, base, tokens, [n for n in ignored if n != "bits"])
            if lo is not None and outside and outside[-1].startswith("bits"):
                lo, hi, note = None, None, f"not calibrated for {outside[-1]}"
            notes += [note] if note else []
        notes += [f"{self.law.name} ignores {_WORDS[name]}: any value gives the same prediction" for name in ignored]
        return Prediction(
            mean=mean,
            lo=lo,
            hi=hi,
            inside_box=not outside,
            collapsed=collapsed(mean, base, self.facts.kind, self.facts.chance),
            note="; ".join(notes),
        )

    def invert(
        self, target: float, *, base: float | None = None, tokens: float | None = None, level: float | None = None
    ) -> Ratio:
        """The ratio at which the metric reaches `target`.

        Parameters
        ----------
        target : nats or a fraction
        base, tokens, level : as in `predict`

        Raises
        ------
        FitError
            When an argument is out of range.
        """
        if not (math.isfinite(target) and target > 0):
            raise FitError(
                f"a target must be a positive number, got {target}: give nats for a loss, a fraction for a score, "
                "a speed or a size as it was fitted"
            )
        ignored = self._ignored(base, tokens)
        base, tokens = self._defaults(base, tokens)
        if reason := self._why_not_identified(base, tokens):
            return Ratio(r=None, lo=None, hi=None, status="not_identified", note=reason)
        rises = -1.0 if self.facts.kind in FALLING else 1.0
        start = self._raw(0.0, base, tokens)
        if rises * (start - target) > 1e-12 * target:
            note = f"the law gives {start:.4g} with nothing removed, already beyond the target {target:.4g}"
            return Ratio(r=None, lo=None, hi=None, status="unreachable", note=note)
        r = self._solve(target, base, tokens)
        if r is None:
            note = f"the law stays within the target {target:.4g} at every ratio below 1"
            return Ratio(r=None, lo=None, hi=None, status="unreachable", note=note)
        lo: float | None = None
        hi: float | None = None
        note = ""
        if level is not None and isinstance(self.law, PosteriorLaw):
            lo, hi, note = self._reached(target, level, r, base, tokens, ignored)
        elif level is not None:
            width, note = self._half_width(level, r, base, tokens, ignored)
            if width is not None:
                # A prediction too low by the half width reaches the target earlier: solve at the two shifted targets.
                sides = (self._solve(t, base, tokens) for t in self._shift(target, width))
                ends = [
                    (0.0 if rises * (t - start) < 0 else 1.0) if s is None else s
                    for s, t in zip(sides, self._shift(target, width), strict=True)
                ]
                lo, hi = min(ends), max(ends)
        if outside := self._outside(r, base, tokens, ignored):
            note = f"extrapolated: {', '.join(outside)}" + (f"; {note}" if note else "")
            return Ratio(r=r, lo=lo, hi=hi, status="beyond_box", note=note)
        return Ratio(r=r, lo=lo, hi=hi, status="ok", note=note)

    def critical(
        self,
        sigma: float,
        relative_to: Literal["base", "law"] = "base",
        *,
        base: float | None = None,
        tokens: float | None = None,
        level: float | None = None,
    ) -> Ratio:
        """The ratio at which the metric is `sigma` times its reference.

        Parameters
        ----------
        sigma : above 1 for a loss or a speed, below 1 for a score or a size
        relative_to : ``base``: the dense value; ``law``: the law's own value with nothing removed. For ``law`` recovery
            data are unlimited, in the reference and at the ratio alike: the reference of the compression law is then
            L0^α, and the ratio that of its Corollary 3.2
        base, tokens, level : as in `predict`; `tokens` has no part in ``law``

        Raises
        ------
        FitError
            When sigma is on the wrong side of 1, or another argument is out of range.
        """
        if not (0 < sigma < 1 if self.facts.kind in FALLING else sigma > 1):
            wanted = f"{'in (0, 1)' if self.facts.kind in FALLING else 'above 1'} for a {self.facts.kind}"
            raise FitError(f"sigma must be {wanted}, got {sigma:g}: 1.05 means 5 % more, 0.95 means 5 % less")
        if relative_to == "base":
            return self.invert(sigma * self._defaults(base, tokens)[0], base=base, tokens=tokens, level=level)
        base = self._defaults(base, None)[0]
        unlimited = math.inf if "tokens" in self.law.inputs else None
        target = sigma * self._raw(0.0, base, math.inf)
        return self.invert(target, base=base if "base" in self.law.inputs else None, tokens=unlimited, level=level)

    def to_json(self) -> str:
        """The fit as JSON; `from_json` gives one that predicts the same bits."""
        calibration = self.calibration if isinstance(self.calibration, str) else asdict(self.calibration)
        stored: dict[str, Any] = {"format": FORMAT, "facts": asdict(self.facts), "calibration": calibration}
        if self.posterior is not None:
            stored["posterior"] = list(self.posterior)
        return (
            json.dumps(
                stored,
                indent=1,
                ensure_ascii=False,
                allow_nan=False,
            )
            + "\n"
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Fit:
        """The fit that `to_json` wrote, equal to it.

        Raises
        ------
        FitError
            When the text is no fit, a damaged one, or one of a newer layout.
        UnknownNameError
            When its law does not exist here.
        """
        import pydantic  # only here: reading a fit needs it, fitting does not

        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # neither JSON nor, for bytes, text
            raise FitError(f"a fit is a JSON file written by 'mariotte fit --out', this is none: {error}") from error
        if not isinstance(values, dict) or "facts" not in values:
            raise FitError(
                "a fit is a JSON file written by 'mariotte fit --out', this one has no 'facts': write it again"
            )
        layout = cast("dict[str, Any]", values).get("format")
        if layout != FORMAT:
            raise FitError(f"the fit has layout {layout!r:.40}, this version reads {FORMAT}: fit again")
        try:
            # From the text and not from the values: JSON knows no tuples, and in a text an array may be one.
            stored = pydantic.TypeAdapter(_Stored).validate_json(text, strict=True)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise FitError(f"the fit is incomplete or damaged ({where}: {first['msg']}): fit again") from error
        fitted = cls(
            law=find(stored.facts.law),
            facts=stored.facts,
            calibration=stored.calibration,
            posterior=stored.posterior,
        )
        if why := fitted._why_damaged():
            raise FitError(f"the fit is incomplete or damaged ({why}): fit again")
        return fitted

    def _why_damaged(self) -> str:
        """What of the numbers cannot have been fitted; the empty text for a whole fit."""
        facts, calibration = self.facts, self.calibration
        if [c.name for c in facts.coefficients] != [p.name for p in self.law.params]:
            return f"{self.law.name} has the parameters {', '.join(p.name for p in self.law.params)}"
        if any(p.log and not c.estimate > 0 for p, c in zip(self.law.params, facts.coefficients, strict=True)):
            return "a parameter that is positive is not"
        if set(facts.box) - {"bits"} != {"ratio", "base", "tokens"} or any(
            low > high for low, high in facts.box.values()
        ):
            return "the box must have a smallest and a largest ratio, base and tokens"
        low, high = facts.box["ratio"]
        if not (low > -1 and high < 1 and facts.box["base"][0] > 0 and facts.box["tokens"][0] >= 0):
            return "the box holds what no point can have"
        if not (facts.base > 0 and facts.tokens >= 0):
            return f"no fit has dense value {facts.base:g} and {facts.tokens:g} tokens"
        if facts.kind not in self.law.metric_kinds:
            return f"{self.law.name} does not describe a {facts.kind}"
        n = len(facts.coefficients)
        if isinstance(self.law, PosteriorLaw) and len(self.posterior or ()) != n * (n + 1) // 2:
            return f"{self.law.name} has a posterior of {n * (n + 1) // 2} numbers"
        if isinstance(calibration, Standardised) and not all(
            len(q.values) == 100 and list(q.values) == sorted(q.values) and q.clusters >= 1
            for q in calibration.bins.values()
        ):
            return "the calibration needs a hundred ascending quantiles in each bin"
        if isinstance(calibration, Calibration) and not (
            len(calibration.errors) == len(calibration.weights) >= calibration.clusters >= 1
            and list(calibration.errors) == sorted(calibration.errors)
            and min(calibration.errors) >= 0
            and min(calibration.weights) > 0
            and calibration.reach >= 0
        ):
            return "the calibration's errors must ascend from 0, with a positive weight each"
        return ""

    def _defaults(self, base: float | None, tokens: float | None) -> tuple[float, float]:
        base = self.facts.base if base is None else base
        tokens = self.facts.tokens if tokens is None else tokens
        if not (math.isfinite(base) and base > 0):
            raise FitError(f"a dense value must be positive, got {base}")
        if not tokens >= 0:
            raise FitError(f"recovery tokens must be 0 or more, got {tokens}")
        return base, tokens

    def _at(self, base: float, ratio: float | Array, tokens: float, bits: float | None = None) -> Inputs:
        """The covariates asked for; what nobody asks is that of the fit's points."""
        facts = self.facts
        bits = facts.bits if bits is None else bits
        params, bits, chance = (math.nan if v is None else v for v in (facts.params, bits, facts.chance))
        return Inputs.at(
            base,
            ratio,
            tokens,
            params=params,
            bits=bits,
            chance=chance,
            family=facts.family,
            metric=facts.metric,
            recovered=facts.recovered,
        )

    def _raw(self, ratio: float, base: float, tokens: float) -> float:
        with np.errstate(all="ignore"):
            value = float(self.law.f(self.theta, self._at(base, ratio, tokens))[0])
        if math.isnan(value):
            raise FitError(f"{self.law.name} gives no number at ratio {ratio:g}: ask nearer to the data of the fit")
        return value

    def _ignored(self, base: float | None, tokens: float | None) -> list[str]:
        """Which of base and tokens were asked for although the law does not use them."""
        asked = {"base": base, "tokens": tokens}
        return [name for name, value in asked.items() if value is not None and name not in self.law.inputs]

    def _outside(self, ratio: float, base: float, tokens: float, ignored: Sequence[str]) -> list[str]:
        """What of a question lies outside the data, each with where the data are; empty inside."""
        said: list[str] = []
        for name, value in (("ratio", ratio), ("base", base), ("tokens", tokens)):
            if name in ("base", "tokens") and name not in (*self.law.inputs, *ignored):
                continue  # the law does not use it and nobody asked
            low, high = self.facts.box[name]
            slack = 1e-9 * max(abs(low), abs(high))
            shared = high - low <= slack  # a law that ignores what varies says nothing about one value of it
            if not low - slack <= value <= high + slack or (name in ignored and not shared):
                asked = "unlimited recovery tokens" if math.isinf(value) else f"{_WORDS[name]} {value:.4g}"
                said.append(f"{asked} (the data run from {low:g} to {high:g})")
        return said

    def _why_not_identified(self, base: float, tokens: float) -> str:
        if self.law.ratio_param is None:
            return f"{self.law.name} does not depend on the ratio"
        slope = next(c for c in self.facts.coefficients if c.name == self.law.ratio_param)
        if slope.dropped:
            return f"{slope.name} was left out: {slope.dropped}"
        # Where a law knows beforehand that damage rises, its smooth residual may do what the slope leaves: the interval
        # of the answer says how sure it is, not that of one weight.
        known = isinstance(self.law, PosteriorLaw)
        if not known and slope.lo is not None and slope.hi is not None and slope.lo <= 0 <= slope.hi:
            return f"the 95 % interval of {slope.name}, {slope.lo:.3g} to {slope.hi:.3g}, contains 0"
        rises = -1.0 if self.facts.kind in FALLING else 1.0
        if rises * (self._raw(0.5, base, tokens) - self._raw(0.0, base, tokens)) <= 0:
            return f"the fitted {self.facts.kind} {'rises' if rises < 0 else 'falls'} as more is removed"
        return ""

    def _solve(self, target: float, base: float, tokens: float) -> float | None:
        """The smallest ratio in [0, 1) at which the unclipped law equals `target`."""
        if type(self.law).invert is not Law.invert:
            r = self.law.invert(self.theta, target, base, tokens)
            return r if r is not None and -1e-12 <= r < 1.0 else None
        # Grid, then bisection of the first cell that crosses: a form need not be monotone everywhere.
        grid_M = np.concatenate([np.linspace(0.0, 0.99, 100), [0.995, 0.999]])
        with np.errstate(all="ignore"):
            above_M = self.law.f(self.theta, self._at(base, grid_M, tokens)) >= target
        crossing = np.flatnonzero(above_M[1:] != above_M[:-1])
        if len(crossing) == 0:
            return None
        low, high = float(grid_M[crossing[0]]), float(grid_M[crossing[0] + 1])
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (
                (middle, high) if (self._raw(middle, base, tokens) >= target) == above_M[crossing[0]] else (low, middle)
            )
        return 0.5 * (low + high)

    def _interval(
        self, level: float, ratio: float, mean: float, base: float, tokens: float, ignored: Sequence[str]
    ) -> tuple[float | None, float | None, str]:
        """The interval of a prediction, clipped to what is possible, or the reason why there is none."""
        low, high = LIMITS[self.facts.kind]
        if isinstance(self.law, PosteriorLaw):
            ends, note = self._band(level, ratio, base, tokens, ignored)
            if ends is None:
                return None, None, note
        else:
            width, note = self._half_width(level, ratio, base, tokens, ignored)
            if width is None:
                return None, None, note
            ends = self._shift(mean, width)
        lo, hi = (min(max(v, low), high) for v in sorted(ends))
        return lo, hi, ""

    def _band(
        self, level: float, ratio: float, base: float, tokens: float, ignored: Sequence[str]
    ) -> tuple[tuple[float, float] | None, str]:
        """The ends of a law's own interval, the one with less damage first, or the reason why there are none."""
        _check_level(level)
        if isinstance(self.calibration, str):
            return None, f"not calibrated: {self.calibration}"
        if outside := self._outside(self.facts.box["ratio"][0], base, tokens, ignored):
            return None, f"not calibrated for {', '.join(outside)}"
        less_M, more_M, why = self._bands(level, np.array([ratio]), base, tokens)
        return (None, f"not calibrated {why[0]}") if why[0] else ((float(less_M[0]), float(more_M[0])), "")

    def _bands(self, level: float, ratio_M: Array, base: float, tokens: float) -> tuple[Array, Array, list[str]]:
        """(M,) each: the ends of a law's own intervals, and why there is none; such ends are nan."""
        law, facts, calibration = self.law, self.facts, self.calibration
        assert isinstance(law, PosteriorLaw), law
        assert isinstance(calibration, Standardised), calibration
        lowest, highest = facts.box["ratio"]
        # Of several series the fit is the curve of one more, of which no point is known.
        known = 0 if facts.n_series != 1 else 1 if lowest == highest else 2
        if known:
            # More removed is no less damage: milder than all data the harmful end is at most that of the mildest point.
            ratio_M = np.append(ratio_M, lowest)
        x = self._at(base, ratio_M, tokens)
        mean_M = law.f(self.theta, x)
        deviations_M = np.full(len(ratio_M), np.nan)
        why = [""] * len(ratio_M)
        loss = facts.kind == "loss"
        for i, (ratio, mean) in enumerate(zip(ratio_M.tolist(), mean_M.tolist(), strict=True)):
            reach = distance(ratio, highest) if known else 0.0
            name = bin_of(known, reach, collapsed=collapsed(mean, base, facts.kind, facts.chance), loss=loss)
            own = calibration.bins.get(name)
            where = f"where the answer rests on {name}" if "point" in name else f"for answers that are {name}"
            if own is None:
                why[i] = f"{where}: no error was measured there"
            elif reach > own.reach + 1e-9:
                why[i] = f"at ratio {ratio:.3g}: no error was measured that far beyond {highest:g}"
            elif (found := own.at(level)) is None:
                why[i] = f"{where}: {level:g} needs errors from {clusters_needed(level)} clusters, got {own.clusters}"
            else:
                deviations_M[i] = found
        with np.errstate(all="ignore"):
            spread_M = law.deviation(self.theta, self._covariance(), x)
            less_M, more_M = (law.shifted(self.theta, x, side * deviations_M, spread_M) for side in (-1.0, 1.0))
        if known:
            rises = -1.0 if facts.kind in FALLING else 1.0
            capped_M = rises * np.fmin(rises * more_M, rises * more_M[-1])
            more_M = np.where((ratio_M < lowest) & np.isfinite(more_M), capped_M, more_M)[:-1]
            less_M, why = less_M[:-1], why[:-1]
        return less_M, more_M, why

    def _reached(
        self, target: float, level: float, r: float, base: float, tokens: float, ignored: Sequence[str]
    ) -> tuple[float | None, float | None, str]:
        """The ratios at which the ends of a law's own interval reach a target, the harmful end's first."""
        ends, note = self._band(level, r, base, tokens, ignored)
        if ends is None:
            return None, None, note
        rises = -1.0 if self.facts.kind in FALLING else 1.0
        grid_M: Array = np.concatenate([np.linspace(0.0, 0.99, 100), [0.995, 0.999]])
        lo, hi = 0.0, 1.0
        for _ in range(3):  # a grid inside the cell that the last one found: to 1e-5
            less_M, more_M, _why = self._bands(level, grid_M, base, tokens)
            # What is not calibrated bounds nothing. More removed is no less damage, so that the last ratio at which the
            # harmful end is within the target bounds from below, and the first at which the other is not from above.
            within = np.flatnonzero(rises * (more_M - target) < 0)
            beyond = np.flatnonzero(rises * (less_M - target) >= 0)
            first = int(within[-1]) if len(within) else 0
            last = int(beyond[0]) if len(beyond) else len(grid_M) - 1
            lo, hi = float(grid_M[first]), float(grid_M[last]) if len(beyond) else 1.0
            near = ((first, min(first + 1, len(grid_M) - 1)), (max(last - 1, 0), last))
            cells: list[Array] = [np.linspace(grid_M[i], grid_M[j], 20) for i, j in near]
            grid_M = np.sort(np.concatenate(cells))
        return min(lo, r), max(hi, r), ""

    def _covariance(self) -> Array:
        """(P, P) of the parameters."""
        n = len(self.facts.coefficients)
        whole = np.zeros((n, n))
        whole[np.triu_indices(n)] = self.posterior or ()
        return whole + np.triu(whole, 1).T

    def _shift(self, value: float, width: float) -> tuple[float, float]:
        return (
            (value * math.exp(-width), value * math.exp(width)) if self.law.log_link else (value - width, value + width)
        )

    def _half_width(
        self, level: float, ratio: float, base: float, tokens: float, ignored: Sequence[str]
    ) -> tuple[float | None, str]:
        _check_level(level)
        if isinstance(self.calibration, str):
            return None, f"not calibrated: {self.calibration}"
        assert isinstance(self.calibration, Calibration), self.calibration
        width = self.calibration.half_width(level)
        if width is None:
            needed = clusters_needed(level)
            return (
                None,
                f"not calibrated: {level:g} needs errors from {needed} clusters, there are {self.calibration.clusters}",
            )
        low, high = self.facts.box["ratio"]
        if not low - 1e-9 <= ratio <= high + self.calibration.reach + 1e-9:
            return (
                None,
                f"not calibrated at ratio {ratio:.3g}: no error was measured that far outside {low:g} to {high:g}",
            )
        if outside := self._outside(low, base, tokens, ignored):
            return None, f"not calibrated for {', '.join(outside)}"
        return width, ""


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise FitError(f"a level must lie in (0, 1), got {level:g}: 0.9 asks for a 90 % interval")

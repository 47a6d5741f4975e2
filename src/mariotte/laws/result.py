"""A fitted law: what it predicts, where it stops knowing, and everything needed to fit it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np

from mariotte.errors import FitError
from mariotte.laws.base import LIMITS, Array, Inputs, Kind, Law, collapsed
from mariotte.laws.catalogue import find
from mariotte.laws.uncertainty import Calibration, clusters_needed

FORMAT = 1
"""Number of the layout of a fit's JSON."""

Status = Literal["ok", "beyond_box", "unreachable", "not_identified"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a fit expects at one ratio.

    Parameters
    ----------
    mean : nats or a fraction, clipped to what is possible
    lo, hi : interval at the level asked for; None when none was asked for or there is nothing to calibrate it on
    inside_box : whether ratio, base and tokens lie within the data of the fit
    collapsed : whether the model is beyond what laws describe there (loss above twice the dense one)
    note : why an interval is missing, empty when none is
    """

    mean: float
    lo: float | None
    hi: float | None
    inside_box: bool
    collapsed: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The ratio at which a fit reaches a target.

    Parameters
    ----------
    r : None when the status is unreachable or not_identified
    lo, hi : from the interval of the prediction, None as there
    status : ``ok``; ``beyond_box``: an extrapolation; ``unreachable``: no ratio in [0, 1) gives the target;
        ``not_identified``: the data do not say how the metric moves with the ratio
    note : the reason in words, empty for ok
    """

    r: float | None
    lo: float | None
    hi: float | None
    status: Status
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Coefficient:
    """One parameter as estimated.

    Parameters
    ----------
    name, estimate : as in the law's formula
    se : standard error, classical (independent points), None without residual degrees of freedom
    lo, hi : 95 % t interval
    dropped : why it was left out (its term is then absent), empty when it was estimated
    """

    name: str
    estimate: float
    se: float | None
    lo: float | None
    hi: float | None
    dropped: str = ""


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """Everything about a fit that is not needed to predict, but to believe it.

    Parameters
    ----------
    law, formula : the form
    metric, kind, protocol, ratio_kind : of the points, one each
    n_points, n_series, n_clusters : how much there was
    box : smallest and largest ratio, base and tokens
    base, tokens : median dense value, and the recovery data if all points share them, else 0; defaults of predictions
    chance : score of a guesser when known
    coefficients : the parameters
    dof, residual_sd : residual degrees of freedom, and standard deviation on the fitted scale
    adj_r2_uncentred, adj_r2_centred : in-sample; uncentred is what papers without an intercept print
    r2_log_ratio : centred R² of ln(L/L0), the honest in-sample one; None where all points share a ratio
    f_statistic, f_dof : of the regression
    condition, max_correlation : of the design, and the largest |correlation| between two estimates
    remarks : what a reader must know
    recipe : the estimator in words
    data_hash : SHA-256 over the points, independent of their order
    versions : of what computed it
    """

    law: str
    formula: str
    metric: str
    kind: Kind
    protocol: str
    ratio_kind: str
    n_points: int
    n_series: int
    n_clusters: int
    box: Mapping[str, tuple[float, float]]
    base: float
    tokens: float
    chance: float | None
    coefficients: tuple[Coefficient, ...]
    dof: int
    residual_sd: float | None
    adj_r2_uncentred: float | None
    adj_r2_centred: float | None
    r2_log_ratio: float | None
    f_statistic: float | None
    f_dof: tuple[int, int] | None
    condition: float
    max_correlation: float | None
    remarks: tuple[str, ...]
    recipe: str
    data_hash: str
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with its parameters, immutable.

    Parameters
    ----------
    law : the form
    facts : see `report`
    calibration : errors on points left out, or the reason why there are none
    """

    law: Law
    facts: FitReport
    calibration: Calibration | str

    @property
    def theta(self) -> Array:
        """(P,) the parameters."""
        return np.array([c.estimate for c in self.facts.coefficients], dtype=np.float64)

    def report(self) -> FitReport:
        """Coefficients, statistics, remarks and the recipe."""
        return self.facts

    def curve(self, ratio_M: Array, base: float | None = None, tokens: float | None = None) -> Array:
        """(M,) predictions at several ratios, clipped to what is possible."""
        base, tokens = self._defaults(base, tokens)
        return np.clip(self.law.f(self.theta, Inputs.at(base, ratio_M, tokens)), *LIMITS[self.facts.kind])

    def predict(
        self, ratio: float, *, base: float | None = None, tokens: float | None = None, level: float | None = None
    ) -> Prediction:
        """The value expected at `ratio`.

        Parameters
        ----------
        ratio : in (-1, 1), of the fit's ratio kind
        base : dense value; None takes the median of the fit's points
        tokens : recovery data; None takes that of the fit's points if they share one, else 0
        level : of the interval, in (0, 1); None asks for none

        Raises
        ------
        FitError
            When an argument is out of range.
        """
        if not -1.0 < ratio < 1.0:
            raise FitError(f"a ratio must lie in (-1, 1), got {ratio:g}: give the share removed as a fraction")
        base, tokens = self._defaults(base, tokens)
        mean = float(self.curve(np.array([ratio]), base, tokens)[0])
        inside = self._inside("ratio", ratio) and self._inside("base", base) and self._inside("tokens", tokens)
        lo: float | None = None
        hi: float | None = None
        note = ""
        if level is not None:
            width, note = self._half_width(level, ratio, base, tokens)
            if width is not None:
                lo, hi = (
                    min(max(v, LIMITS[self.facts.kind][0]), LIMITS[self.facts.kind][1])
                    for v in self._shift(mean, width)
                )
        return Prediction(
            mean=mean,
            lo=lo,
            hi=hi,
            inside_box=inside,
            collapsed=collapsed(mean, base, self.facts.kind, self.facts.chance),
            note=note,
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
                f"a target must be a positive number, got {target}: give nats for a loss, a fraction for a score"
            )
        base, tokens = self._defaults(base, tokens)
        if reason := self._why_not_identified(base, tokens):
            return Ratio(r=None, lo=None, hi=None, status="not_identified", note=reason)
        worse = 1.0 if self.facts.kind == "loss" else -1.0
        start = self._raw(0.0, base, tokens)
        if worse * (start - target) > 1e-12 * target:
            note = f"the law gives {start:.4g} with nothing removed, already beyond the target {target:.4g}"
            return Ratio(r=None, lo=None, hi=None, status="unreachable", note=note)
        r = self._solve(target, base, tokens)
        if r is None:
            note = f"the law stays within the target {target:.4g} at every ratio below 1"
            return Ratio(r=None, lo=None, hi=None, status="unreachable", note=note)
        lo: float | None = None
        hi: float | None = None
        note = ""
        if level is not None:
            width, note = self._half_width(level, r, base, tokens)
            if width is not None:
                # A prediction too low by the half width reaches the target earlier: solve at the two shifted targets.
                sides = (self._solve(t, base, tokens) for t in self._shift(target, width))
                ends = [
                    (0.0 if worse * (t - start) < 0 else 1.0) if s is None else s
                    for s, t in zip(sides, self._shift(target, width), strict=True)
                ]
                lo, hi = min(ends), max(ends)
        if not (self._inside("ratio", r) and self._inside("base", base) and self._inside("tokens", tokens)):
            low, high = self.facts.box["ratio"]
            return Ratio(
                r=r,
                lo=lo,
                hi=hi,
                status="beyond_box",
                note=note or f"extrapolated: the data run from {low:g} to {high:g}",
            )
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
        sigma : above 1 for a loss, below 1 for a score
        relative_to : ``base``: the dense value; ``law``: the law's own value with nothing removed and unlimited
            recovery data, at unlimited recovery data: L0^α in the compression law, whose Corollary 3.2 this is
        base, tokens, level : as in `predict`; `tokens` has no part in ``law``

        Raises
        ------
        FitError
            When sigma is on the wrong side of 1, or another argument is out of range.
        """
        if not (sigma > 1 if self.facts.kind == "loss" else 0 < sigma < 1):
            wanted = "above 1 for a loss" if self.facts.kind == "loss" else "in (0, 1) for a score"
            raise FitError(f"sigma must be {wanted}, got {sigma:g}: 1.05 means 5 % more, 0.95 means 5 % less")
        if relative_to == "base":
            return self.invert(sigma * self._defaults(base, tokens)[0], base=base, tokens=tokens, level=level)
        base = self._defaults(base, None)[0]
        return self.invert(sigma * self._raw(0.0, base, math.inf), base=base, tokens=math.inf, level=level)

    def to_json(self) -> str:
        """The fit as JSON; `from_json` gives one that predicts the same bits."""
        calibration = self.calibration if isinstance(self.calibration, str) else asdict(self.calibration)
        return (
            json.dumps(
                {"format": FORMAT, "facts": asdict(self.facts), "calibration": calibration},
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )

    @classmethod
    def from_json(cls, text: str) -> Fit:
        """The fit that `to_json` wrote.

        Raises
        ------
        FitError
            When the text is no fit, or one of a newer layout.
        UnknownNameError
            When its law does not exist here.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise FitError(f"a fit is a JSON file written by 'mariotte fit --out', this is none: {error}") from error
        if not isinstance(values, dict) or "facts" not in values:
            raise FitError(
                "a fit is a JSON file written by 'mariotte fit --out', this one has no 'facts': write it again"
            )
        stored = cast("dict[str, Any]", values)
        if stored.get("format") != FORMAT:
            raise FitError(f"the fit has layout {stored.get('format')!r}, this version reads {FORMAT}: fit again")
        facts: dict[str, Any] = stored["facts"]
        try:
            # JSON knows no tuples: what was one becomes one again, so that the result equals what was written.
            changed: dict[str, Any] = {
                "box": {name: (low, high) for name, (low, high) in facts["box"].items()},
                "coefficients": tuple(Coefficient(**c) for c in facts["coefficients"]),
                "remarks": tuple(facts["remarks"]),
                "f_dof": None if facts["f_dof"] is None else tuple(facts["f_dof"]),
            }
            report = FitReport(**{**facts, **changed})
            calibration: Calibration | str | dict[str, Any] = stored["calibration"]
            if isinstance(calibration, dict):
                lists: dict[str, Any] = {name: tuple(calibration[name]) for name in ("errors", "weights")}
                calibration = Calibration(**{**calibration, **lists})
        except (KeyError, TypeError) as error:
            raise FitError(f"the fit is incomplete or damaged ({error}): fit again") from error
        return cls(law=find(report.law), facts=report, calibration=calibration)

    def _defaults(self, base: float | None, tokens: float | None) -> tuple[float, float]:
        base = self.facts.base if base is None else base
        tokens = self.facts.tokens if tokens is None else tokens
        if not (math.isfinite(base) and base > 0):
            raise FitError(f"a dense value must be positive, got {base}")
        if not tokens >= 0:
            raise FitError(f"recovery tokens must be 0 or more, got {tokens}")
        return base, tokens

    def _raw(self, ratio: float, base: float, tokens: float) -> float:
        return float(self.law.f(self.theta, Inputs.at(base, ratio, tokens))[0])

    def _inside(self, name: str, value: float) -> bool:
        if name not in self.law.inputs and name != "ratio":
            return True
        if name == "tokens" and any(c.dropped for c in self.facts.coefficients) and value == self.facts.tokens:
            return True
        low, high = self.facts.box[name]
        slack = 1e-9 * max(abs(low), abs(high))
        return low - slack <= value <= high + slack

    def _why_not_identified(self, base: float, tokens: float) -> str:
        if self.law.ratio_param is None:
            return f"{self.law.name} does not depend on the ratio"
        slope = next(c for c in self.facts.coefficients if c.name == self.law.ratio_param)
        if slope.dropped:
            return f"{slope.name} was left out: {slope.dropped}"
        if slope.lo is not None and slope.hi is not None and slope.lo <= 0 <= slope.hi:
            return f"the 95 % interval of {slope.name}, {slope.lo:.3g} to {slope.hi:.3g}, contains 0"
        worse = 1.0 if self.facts.kind == "loss" else -1.0
        if worse * (self._raw(0.5, base, tokens) - self._raw(0.0, base, tokens)) <= 0:
            return f"the fitted {self.facts.kind} improves as more is removed"
        return ""

    def _solve(self, target: float, base: float, tokens: float) -> float | None:
        """The smallest ratio in [0, 1) at which the unclipped law equals `target`."""
        if type(self.law).invert is not Law.invert:
            r = self.law.invert(self.theta, target, base, tokens)
            return r if r is not None and -1e-12 <= r < 1.0 else None
        # Grid, then bisection of the first cell that crosses: a form need not be monotone everywhere.
        grid_M = np.concatenate([np.linspace(0.0, 0.99, 100), [0.995, 0.999]])
        above_M = self.law.f(self.theta, Inputs.at(base, grid_M, tokens)) >= target
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

    def _shift(self, value: float, width: float) -> tuple[float, float]:
        return (
            (value * math.exp(-width), value * math.exp(width)) if self.law.log_link else (value - width, value + width)
        )

    def _half_width(self, level: float, ratio: float, base: float, tokens: float) -> tuple[float | None, str]:
        if not 0 < level < 1:
            raise FitError(f"a level must lie in (0, 1), got {level:g}: 0.9 asks for a 90 % interval")
        if isinstance(self.calibration, str):
            return None, f"not calibrated: {self.calibration}"
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
        if not (self._inside("base", base) and self._inside("tokens", tokens)):
            return None, "not calibrated: base or tokens lie outside the data"
        return width, ""

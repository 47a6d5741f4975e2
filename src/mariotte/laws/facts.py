"""What is said of a fitted law: predictions, ratios, coefficients, and the report that makes them believable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mariotte.laws.base import Kind, Search

Status = Literal["ok", "beyond_box", "unreachable", "not_identified"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a fit expects at one ratio.

    Parameters
    ----------
    mean : nats or a fraction, clipped to what is possible
    lo, hi : interval at the level asked for; None when none was asked for or there is nothing to calibrate it on
    inside_box : whether ratio, base and tokens lie within the data of the fit. A base or tokens that were asked for and
        that the law ignores count as inside only where all of the data share that value
    collapsed : whether the model is beyond what laws describe there (loss above twice the dense one)
    note : why an interval is missing, and what was asked for that the law ignores; empty for neither
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
    note : the reason in words, and why an interval is missing; empty for neither
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
    box : smallest and largest ratio, base and tokens; of bits too where the law uses them
    base, tokens : median dense value, and the recovery data if all points share them, else 0; defaults of predictions
    params, bits : medians of the dense parameters and of the bits a weight, None where points do not say them; defaults
    family : pruning family if all points share one
    recovered : whether training followed the cut in any of them
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
    search : how the parameters were searched for, where that is no direct solution
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
    params: float | None = None
    bits: float | None = None
    family: str | None = None
    search: Search | None = None
    recovered: bool = False

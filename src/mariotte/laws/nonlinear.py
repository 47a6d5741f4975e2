"""Laws that are not linear in their parameters, and their robust least squares from many starts."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Estimate, Inputs, Law, Param, Search

AGREE = 1e-6
"""Searches whose costs differ by less than this share of it have found the same fit."""

FLOOR = 0.01
"""Nats or a fraction, added in squares to standard errors: two runs of one experiment differ by more than sampling."""

UNKNOWN = 10.0
"""A logarithm with a larger standard error is not known: its interval would span more than numbers can."""

_WORDS = {"linear": "least squares", "soft_l1": "soft-L1 least squares", "huber": "Huber least squares"}


class NonlinearLaw(Law):
    """A law fitted by minimising a robust loss of L - f within the bounds of its parameters.

    A subclass gives `f`, `jac` and `grid`. Residuals are weighted by the inverse of the standard errors where every
    point has one. A point beyond the value of a guesser (`Inputs.chance_M` above the dense value: a loss) is censored:
    that the model has collapsed is all that it says, and a prediction anywhere beyond the guesser's is right.
    """

    loss: ClassVar[Literal["linear", "soft_l1", "huber"]] = "soft_l1"
    scale: ClassVar[float] = 0.1
    """Weighted residual (nats where the weights are 1) from which a point's pull stops growing with it."""
    searched: ClassVar[int] = 6
    """From how many of the starts, the best ones, a search is begun."""
    log_link: ClassVar[bool] = False
    screened: ClassVar[bool] = False

    @abstractmethod
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        """For every parameter the values to begin from; all their combinations are tried."""

    def target(self, x: Inputs, y_M: Array) -> Array:
        """(M,) what f is fitted to; a form that cannot improve on the dense value takes the worse of the two."""
        del x
        return y_M

    def weigh(self, x: Inputs, y_M: Array) -> tuple[Array, str]:
        """(M,) weights of the residuals, and what they are in a word or two."""
        del y_M
        return weights(x), "weighted by standard errors" if np.all(x.se_M >= 0) else "unweighted"

    def refuse(self, x: Inputs) -> None:
        """Refuse points that cannot determine the parameters, by raising `FitError`."""
        del x

    @override
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        names = [p.name for p in self.params]
        if len(y_M) < len(names):
            raise FitError(
                f"{self.name} estimates {len(names)} parameters ({', '.join(names)}) and needs at least as many "
                f"points, got {len(y_M)}: measure more"
            )
        self.refuse(x)
        starts = [np.array(s, dtype=np.float64) for s in itertools.product(*self.grid(x, y_M))]
        return minimise(self, x, self.target(x, y_M), starts)


class _Problem(NamedTuple):
    """Residuals and their derivatives as functions of the parameters on the estimated scale."""

    law: NonlinearLaw
    x: Inputs
    target_M: Array
    weight_M: Array
    censored_M: NDArray[np.bool_]
    log_P: NDArray[np.bool_]

    def published(self, inner_P: Array) -> Array:
        return np.where(self.log_P, np.exp(np.where(self.log_P, inner_P, 0.0)), inner_P)

    def inner(self, theta: Array) -> Array:
        return np.where(self.log_P, np.log(np.where(self.log_P, theta, 1.0)), theta)

    def residuals(self, inner_P: Array) -> Array:
        miss_M = self.law.f(self.published(inner_P), self.x) - self.target_M
        return self.weight_M * np.where(self.censored_M, np.minimum(miss_M, 0.0), miss_M)

    def jacobian(self, inner_P: Array) -> Array:
        theta = self.published(inner_P)
        jac_MP = self.law.jac(theta, self.x) * np.where(self.log_P, theta, 1.0)
        if np.any(self.censored_M):
            free_M = self.censored_M & (self.law.f(theta, self.x) >= self.target_M)
            jac_MP = np.where(free_M[:, None], 0.0, jac_MP)
        return self.weight_M[:, None] * jac_MP


def censored(x: Inputs, y_M: Array) -> NDArray[np.bool_]:
    """(M,) points that are worse than a guesser: their height says only that the model has collapsed."""
    with np.errstate(invalid="ignore"):
        return (x.chance_M > x.base_M) & (y_M >= x.chance_M)


def weights(x: Inputs) -> Array:
    """(M,) of residuals, mean square 1: from the standard errors where all points have one, else all 1."""
    if not np.all(x.se_M >= 0):  # nan where unknown
        return np.ones_like(x.se_M)
    weight_M = 1.0 / np.sqrt(x.se_M**2 + FLOOR**2)
    return weight_M / np.sqrt(np.mean(weight_M**2))


def relative(x: Inputs, y_M: Array, floor: float) -> Array:
    """(M,) weights by which every damage counts by its share missed, down to a floor in nats or two standard errors."""
    floor_M = np.maximum(floor, np.where(np.isnan(x.se_M), 0.0, 2 * x.se_M))
    return 1.0 / np.maximum(np.abs(y_M - x.base_M), floor_M)


def needs_two_ratios(law: NonlinearLaw, x: Inputs) -> None:
    """Refuse points of one ratio: its first two parameters could not be told apart.

    Raises
    ------
    FitError
        When all points have the same.
    """
    if np.ptp(x.ratio_M) == 0.0:
        first, second, *_ = (param.name for param in law.params)
        raise FitError(
            f"{law.name} needs at least two ratios to tell {first} from {second}, "
            f"all points have {x.ratio_M[0]:g}: measure another ratio"
        )


def needs_two_bits(law: NonlinearLaw, x: Inputs) -> None:
    """Refuse points of one number of bits, or of none.

    Raises
    ------
    FitError
        When there are fewer than two.
    """
    known = x.bits_M[np.isfinite(x.bits_M)]
    if len(known) == 0 or np.ptp(known) == 0.0:
        came = "no point says its bits" if len(known) == 0 else f"all points have {known[0]:g}"
        raise FitError(f"{law.name} needs at least two numbers of bits a weight, {came}: measure another")


def minimise(law: NonlinearLaw, x: Inputs, target_M: Array, starts: Sequence[Array]) -> Estimate:
    """Robust least squares of `law` to `target_M` from the best of `starts`, within the bounds of its parameters.

    Parameters
    ----------
    law : with its Jacobian
    x, target_M : the points; the target may differ from the values, see `NonlinearLaw.target`
    starts : (P,) each, on the published scale; those outside the bounds are moved to them

    Raises
    ------
    FitError
        When the law gives no number at any start.
    """
    from scipy import optimize  # half a second, and only these laws need it

    log_P = np.array([p.log for p in law.params])
    censored_M = censored(x, target_M)
    weight_M, weighted = law.weigh(x, target_M)
    problem = _Problem(law, x, np.where(censored_M, x.chance_M, target_M), weight_M, censored_M, log_P)
    lo_P, hi_P = (problem.inner(np.array([side(p) for p in law.params])) for side in (_lo, _hi))
    inners: list[Array] = []
    costs: list[float] = []
    with np.errstate(all="ignore"):
        for start in starts:
            inner_P = np.clip(problem.inner(np.clip(start, [_lo(p) for p in law.params], None)), lo_P, hi_P)
            residual_M = problem.residuals(inner_P)
            if np.all(np.isfinite(residual_M)) and np.all(np.isfinite(problem.jacobian(inner_P))):
                inners.append(inner_P)
                costs.append(float(np.sum(np.abs(residual_M))))
        if not inners:
            raise FitError(
                f"{law.name} gives no number for these points, from any start: it needs {', '.join(law.inputs)}"
            )
        order = np.argsort(costs, kind="stable")[: law.searched]

        def search(inner_P: Array, tolerance: float) -> Any:
            return cast("Any", optimize).least_squares(
                problem.residuals,
                inner_P,
                problem.jacobian,
                bounds=(lo_P, hi_P),
                loss=law.loss,
                f_scale=law.scale,
                x_scale="jac",
                ftol=tolerance,
                xtol=tolerance,
                gtol=tolerance,
                max_nfev=500,
            )

        found = [search(inners[int(i)], 1e-9) for i in order]
        nearest: Any = min(found, key=lambda r: float(r.cost))
        best = search(cast("Array", nearest.x), 1e-14)
        inner_P = np.asarray(best.x)
        # The search stays inside the bounds, so that it ends a little before one.
        at_lo_P, at_hi_P = (np.abs(inner_P - side_P) <= 1e-6 * np.maximum(1, np.abs(side_P)) for side_P in (lo_P, hi_P))
        at_bound_P = at_lo_P | at_hi_P
        inner_P = np.where(at_lo_P, lo_P, np.where(at_hi_P, hi_P, inner_P))
        inner_P = _polished(problem, inner_P, ~at_bound_P, lo_P, hi_P)
        residual_M = problem.residuals(inner_P)
        pull_M = _pull(law, residual_M)
        gradient_P = problem.jacobian(inner_P).T @ (pull_M * residual_M)
        jac_MP = problem.jacobian(inner_P) * np.sqrt(pull_M)[:, None]
    theta_P = problem.published(inner_P)
    agreeing = [problem.published(r.x) for r in found if r.cost <= best.cost * (1 + AGREE) + 1e-24]
    size_P = np.maximum(np.abs(theta_P), 1e-12)
    spread = max(float(np.max(np.abs(other - theta_P) / size_P)) for other in agreeing) if len(agreeing) > 1 else None
    given = {
        p.name: f"it ended at its bound, {value:.4g}"
        for p, value, at in zip(law.params, theta_P, at_bound_P, strict=True)
        if at
    }
    covariance, condition = _covariance(
        jac_MP[:, ~at_bound_P], float(best.cost), len(target_M) - len(theta_P), ~at_bound_P
    )
    if covariance is not None:
        for p, variance in zip(law.params, np.diag(covariance), strict=True):
            if p.log and variance > UNKNOWN**2:
                given[p.name] = "these points do not determine it"
    n_censored = int(np.sum(censored_M))
    recipe = (
        f"{_WORDS[law.loss]} of L"
        + (f", scale {law.scale:g}" if law.loss != "linear" else "")
        + f", from the best {len(found)} of {len(starts)} starts"
        + f", {weighted}"
        + (f", {n_censored} points worse than a guesser censored" if n_censored else "")
    )
    return Estimate(
        theta=theta_P,
        covariance=covariance,
        dof=len(target_M) - len(theta_P),
        dropped={},
        condition=condition,
        recipe=recipe,
        given=given,
        search=Search(
            starts=len(found),
            agreeing=len(agreeing),
            spread=spread,
            status=str(best.message).strip("`.").replace("`", ""),
            gradient=float(np.max(np.abs(np.where(at_bound_P, 0.0, gradient_P)))),
        ),
    )


def _polished(problem: _Problem, inner_P: Array, free_P: NDArray[np.bool_], lo_P: Array, hi_P: Array) -> Array:
    """(P,) the end of a search, improved by Gauss-Newton steps while they improve it.

    The optimiser computes its robust cost as a difference from 1, which is 0 from a ten-millionth of the scale on, and
    stops there: nine digits of the parameters, where exact data determine fifteen.
    """
    cost = _cost(problem.law, problem.residuals(inner_P))
    for _ in range(20):
        residual_M = problem.residuals(inner_P)
        pull_M = np.sqrt(_pull(problem.law, residual_M))
        jac_MP = problem.jacobian(inner_P)[:, free_P] * pull_M[:, None]
        if not (np.any(free_P) and np.all(np.isfinite(jac_MP))):
            break
        step = np.linalg.lstsq(jac_MP, -pull_M * residual_M, rcond=None)[0]
        moved_P = inner_P.copy()
        moved_P[free_P] += step
        moved_P = np.clip(moved_P, lo_P, hi_P)
        lower = _cost(problem.law, problem.residuals(moved_P))
        if not lower < cost:
            break
        inner_P, cost = moved_P, lower
    return inner_P


def _cost(law: NonlinearLaw, residual_M: Array) -> float:
    """Half the sum of squares, each grown sublinearly beyond the scale; exact for small residuals too."""
    square_M = (residual_M / law.scale) ** 2
    if law.loss == "soft_l1":
        square_M = 2 * square_M / (1 + np.sqrt(1 + square_M))
    elif law.loss == "huber":
        square_M = np.where(square_M <= 1, square_M, 2 * np.sqrt(square_M) - 1)
    return float(0.5 * law.scale**2 * np.sum(square_M))


def _pull(law: NonlinearLaw, residual_M: Array) -> Array:
    """(M,) the derivative of the robust loss: 1 for a small residual, less for one beyond the scale."""
    square_M = (residual_M / law.scale) ** 2
    if law.loss == "soft_l1":
        return 1 / np.sqrt(1 + square_M)
    if law.loss == "huber":
        return np.where(square_M <= 1, 1.0, 1 / np.sqrt(np.maximum(square_M, 1.0)))
    return np.ones_like(square_M)


def _lo(param: Param) -> float:
    # A logarithm needs more than nothing: the least that 64 bits can square.
    return max(param.lo, 1e-150) if param.log else param.lo


def _hi(param: Param) -> float:
    return min(param.hi, 1e150) if param.log else param.hi


def _covariance(jac_MP: Array, cost: float, dof: int, free_P: NDArray[np.bool_]) -> tuple[Array | None, float]:
    """(P, P) covariance by the Gauss-Newton Hessian, and the condition number of the column-scaled Jacobian."""
    covariance = np.zeros((len(free_P),) * 2)
    if jac_MP.shape[1] == 0:
        return (covariance if dof > 0 else None), 1.0
    scale_P = np.sqrt(np.sum(jac_MP**2, axis=0))
    scale_P = np.where(scale_P > 0, scale_P, 1.0)
    _, singular, basis = np.linalg.svd(jac_MP / scale_P, full_matrices=False)
    smallest = max(float(singular[-1]), 1e-15 * float(singular[0]), 1e-300)
    if len(jac_MP) < jac_MP.shape[1] or singular[-1] <= 1e-12 * singular[0] or dof <= 0:
        return None, float(singular[0]) / smallest
    # From the singular values: the inverse of a nearly singular square has negative variances.
    scaled_PP = (basis.T / singular**2) @ basis
    covariance[np.ix_(free_P, free_P)] = 2 * cost / dof * scaled_PP / np.outer(scale_P, scale_P)
    return covariance, float(singular[0]) / smallest

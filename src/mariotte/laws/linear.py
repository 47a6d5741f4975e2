"""Laws that are linear in their parameters, perhaps after a logarithm, and their ordinary least squares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Estimate, Inputs, Law


class LinearLaw(Law):
    """A law of the form g(L) = offset(x) + terms(x) · θ, with g the logarithm or the identity.

    A subclass gives `terms` and, where it has one, `offset`; a parameter with ``Param.log`` enters as its logarithm.
    """

    intercept: ClassVar[bool]
    """Whether one of the terms is a constant; decides which F statistic is the usual one."""

    @abstractmethod
    def terms(self, x: Inputs) -> Array:
        """(M, P) columns that the parameters multiply."""

    def offset(self, x: Inputs) -> Array:
        """(M,) the part without parameters."""
        return np.zeros_like(x.ratio_M)

    def unidentified(self, x: Inputs) -> Mapping[str, str]:
        """Parameters that these points cannot tell anything about, and why; their terms are left out."""
        del x
        return {}

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        with np.errstate(all="ignore"):  # far outside the data the exponential is infinite, and clipped where printed
            linear_M = self.offset(x) + self.terms(x) @ self.to_linear(theta)
            return np.exp(linear_M) if self.log_link else linear_M

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        jac_MP = self.terms(x) / np.where(self._is_log, theta, 1.0)
        return jac_MP * self.f(theta, x)[:, None] if self.log_link else jac_MP

    @override
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        if self.log_link and not np.all(y_M > 0):
            raise FitError(
                f"{self.name} takes logarithms and needs values above 0, "
                f"got {float(np.min(y_M)):g}: leave such points out"
            )
        dropped = self.unidentified(x)
        kept = [i for i, p in enumerate(self.params) if p.name not in dropped]
        names = [self.params[i].name for i in kept]
        if len(y_M) < len(kept):
            raise FitError(
                f"{self.name} estimates {len(kept)} parameters ({', '.join(names)}) and needs at least as many points, "
                f"got {len(y_M)}: measure more ratios"
            )
        design_MP = self.terms(x)[:, kept]
        target_M = (np.log(y_M) if self.log_link else y_M) - self.offset(x)
        if not (np.all(np.isfinite(design_MP)) and np.all(np.isfinite(target_M))):
            raise FitError(f"{self.name} cannot be computed at some of these points: leave out the extreme ones")
        scale_P = np.sqrt(np.sum(design_MP**2, axis=0))
        scale_P = np.where(scale_P > 0, scale_P, 1.0)
        # Columns are scaled to unit length first: ln(1 + 1/(D+1)) is 1e-5 for a few thousand tokens and would
        # otherwise look like a rank deficiency beside ln L0.
        scaled_MP = design_MP / scale_P
        u_MP, singular, v_PP = np.linalg.svd(scaled_MP, full_matrices=False)
        if singular[-1] < 1e-10 * singular[0]:
            raise FitError(
                f"{self.name}: these points cannot tell {' and '.join(names)} apart: add points at other ratios"
            )
        inverse_PP = v_PP.T / singular
        linear_P = (inverse_PP @ (u_MP.T @ target_M)) / scale_P
        dof = len(y_M) - len(kept)
        covariance: Array | None = None
        f_statistic: float | None = None
        f_dof = (len(kept) - self.intercept, dof)
        if dof > 0:
            ssr = float(np.sum((target_M - design_MP @ linear_P) ** 2))
            centre = float(np.mean(target_M)) if self.intercept else 0.0
            explained = float(np.sum((target_M - centre) ** 2)) - ssr
            if f_dof[0] > 0 and ssr > 0:
                f_statistic = explained / f_dof[0] / (ssr / dof)
            covariance = np.zeros((len(self.params),) * 2)
            covariance[np.ix_(kept, kept)] = ssr / dof * (inverse_PP @ inverse_PP.T) / np.outer(scale_P, scale_P)
        full_P = np.zeros(len(self.params))
        full_P[kept] = linear_P
        return Estimate(
            theta=np.where(self._is_log, np.exp(np.where(self._is_log, full_P, 0.0)), full_P),
            covariance=covariance,
            dof=dof,
            dropped=dropped,
            condition=float(singular[0] / singular[-1]),
            recipe=(
                f"ordinary least squares of {'ln L' if self.log_link else 'L'}, "
                f"{'with' if self.intercept else 'without'} an intercept, unweighted"
            ),
            f_statistic=f_statistic,
            f_dof=f_dof if f_statistic is not None else None,
        )

    def to_linear(self, theta: Array) -> Array:
        """(P,) the parameters on the scale on which the law is linear."""
        return np.where(self._is_log, np.log(np.where(self._is_log, theta, 1.0)), theta)

    @property
    def _is_log(self) -> Array:
        return np.array([p.log for p in self.params])

"""The median curve of other models: what a law of models has to beat before it is believed."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Estimate, Inputs, Law, Param

__all__ = ["MedianCurve"]

KNOTS = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
"""Ratios between which the curve is straight; at the first it is 0, beyond the last it stays."""


class MedianCurve(Law):
    """L = L0 + m(r), with m the median damage of the models fitted, piecewise straight between tenths.

    Notes
    -----
    m is found by least absolute deviations: at every ratio half of the damages lie above it. It stays where it is
    beyond the last ratio that was measured. It describes models by others: points of one model alone are refused.
    """

    name: ClassVar[str] = "median-curve"
    formula: ClassVar[str] = "L = L0 + m(r), m the median over models"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio")
    params: ClassVar[tuple[Param, ...]] = tuple(
        Param(f"m{tenth}", typical=0.4 * (tenth / 5) ** 2) for tenth in range(1, 10)
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = None
    log_link: ClassVar[bool] = False
    baseline: ClassVar[bool] = True
    screened: ClassVar[bool] = False
    defects: ClassVar[tuple[str, ...]] = (
        "Whatever is particular to a model is lost: it is another model's curve.",
        "Models are told apart by their dense values, so that two that share one count as one.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return x.base_M + _hats(x.ratio_M) @ theta

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        del theta
        return _hats(x.ratio_M)

    @override
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        from scipy import optimize

        if np.ptp(x.base_M) == 0.0:
            raise FitError(
                f"{self.name} describes a model by others and needs at least two dense values, "
                f"got {x.base_M[0]:g} alone: add other models"
            )
        hats_MP, damage_M = _hats(x.ratio_M), y_M - x.base_M
        kept = np.flatnonzero(np.any(hats_MP != 0, axis=0))
        if len(kept) == 0:
            raise FitError(f"{self.name} needs a point with a ratio above 0, got none: measure one")
        # Least absolute deviations as a linear programme: knots free, every residual split into its two signs.
        m, p = len(y_M), len(kept)
        found = cast("Any", optimize).linprog(
            np.concatenate([np.zeros(p), np.ones(2 * m)]),
            A_eq=np.hstack([hats_MP[:, kept], np.eye(m), -np.eye(m)]),
            b_eq=damage_M,
            bounds=[(None, None)] * p + [(0, None)] * (2 * m),
            method="highs-ds",
        )
        if not found.success:
            raise FitError(f"{self.name} found no median of these {m} points ({found.message}): leave out extremes")
        theta = np.interp(KNOTS[1:], [0.0, *KNOTS[1:][kept]], [0.0, *np.asarray(found.x)[:p]])
        missing = {
            param.name: f"no point lies near ratio {knot:g}; it is taken from its neighbours"
            for i, (param, knot) in enumerate(zip(self.params, KNOTS[1:], strict=True))
            if i not in kept
        }
        return Estimate(
            theta=theta,
            covariance=None,
            dof=m - p,
            dropped={},
            condition=1.0,
            recipe="least absolute deviations of L - L0, unweighted",
            given=missing,
        )


def _hats(ratio_M: Array) -> Array:
    """(M, 9) how much of the damage at every knot a ratio has: linear interpolation between neighbours."""
    columns: list[Array] = [np.interp(ratio_M, KNOTS, np.eye(len(KNOTS))[i]) for i in range(1, len(KNOTS))]
    return np.column_stack(columns)

"""Post-training quantisation by bits and size, as Scaling Laws for Precision have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw, needs_two_bits, relative

__all__ = ["PrecisionLaw"]


FLOOR = 0.005
"""Nats: a damage below this is noise of the measurement."""


class PrecisionLaw(NonlinearLaw):
    r"""L = L0 + C N^(-γN) e^(-b/γP), by soft-L1 least squares of the relative damage.

    Notes
    -----
    The paper's damage is C_T (D^γD / N^γN) e^(-P/γpost), with D the tokens of pre-training. A point does not say D, so
    that C_T D^γD is the one number C here, and models that were trained longer than others must not be pooled with
    them. L and C in nats per token, N the dense parameters in billions, b the bits a weight. A point without bits is
    not quantised.

    References
    ----------
    [kumar2024precision]_ equation of the post-training damage.
    """

    name: ClassVar[str] = "precision-law"
    formula: ClassVar[str] = "L = L0 + C · N^(-γN) · e^(-b/γP)"
    reference: ClassVar[str] = "kumar2024precision"
    inputs: ClassVar[tuple[str, ...]] = ("base", "params", "bits")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("C", typical=40.0, log=True, lo=1e-6, hi=1e9),
        Param("γN", typical=0.3439, lo=-3.0, hi=3.0),
        Param("γP", typical=0.5907, log=True, lo=0.05, hi=10.0),
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = None
    scale: ClassVar[float] = 0.3  # of the damage
    defects: ClassVar[tuple[str, ...]] = (
        "Tokens of pre-training are not known of a point: their factor is folded into C, and models must share them.",
        "The paper's fit and its plots are of the same runs, none held out.",
        "The exponents known here are secondary notes, to be checked before they are quoted.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return x.base_M + theta[0] * _shape(theta, x)

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        shape_M = _shape(theta, x)
        bits_M = np.where(np.isnan(x.bits_M), 0.0, x.bits_M)
        return np.column_stack(
            [shape_M, -theta[0] * shape_M * np.log(x.params_M / 1e9), theta[0] * shape_M * bits_M / theta[2] ** 2]
        )

    @override
    def target(self, x: Inputs, y_M: Array) -> Array:
        return np.maximum(y_M, x.base_M)

    @override
    def weigh(self, x: Inputs, y_M: Array) -> tuple[Array, str]:
        # Damage runs over four powers of ten from 8 bits to 2: in nats the lowest precision alone would be fitted.
        return relative(x, y_M, FLOOR), f"each damage by its share missed, at least {FLOOR:g} nats"

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        return [[0.1, 1.0, 10.0, 100.0, 1e4], [0.0, 0.5], [0.3, 0.6, 1.0]]

    @override
    def refuse(self, x: Inputs) -> None:
        needs_two_bits(self, x)
        if not np.all(x.params_M > 0) or np.ptp(x.params_M) == 0.0:
            raise FitError(
                f"{self.name} needs models of at least two sizes, with their parameters known: add points of another "
                "model, or fit kbits"
            )


def _shape(theta: Array, x: Inputs) -> Array:
    """(M,) damage in units of C; 0 without quantisation."""
    return (x.params_M / 1e9) ** -theta[1] * np.where(np.isnan(x.bits_M), 0.0, np.exp(-x.bits_M / theta[2]))

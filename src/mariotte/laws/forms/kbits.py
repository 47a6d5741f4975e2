"""Damage of quantisation: every further bit takes away the same share of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw, needs_two_bits, relative

__all__ = ["KBits"]


FLOOR = 0.005
"""Nats: a damage below this is noise of the measurement."""


class KBits(NonlinearLaw):
    r"""L = L0 + A e^(-b/τ), by soft-L1 least squares of the relative damage.

    Notes
    -----
    L and A in nats per token, b the bits a weight, scales and zeros included where the source counts them; τ in bits. A
    point without bits is not quantised: it costs nothing. A lies between 1e-6 and 1e9, τ between 0.4 and 10 (0.5 to 2
    on 12 published ladders).
    """

    name: ClassVar[str] = "kbits"
    formula: ClassVar[str] = "L = L0 + A · e^(-b/τ)"
    reference: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("base", "bits")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("A", typical=30.0, log=True, lo=1e-6, hi=1e9),
        Param("τ", typical=0.7, log=True, lo=0.4, hi=10.0),
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = None
    scale: ClassVar[float] = 0.3  # of the damage
    defects: ClassVar[tuple[str, ...]] = (
        "Knows no ratio: what is removed besides is another law's, see composition.",
        "Formats with the same bits differ, and nothing of them but the bits is in it.",
        "From 3 bits and more it misses a fifth of the damage below 3 in the median, and sometimes most of it.",
        "From 5 bits and more alone it says nothing of 3 and fewer: there it was wrong by fifty times.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return x.base_M + theta[0] * _left(theta, x)

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        left_M, bits_M = _left(theta, x), np.where(np.isnan(x.bits_M), 0.0, x.bits_M)
        return np.column_stack([left_M, theta[0] * left_M * bits_M / theta[1] ** 2])

    @override
    def target(self, x: Inputs, y_M: Array) -> Array:
        return np.maximum(y_M, x.base_M)

    @override
    def weigh(self, x: Inputs, y_M: Array) -> tuple[Array, str]:
        # Damage runs over four powers of ten from 8 bits to 2: in nats the lowest precision alone would be fitted.
        return relative(x, y_M, FLOOR), f"each damage by its share missed, at least {FLOOR:g} nats"

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        return [[0.1, 1.0, 10.0, 100.0, 1e4], [0.3, 0.6, 1.0, 2.0]]

    @override
    def refuse(self, x: Inputs) -> None:
        needs_two_bits(self, x)


def _left(theta: Array, x: Inputs) -> Array:
    """(M,) share of A; 0 without quantisation."""
    return np.where(np.isnan(x.bits_M), 0.0, np.exp(-x.bits_M / theta[1]))

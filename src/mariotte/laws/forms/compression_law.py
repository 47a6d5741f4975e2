"""Compression Laws, first version: three exponents for base value, ratio and recovery data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.laws.base import Array, Estimate, Inputs, Kind, Param
from mariotte.laws.linear import LinearLaw

__all__ = ["CompressionLaw"]


class CompressionLaw(LinearLaw):
    r"""L = L0^α (1 + r)^β (1 + 1/(D + 1))^γ, fitted in log space without an intercept, exactly as published.

    Notes
    -----
    L is a loss in nats (β, γ > 0 expected) or an accuracy (β, γ < 0 expected), r the ratio, D the recovery data.
    The paper's "ε, typically 1" is taken as 1. Where all D are equal the last factor is left out (the paper's own
    ablation) and where all r are equal the middle one. Within one series L0 is constant, so that α ln L0 is a free
    intercept: predictions for that model are unharmed, but α then says nothing about another.

    References
    ----------
    [compressionlaws2025]_ equation of section 3, Theorem 3.1, Corollary 3.2 and appendix D.4.
    """

    name: ClassVar[str] = "compression-law"
    formula: ClassVar[str] = "L = L0^α · (1 + r)^β · (1 + 1/(D + 1))^γ"
    reference: ClassVar[str] = "compressionlaws2025"
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio", "tokens")
    params: ClassVar[tuple[Param, ...]] = (Param("α", typical=0.63), Param("β", typical=1.72), Param("γ", typical=1.16))
    anchored: ClassVar[bool] = False
    ratio_param: ClassVar[str | None] = "β"
    intercept: ClassVar[bool] = False
    log_link: ClassVar[bool] = True
    defects: ClassVar[tuple[str, ...]] = (
        "At r = 0 and D = 0 it gives L0^α · 2^γ, not L0; the published γ of the loss makes that 2.23 L0^α.",
        "D is a dummy: with D in thousands of samples 1/(D + 1) is 0 or 1, so γ codes only any recovery or none.",
        "Recovery is relative to L0^α, not to L0; with α ≠ 1 both α and the critical ratio depend on the unit.",
        "The published R² has no intercept and is uncentred; the centred one is far lower on the same points.",
        "1 + r runs from 1 to 2: damage is capped at 2^β and the curve is nearly a straight line, blind to collapse.",
        "α and the choice of model are collinear where few models are pooled; published fits have negative α.",
        "Coefficients came without errors, from five ratios, with the same checkpoints measured several times.",
    )

    @override
    def terms(self, x: Inputs) -> Array:
        return np.column_stack([np.log(x.base_M), np.log1p(x.ratio_M), np.log1p(1.0 / (x.tokens_M + 1.0))])

    @override
    def unidentified(self, x: Inputs) -> Mapping[str, str]:
        dropped: dict[str, str] = {}
        if np.all(x.base_M == 1.0):
            dropped["α"] = "every dense value is 1, so that L0^α is 1 whatever α"
        if np.ptp(x.ratio_M) == 0.0:
            dropped["β"] = f"all points have the same ratio, {x.ratio_M[0]:g}"
        if np.ptp(x.tokens_M) == 0.0:
            dropped["γ"] = f"all points have the same recovery data, D = {x.tokens_M[0]:g}"
        return dropped

    @override
    def invert(self, theta: Array, target: float, base: float, tokens: float) -> float | None:
        alpha, beta, gamma = theta
        if beta == 0 or target <= 0:
            return None
        exponent = (math.log(target) - alpha * math.log(base) - gamma * math.log1p(1.0 / (tokens + 1.0))) / beta
        return math.expm1(exponent) if exponent < 50 else None

    @override
    def remarks(self, estimate: Estimate, x: Inputs, kind: Kind) -> list[str]:
        said: list[str] = []
        if np.ptp(x.base_M) == 0.0 and "α" not in estimate.dropped:
            said.append("one dense value only: α ln L0 is a free intercept, and α says nothing about another model")
        wanted = 1.0 if kind == "loss" else -1.0
        for param, value in zip(self.params[1:], estimate.theta[1:], strict=True):
            if param.name not in estimate.dropped and value * wanted < 0:
                side = "positive" if kind == "loss" else "negative"
                said.append(f"the paper requires {param.name} to be {side} for a {kind}, it is {value:.3g}")
        return said

    @staticmethod
    def critical_ratio(beta: float, sigma: float) -> float:
        """Corollary 3.2: the ratio from which no recovery brings L back to σ L0^α, r_crit = σ^(1/β) - 1.

        For an accuracy (β < 0) σ is in (2^β, 1), for a loss (β > 0) in (1, 2^β); outside, the result is above 1 and
        means that every ratio can be recovered.
        """
        return math.expm1(math.log(sigma) / beta)

    @staticmethod
    def tokens_needed(beta: float, gamma: float, ratio: float, sigma: float) -> float:
        """Theorem 3.1: the least D with L within σ of L0^α; ``inf`` when no D suffices.

        The theorem's condition is 1/(D + 1) ≤ (σ (1 + r)^(-β))^(1/γ) - 1, for accuracies and losses alike.
        """
        room = math.expm1((math.log(sigma) - beta * math.log1p(ratio)) / gamma)
        return math.inf if room <= 0 else max(0.0, 1.0 / room - 1.0)

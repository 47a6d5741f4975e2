"""P² law: the loss of a pruned model after further training, by pruning rate, size and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw

__all__ = ["P2"]


class P2(NonlinearLaw):
    r"""L = L0 + r^γ N^(-δ) (Nc N^(-α) + Dc D^(-β) + E), by soft-L1 least squares of L.

    Notes
    -----
    r is the share removed, N the dense parameters in billions and D the tokens of training after pruning in billions; L
    in nats per token. The paper writes (1/ρ)^γ with γ < 0, which is r^γ with γ > 0 here. Without training, D = 0, the
    law's loss is infinite: points need some.

    References
    ----------
    [p2law2024]_ the form; its coefficients are not known here.
    """

    name: ClassVar[str] = "p2"
    formula: ClassVar[str] = "L = L0 + r^γ · N^(-δ) · (Nc · N^(-α) + Dc · D^(-β) + E)"
    reference: ClassVar[str] = "p2law2024"
    inputs: ClassVar[tuple[str, ...]] = ("base", "ratio", "tokens", "params")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("γ", typical=1.4, log=True, lo=0.05, hi=10.0),
        Param("δ", typical=0.2, lo=-2.0, hi=3.0),
        Param("Nc", typical=0.6, log=True, lo=1e-6, hi=1e3),
        Param("α", typical=0.9, log=True, lo=0.01, hi=5.0),
        Param("Dc", typical=0.5, log=True, lo=1e-6, hi=1e3),
        Param("β", typical=0.5, log=True, lo=0.01, hi=5.0),
        Param("E", typical=0.3, log=True, lo=1e-6, hi=100.0),
    )
    anchored: ClassVar[bool] = True
    ratio_param: ClassVar[str | None] = "γ"
    searched: ClassVar[int] = 3  # of seven parameters each search is long
    defects: ClassVar[tuple[str, ...]] = (
        "Seven parameters: fewer than three sizes, three ratios and three amounts of tokens do not tell them apart.",
        "Without training after pruning its loss is infinite: it says nothing about a model that was only cut.",
        "N^(-δ) multiplies N^(-α): the two exponents of the size are hardly told apart.",
        "Its form is known here from secondary notes, its coefficients not at all.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        removed_M = np.maximum(x.ratio_M, 0.0)
        with np.errstate(all="ignore"):
            size_M, left_M = _parts(theta, x)
            # Nothing removed costs nothing, whatever the rest: without tokens the rest is infinite.
            return x.base_M + np.where(removed_M > 0, removed_M ** theta[0] * size_M * left_M, 0.0)

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        gamma, _, scale_n, alpha, scale_d, beta, _ = theta
        removed_M = np.maximum(x.ratio_M, 0.0)
        size_M, left_M = _parts(theta, x)
        n_M, d_M = x.params_M / 1e9, x.tokens_M / 1e9
        outer_M = removed_M**gamma * size_M
        log_M = np.log(np.where(removed_M > 0, removed_M, 1.0))
        return np.column_stack(
            [
                outer_M * left_M * log_M,
                -outer_M * left_M * np.log(n_M),
                outer_M * n_M**-alpha,
                -outer_M * scale_n * n_M**-alpha * np.log(n_M),
                outer_M * d_M**-beta,
                -outer_M * scale_d * d_M**-beta * np.log(d_M),
                outer_M,
            ]
        )

    @override
    def target(self, x: Inputs, y_M: Array) -> Array:
        return np.maximum(y_M, x.base_M)

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        return [[0.7, 1.5, 3.0], [0.0, 0.5], [0.1, 1.0], [0.4, 1.2], [0.1, 1.0], [0.3, 0.8], [0.1, 1.0]]

    @override
    def refuse(self, x: Inputs) -> None:
        if not np.all(x.tokens_M > 0):
            raise FitError(
                f"{self.name} describes models trained after pruning, got some with no tokens: leave them out"
            )
        if (
            not np.all(x.params_M > 0)
            or len(np.unique(x.params_M)) < 3
            or len(np.unique(x.ratio_M)) < 2
            or len(np.unique(x.tokens_M)) < 3
        ):
            raise FitError(
                f"{self.name} needs at least three sizes of models, with their parameters known, two ratios and three "
                "amounts of tokens: add points"
            )


def _parts(theta: Array, x: Inputs) -> tuple[Array, Array]:
    """(M,) N^(-δ), and the bracket of the formula."""
    _, delta, scale_n, alpha, scale_d, beta, floor = theta
    n_M = x.params_M / 1e9
    # Infinite without tokens, which is what the formula says.
    data_M = np.where(x.tokens_M > 0, scale_d * (np.maximum(x.tokens_M, 1e-300) / 1e9) ** -beta, np.inf)
    return n_M**-delta, scale_n * n_M**-alpha + data_M + floor

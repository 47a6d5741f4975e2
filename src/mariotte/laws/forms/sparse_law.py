"""The loss of a sparse model by its non-zero parameters, as Scaling Laws for Sparsely-Connected models have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from typing_extensions import override

from mariotte.errors import FitError
from mariotte.laws.base import Array, Inputs, Kind, Param
from mariotte.laws.nonlinear import NonlinearLaw

__all__ = ["SparseLaw"]


class SparseLaw(NonlinearLaw):
    r"""L = (a (1 - S)^b + c) N^(-β) + E, by soft-L1 least squares of L.

    Notes
    -----
    S is the sparsity and N = (1 - S) · dense parameters, in billions: the non-zero ones. The paper's term of the data,
    (a_D/D)^(b_D), is folded into E, since a point does not say the tokens of pre-training. L, a, c and E in nats per
    token. The paper prunes while it trains; a model that is pruned afterwards is another thing.

    References
    ----------
    [frantar2023sparsity]_ the law of sparsity, parameters and data.
    """

    name: ClassVar[str] = "sparse-law"
    formula: ClassVar[str] = "L = (a · (1 - S)^b + c) · N^(-β) + E, N non-zero"
    reference: ClassVar[str] = "frantar2023sparsity"
    inputs: ClassVar[tuple[str, ...]] = ("ratio", "params")
    metric_kinds: ClassVar[tuple[Kind, ...]] = ("loss",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("a", typical=0.3, log=True, lo=1e-6, hi=100.0),
        Param("b", typical=0.5, log=True, lo=0.01, hi=10.0),
        Param("c", typical=1.0, log=True, lo=1e-6, hi=100.0),
        Param("β", typical=0.3, log=True, lo=0.01, hi=3.0),
        Param("E", typical=1.6, lo=0.0, hi=20.0),
    )
    anchored: ClassVar[bool] = False
    ratio_param: ClassVar[str | None] = "β"
    defects: ClassVar[tuple[str, ...]] = (
        "It knows the size of a model and not its dense loss: a model that is better than its size is missed.",
        "Found on models that were pruned while they were trained; pruning afterwards is another process.",
        "Five parameters, of which a, b and c are hardly told apart by fewer than three sizes and many sparsities.",
    )

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        a, b, c, beta, floor = theta
        dense_M = 1.0 - x.ratio_M
        return (a * dense_M**b + c) * (dense_M * x.params_M / 1e9) ** -beta + floor

    @override
    def jac(self, theta: Array, x: Inputs) -> Array:
        a, b, c, beta, _ = theta
        dense_M = 1.0 - x.ratio_M
        nonzero_M = dense_M * x.params_M / 1e9
        sized_M = nonzero_M**-beta
        left_M = dense_M**b
        return np.column_stack(
            [
                left_M * sized_M,
                a * left_M * np.log(dense_M) * sized_M,
                sized_M,
                -(a * left_M + c) * sized_M * np.log(nonzero_M),
                np.ones_like(sized_M),
            ]
        )

    @override
    def grid(self, x: Inputs, y_M: Array) -> Sequence[Sequence[float]]:
        floor = float(np.min(y_M))
        return [[0.2, 1.0], [0.3, 1.0, 3.0], [0.2, 1.0], [0.1, 0.3, 0.6], [0.5 * floor, 0.9 * floor]]

    @override
    def refuse(self, x: Inputs) -> None:
        if not np.all(x.params_M > 0) or len(np.unique(x.params_M)) < 2 or len(np.unique(x.ratio_M)) < 3:
            raise FitError(
                f"{self.name} needs models of at least two sizes, with their parameters known, and three sparsities: "
                "add points, or fit a law of one model such as odds"
            )

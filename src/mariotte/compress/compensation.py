"""Least squares: the inputs that a matrix keeps take over what it drew from those it loses.

Shapes: O outputs and I inputs of a linear layer; D, F, K: outputs, inputs and inputs left of a down projection.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from typing import cast

import torch
from torch import Tensor

from mariotte.errors import ChainError

_LinAlgError = cast("type[RuntimeError]", torch.linalg.LinAlgError)  # pyright: ignore[reportPrivateImportUsage] public


@contextlib.contextmanager
def invertible() -> Generator[None]:
    """Say of moments that are singular in floats, in spite of their ridge, what can be done about it.

    Raises
    ------
    ChainError
        When a factorisation inside fails.
    """
    try:
        yield
    except _LinAlgError as error:
        raise ChainError(
            "least squares need a second moment of activations that can be inverted, and got one that cannot: "
            "ask for a larger ridge (or damp), such as 0.01"
        ) from error


def with_ridge(moment_II: Tensor, ridge: float) -> Tensor:
    """The second moment with `ridge` times its mean diagonal added to the diagonal, so that it can be inverted.

    Inputs that are always zero have a mean of zero: they get ones, and any choice among them is as good.
    """
    mean = float(moment_II.diagonal().mean())
    return moment_II + (ridge * mean if mean > 0 else 1.0) * torch.eye(
        len(moment_II), dtype=moment_II.dtype, device=moment_II.device
    )


def check_ridge(step: str, ridge: float) -> None:
    """Refuse a `ridge` with which a second moment may not be invertible.

    Parameters
    ----------
    step : whose field it is, as the message calls it
    ridge : as asked for, a share of the mean diagonal

    Raises
    ------
    ChainError
        When it is not positive, or not finite.
    """
    if not 0 < ridge < math.inf:
        raise ChainError(f"{step}: ridge must be positive, such as 0.01, got {ridge}")


@invertible()
def obs_order(down_DF: Tensor, moment_FF: Tensor) -> Tensor:
    """Columns in the order in which optimal brain surgeon removes them.

    Parameters
    ----------
    down_DF : (D, F) float64, the down projection
    moment_FF : (F, F) float64, positive definite: mean of x xᵀ over its inputs, with a ridge

    Returns
    -------
    (F,) int64: the first is removed first

    Raises
    ------
    ChainError
        When the moment is not positive definite.

    Notes
    -----
    Removing column j and letting the others make up for it by least squares raises the squared output error by
    |w_j|² / (G⁻¹)_jj. The smallest goes, W and G⁻¹ are updated as if it had never been, and again: one greedy nested
    order, so all amounts come from one pass. Of equal ones the first goes first.

    Cost: F steps of one rank-one update each of G⁻¹ and W, so F³ + D F² operations and 2 F² float64.

    References
    ----------
    [hassibi1993optimal]_ equation 5, for columns instead of single weights.
    """
    inverse_KK = torch.cholesky_inverse(cast(Tensor, torch.linalg.cholesky(moment_FF)))
    weight_DK = down_DF.clone()
    left_K = torch.arange(down_DF.shape[1], device=down_DF.device)
    order: list[int] = []
    while len(left_K):
        # The removed stay in the matrices, at infinite cost, until an eighth of them has gone: compacting every time
        # would copy F² numbers a step, never would update three times as many as needed.
        gone_K = torch.zeros(len(left_K), dtype=torch.bool, device=down_DF.device)
        for _ in range(max(1, len(left_K) // 8)):
            error_K = weight_DK.square().sum(0) / inverse_KK.diagonal()
            j = int(error_K.masked_fill(gone_K, torch.inf).argmin())
            order.append(int(left_K[j]))
            column_K, pivot = inverse_KK[:, j].clone(), float(inverse_KK[j, j])
            weight_DK.addmm_(weight_DK[:, j : j + 1].clone(), column_K[None], alpha=-1 / pivot)
            inverse_KK.addmm_(column_K[:, None], column_K[None], alpha=-1 / pivot)
            # Exactly zero by algebra, a rounding error away from it in floats: the removed must not come back.
            inverse_KK[j], inverse_KK[:, j], inverse_KK[j, j] = 0.0, 0.0, 1.0
            gone_K[j] = True
        kept = (~gone_K).nonzero().flatten()
        left_K, weight_DK, inverse_KK = left_K[kept], weight_DK[:, kept], inverse_KK[kept][:, kept]
    return torch.tensor(order)


@invertible()
def least_squares_factors(weight_OI: Tensor, moment_II: Tensor, order_I: Tensor) -> tuple[Tensor, Tensor]:
    """What `compensated` needs for any number of kept columns.

    Parameters
    ----------
    weight_OI : (O, I) float64
    moment_II : (I, I) float64, positive definite
    order_I : (I,) columns, the most important first

    Returns
    -------
    L : (I, I) lower Cholesky factor of the moment in that order
    M : (O, I) the weight in that order, times L

    Raises
    ------
    ChainError
        When the moment is not positive definite.
    """
    factor_II = cast(Tensor, torch.linalg.cholesky(moment_II[order_I][:, order_I]))
    return factor_II, weight_OI[:, order_I] @ factor_II


def compensated(factor_II: Tensor, product_OI: Tensor, kept: int) -> Tensor:
    r"""The first `kept` columns that best stand for all of them.

    Returns
    -------
    (O, kept) in the order of `least_squares_factors`

    Notes
    -----
    The least-squares solution is W G[:, k] (G[k, k])⁻¹ for the kept columns k. With the most important first and
    G = L Lᵀ, G[:, k] = L[:, k] L[k, k]ᵀ, and it is (W L)[:, k] L[k, k]⁻¹: one triangular solve for each amount.
    """
    solve = cast("Callable[..., Tensor]", torch.linalg.solve_triangular)
    return solve(factor_II[:kept, :kept], product_OI[:, :kept], upper=False, left=False)

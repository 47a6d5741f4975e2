"""Least squares: the inputs that a matrix keeps take over what it drew from those it loses.

Shapes: O outputs and I inputs of a linear layer.
"""

from __future__ import annotations

import contextlib
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

"""Compensation against numpy's least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mariotte.compress.compensation import compensated, least_squares_factors, with_ridge


def layer(columns: int, *, outputs: int = 4, tokens: int = 50, seed: int = 0):
    """A down projection (D, F) and its correlated inputs (M, F)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, columns, generator=generator, dtype=torch.float64), inputs


def squared_error(down, inputs, kept, replacement) -> float:
    return float((inputs @ down.T - inputs[:, kept] @ replacement.T).square().mean(0).sum())


@pytest.mark.parametrize("kept", [1, 3, 7])
def test_compensation_equals_lstsq(kept):
    down, inputs = layer(8)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])
    factor, product = least_squares_factors(down, inputs.T @ inputs / len(inputs), order)
    expected, *_ = np.linalg.lstsq(inputs[:, order[:kept]].numpy(), (inputs @ down.T).numpy(), rcond=None)
    np.testing.assert_allclose(compensated(factor, product, kept).numpy(), expected.T, atol=1e-9)


def test_compensation_never_raises_the_squared_error_and_needs_no_second_look():
    down, inputs = layer(12, tokens=30, seed=2)
    moment = with_ridge(inputs.T @ inputs / len(inputs), 0.1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    factor, product = least_squares_factors(down, moment, order)
    for kept in range(1, 13):
        plain = squared_error(down, inputs, order[:kept], down[:, order[:kept]])
        assert squared_error(down, inputs, order[:kept], compensated(factor, product, kept)) <= plain + 1e-9
    torch.testing.assert_close(compensated(factor, product, 12), down[:, order])


def test_a_ridge_is_a_share_of_the_mean_and_never_nothing():
    torch.testing.assert_close(
        with_ridge(torch.diag(torch.tensor([1.0, 3.0])), 0.5), torch.diag(torch.tensor([2.0, 4.0]))
    )
    torch.testing.assert_close(with_ridge(torch.zeros(2, 2), 0.5), torch.eye(2))

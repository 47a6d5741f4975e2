"""Rotations of the residual stream: its principal directions, and random ones.

Shapes: D model width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def principal_directions(moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal directions of a second moment, the largest first.

    Parameters
    ----------
    moment_DD : (D, D) float64, symmetric

    Returns
    -------
    (D, D) with a direction in each column, and (D,) the energy along each

    Notes
    -----
    float64: in float32 the directions of a wide covariance lose orthogonality, and the rotated model drifts. A
    direction has no sign of its own; ours makes its largest entry positive, so that equal moments give equal models.
    """
    energy_D, directions_DD = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(moment_DD))
    energy_D, directions_DD = energy_D.flip(0), directions_DD.flip(1)
    largest_1D = torch.gather(directions_DD, 0, directions_DD.abs().argmax(0, keepdim=True))
    return directions_DD * (1 - 2 * (largest_1D < 0).double()), energy_D


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, (width, width) float64 on the CPU, uniform over all of them."""
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    orthogonal, triangular = cast("tuple[Tensor, Tensor]", torch.linalg.qr(gaussian))
    # Without the signs of the diagonal the factorisation's own choice of them would show.
    return orthogonal * triangular.diagonal().sign()


def without_mean(width: int) -> Tensor:
    """An orthonormal basis of all vectors whose mean is zero, (width, width - 1) float64, one in each column."""
    places = torch.arange(width, dtype=torch.float64)[:, None]
    columns = torch.arange(1, width, dtype=torch.float64)
    return ((places < columns).double() - columns * (places == columns)) / (columns * (columns + 1)).sqrt()

"""The effective dimension tr(J (J + lambda I)^-1) of a Fisher information.

With R the matrix of its R gradient rows, J = R^T R / N, of which the eigenvalues other than zero are those of
R R^T / N: exact while either is small. Otherwise stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017): the
trace from random sign vectors, and for each of them the quadratic form of J (J + lambda I)^-1 by Gauss quadrature on
the tridiagonal matrix of a few Lanczos steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from transferops.fisher.directions import Direction

Matvec = Callable[[Direction], Direction]


class EffectiveDimension(NamedTuple):
    """An effective dimension and how well it is known.

    Attributes:
        value: tr(J (J + lambda I)^-1).
        standard_error: of the value, over random vectors; 0 for the exact methods.
        method: "parameters" (eigenvalues of J), "samples" (those of the Gram matrix of gradients) or "lanczos".
    """

    value: float
    standard_error: float
    method: str


def shrinkage(matrix: torch.Tensor, damping: float) -> float:
    """sum_i mu_i / (mu_i + lambda) over the eigenvalues of a positive semidefinite float64 matrix."""
    eigenvalues = torch.linalg.eigvalsh(matrix).clamp_min(0)
    return float((eigenvalues / (eigenvalues + damping)).sum())


def lanczos_quadrature(
    matvec: Matvec, parameters: Direction, damping: float, probes: int, steps: int, seed: int
) -> EffectiveDimension:
    """The estimate from ``probes`` random vectors, ``steps`` products with J for each.

    The vectors of one probe are kept and kept orthogonal: ``steps`` times the parameters in memory. The standard
    error is that of the random vectors; the quadrature's own error vanishes as the steps grow, exponentially in
    their number divided by sqrt(1 + mu_max / lambda).
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(probes):
        start = {
            name: torch.randint(2, p.shape, generator=generator).to(p).mul_(2).sub_(1) for name, p in parameters.items()
        }
        size = sum(p.numel() for p in parameters.values())
        nodes, weights = _quadrature(matvec, start, steps)
        values.append(size * float((weights * nodes / (nodes + damping)).sum()))
    estimates = torch.tensor(values, dtype=torch.float64)
    return EffectiveDimension(float(estimates.mean()), float(estimates.std()) / probes**0.5, "lanczos")


def _quadrature(matvec: Matvec, start: Direction, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of the spectral measure of J seen from a vector."""
    basis = [_scaled(start, 1 / _inner(start, start) ** 0.5)]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(steps):
        image = matvec(basis[-1])
        diagonal.append(_inner(image, basis[-1]))
        for _ in range(2):  # once leaves what cancellation made
            for vector in basis:
                along = _inner(image, vector)
                image = {name: value - along * vector[name] for name, value in image.items()}
        left = _inner(image, image) ** 0.5
        if left <= 1e-6 * max(map(abs, diagonal)):
            break
        beside.append(left)
        basis.append(_scaled(image, 1 / left))
    size = len(diagonal)
    off = torch.tensor(beside[: size - 1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes.clamp_min(0), vectors[0].square()


def _inner(left: Direction, right: Direction) -> float:
    return sum(float((left[name].double() * right[name]).sum()) for name in left)


def _scaled(vector: Direction, factor: float) -> Direction:
    return {name: value * factor for name, value in vector.items()}

"""The effective dimension tr(J (J + lambda I)^-1) of a Fisher information.

With R the matrix of the gradient rows, J = R^T R / N, of which the eigenvalues other than zero are those of
R R^T / N: exact while either is small. Otherwise stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017): the
trace from random sign vectors, and for each of them the quadratic form of J (J + lambda I)^-1 by Gauss quadrature on
the tridiagonal matrix of a few Lanczos steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transferops._validate import fail
from transferops.fisher.directions import Direction, Directions, refuse_infinite
from transferops.fisher.estimation import Estimation
from transferops.fisher.layers import Gradients, LinearWeight
from transferops.fisher.quantities import Block, Product

_ROWS = 4096  # of the matrix of which eigenvalues are taken: 128 MiB in float64
_GRADIENT_BYTES = 1 << 30  # of gradient rows in memory in one pass over the batches

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


def effective_dimension(
    estimation: Estimation, damping: float, batches: Iterable[Any], probes: int, steps: int
) -> EffectiveDimension:
    """By the cheapest method that is exact, or else the estimate; ``batches`` can be read repeatedly."""
    selected = estimation.selected()
    size = sum(p.numel() for p in selected.values())
    with estimation.passes():
        rows = _count_rows(estimation, batches)
        if rows <= min(size, _ROWS):
            gram = _row_gram(estimation, selected, batches)
            if gram is not None:
                return EffectiveDimension(_shrinkage(gram, damping), 0.0, "samples")
    if size <= _ROWS:
        block = Block(estimation, selected).update(batches).finish()
        return EffectiveDimension(_shrinkage(block, damping), 0.0, "parameters")

    def matvec(vector: Direction) -> Direction:
        product = Product(estimation, Directions([vector], ["direction"], selected)).update(batches).finish()
        return {name: value.to(selected[name].device) for name, value in product.items()}

    return _lanczos_quadrature(matvec, selected, damping, probes, steps, estimation.seed)


def _count_rows(estimation: Estimation, batches: Iterable[Any]) -> int:
    """Of R, if all samples have outputs of the first one's shape."""
    samples = each = 0
    for batch in estimation.batches(batches):
        if not samples:
            with torch.no_grad():
                each = estimation.likelihood().count(batch.rows(0, 1).run(estimation.model))
        samples += batch.samples
    if not samples:
        fail("batches", "at least one sample", "none")
    return samples * each


def _row_gram(estimation: Estimation, parameters: Direction, batches: Iterable[Any]) -> Tensor | None:
    """R R^T / N, float64 on the CPU, in as many passes as the rows need; None if those of one parameter do not fit."""
    total: Tensor | None = None
    samples = 0
    while parameters:
        rows, likelihood, samples = _Rows(), estimation.likelihood(), 0
        for batch in estimation.batches(batches):
            estimation.collect(parameters, batch, likelihood, rows)
            samples += batch.samples
            if rows.overflow:
                return None
        likelihood.labels.finish()
        part = rows.gram()
        total = part if total is None else total.add_(part)
        parameters = {name: parameters[name] for name in rows.later}
    if total is not None:
        refuse_infinite([total])
        total /= samples
    return total


class _Rows:
    """Gradient rows of as many parameters as fit; a weight of a linear layer without positions stays two factors.

    Attributes:
        later: the parameters that did not fit.
        overflow: whether one alone does not.
    """

    def __init__(self) -> None:
        self.later: list[str] = []
        self.overflow = False
        self._parts: dict[str, list[tuple[int, tuple[Tensor, ...]]]] = {}
        self._bytes: dict[str, int] = {}
        self._start = self._stop = 0

    def begin(self, samples: int, first: bool) -> None:
        self._start, self._stop = self._stop, self._stop + samples

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        if name in self.later or self.overflow:
            return
        parts = self._parts.setdefault(name, [])
        factors = _factors(gradients)
        if factors is None or any(len(part) == 1 for _, part in parts):
            values = gradients.rows()
            factors = (values.reshape(len(values), -1),)
            earlier = sum(len(part[0]) for _, part in parts if len(part) == 2)  # samples that had no positions
            if earlier * values[0].numel() * values.element_size() > _GRADIENT_BYTES:
                self._put_off(name)
                return
            parts[:] = [(at, _multiplied(part)) for at, part in parts]
        parts.append((self._start + (rows.start or 0), factors))
        self._bytes[name] = sum(x.numel() * x.element_size() for _, part in parts for x in part)
        if sum(self._bytes.values()) > _GRADIENT_BYTES:
            self._put_off(name)

    def _put_off(self, name: str) -> None:
        self.overflow = len(self._parts) == 1
        self.later.append(name)
        del self._parts[name], self._bytes[name]

    def end(self) -> None: ...

    def gram(self) -> Tensor:
        """R R^T over the parameters that fitted."""
        total = torch.zeros((self._stop, self._stop), dtype=torch.float64)
        for name in list(self._parts):
            parts = self._parts.pop(name)
            # Left to right: a whole row, or input and output gradient, whose products multiply.
            products = [self._products([(at, part[i]) for at, part in parts]) for i in range(len(parts[0][1]))]
            total += (products[0] if len(products) == 1 else products[0].mul_(products[1])).cpu()
        return total

    def _products(self, parts: list[tuple[int, Tensor]]) -> Tensor:
        """X X^T in float64 of rows [M, P], zero where there is none, some columns at a time."""
        width = parts[0][1].shape[1]
        step = max(1, _GRADIENT_BYTES // (64 * max(1, self._stop)))
        result = parts[0][1].new_zeros((self._stop, self._stop), dtype=torch.float64)
        for first in range(0, width, step):
            block = result.new_zeros((self._stop, min(step, width - first)))
            for at, rows in parts:
                block[at : at + len(rows)] = rows[:, first : first + step]
            result.addmm_(block, block.T)
        return result


def _factors(gradients: Gradients) -> tuple[Tensor, ...] | None:
    """Inputs and output gradients, of which the gradients of a linear layer without positions are the products."""
    if isinstance(gradients, LinearWeight) and gradients.inputs.dim() == 2:
        return gradients.inputs, gradients.grads
    return None


def _multiplied(part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.einsum("no,ni->noi", part[1], part[0]).flatten(1),) if len(part) == 2 else part


def _shrinkage(matrix: Tensor, damping: float) -> float:
    """sum_i mu_i / (mu_i + lambda) over the eigenvalues of a positive semidefinite float64 matrix."""
    eigenvalues = torch.linalg.eigvalsh(matrix).clamp_min(0)
    return float((eigenvalues / (eigenvalues + damping)).sum())


def _lanczos_quadrature(
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


def _quadrature(matvec: Matvec, start: Direction, steps: int) -> tuple[Tensor, Tensor]:
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

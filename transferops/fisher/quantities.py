"""The quantities of a Fisher information, one class each: what is summed over samples and what it amounts to.

All but the Gram matrix and the product are collectors of per-sample gradients, see :mod:`transferops.fisher.collect`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

from transferops._validate import describe, fail
from transferops.fisher.accumulate import Accumulator
from transferops.fisher.batches import Batch
from transferops.fisher.directions import Direction, Directions, refuse_infinite
from transferops.fisher.estimation import Estimation
from transferops.fisher.fallback import pull_back
from transferops.fisher.layers import ConvWeight, Gradients, LinearWeight
from transferops.fisher.routes import kronecker_weights

BLOCK_ELEMENTS = 4096  # 128 MiB as a float64 matrix

Result = TypeVar("Result")
Factors = dict[str, tuple[Tensor, Tensor]]


class Gram(Accumulator[Tensor]):
    """Theta^T J Theta, float64 [K, K]."""

    def __init__(self, estimation: Estimation, directions: Directions) -> None:
        super().__init__(estimation)
        self._directions = directions
        self._sum = estimation.numbers(len(directions), len(directions))

    def _add(self, batch: Batch) -> None:
        self._sum += self._estimation.gram(self._directions, batch, self._likelihood).to(self._sum.device)

    def _sums(self) -> list[Tensor]:
        return [self._sum]

    def _result(self, averages: list[Tensor]) -> Tensor:
        gram = averages[0].cpu()
        self._directions.check_finite([gram])
        return _semidefinite((gram + gram.T) / 2)


def _semidefinite(gram: Tensor) -> Tensor:
    """The matrix, a sum of squares, if rounding has left it one: far more than rounding is needed to fail."""
    lowest, trace = float(torch.linalg.eigvalsh(gram)[0]), float(gram.trace())
    if lowest < -1e-3 * trace or trace < 0:
        raise ArithmeticError(
            f"gram: expected eigenvalues of at least 0, got {lowest:.3g} with a trace of {trace:.3g}; please report it"
        )
    return gram


class Product(Accumulator[Direction]):
    """J v."""

    def __init__(self, estimation: Estimation, direction: Directions) -> None:
        super().__init__(estimation)
        self._direction = direction
        self._parameters = estimation.selected()
        self._values = {name: estimation.zeros(p, p.shape) for name, p in self._parameters.items()}

    def _add(self, batch: Batch) -> None:
        cotangent = self._estimation.response(self._direction, batch, self._likelihood)
        for name, value in pull_back(self._estimation.model, self._parameters, batch, cotangent).items():
            self._values[name] += value.to(self._values[name].device)

    def _sums(self) -> list[Tensor]:
        return list(self._values.values())

    def _result(self, averages: list[Tensor]) -> Direction:
        self._direction.check_finite(averages)
        return dict(zip(self._parameters, averages))


class Collected(Accumulator[Result]):
    """A quantity that takes per-sample gradients as they come by; a :class:`transferops.fisher.collect.Collector`."""

    def __init__(self, estimation: Estimation, parameters: Direction) -> None:
        super().__init__(estimation)
        self._parameters = parameters

    def _add(self, batch: Batch) -> None:
        if self._parameters:
            self._estimation.collect(self._parameters, batch, self._likelihood, self)

    def begin(self, samples: int, first: bool) -> None: ...

    @abstractmethod
    def add(self, name: str, gradients: Gradients, rows: slice) -> None: ...

    def end(self) -> None: ...


class Diagonal(Collected[Direction]):
    """(1/N) sum_n g_n^2 of every parameter, in at least float32."""

    def __init__(self, estimation: Estimation) -> None:
        super().__init__(estimation, estimation.selected())
        self._squares: Direction = {}

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        p, part = self._parameters[name], gradients.diagonal()
        if name in self._squares:
            self._squares[name] += part.to(self._squares[name].device)
        else:
            self._squares[name] = part.to(self._estimation.zeros(p, ()))

    def _sums(self) -> list[Tensor]:
        for name, p in self._parameters.items():
            if name not in self._squares:  # no gradient came
                self._squares[name] = self._estimation.zeros(p, p.shape)
        return [self._squares[name] for name in self._parameters]

    def _result(self, averages: list[Tensor]) -> Direction:
        refuse_infinite(averages)
        return dict(zip(self._parameters, averages))


class Trace(Collected[float]):
    """(1/N) sum_n |g_n|^2."""

    def __init__(self, estimation: Estimation) -> None:
        super().__init__(estimation, estimation.selected())
        self._sum = estimation.numbers()

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        self._sum += gradients.norms().sum(dtype=torch.float64).to(self._sum.device)

    def _sums(self) -> list[Tensor]:
        return [self._sum]

    def _result(self, averages: list[Tensor]) -> float:
        refuse_infinite(averages)
        return float(averages[0])


class Block(Collected[Tensor]):
    """R^T R / N, float64 [P, P], with R = [N, P] the gradients of some parameters side by side, one row per sample."""

    def __init__(self, estimation: Estimation, parameters: Direction) -> None:
        super().__init__(estimation, parameters)
        self._sizes = {name: p.numel() for name, p in parameters.items()}
        self._rows = torch.empty(0)
        size = sum(self._sizes.values())
        self._sum = estimation.numbers(size, size)

    @classmethod
    def of(cls, estimation: Estimation, name: str) -> Block:
        """That of one parameter, or of all in a module."""
        selected = estimation.selected()
        parameters = {n: p for n, p in selected.items() if n == name or n.startswith(f"{name}.")}
        if not parameters:
            fail("name", "the name of a selected parameter, or of a module with some", describe(name))
        size = sum(p.numel() for p in parameters.values())
        if size > BLOCK_ELEMENTS:
            fail("name", f"parameters of at most {BLOCK_ELEMENTS} elements", f"{name!r} of {size}")
        return cls(estimation, parameters)

    def begin(self, samples: int, first: bool) -> None:
        some = next(iter(self._parameters.values()))
        self._rows = some.new_zeros((samples, len(self._sum)), dtype=torch.float64)

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        p, columns = self._parameters[name], torch.split(self._rows, list(self._sizes.values()), 1)
        units = torch.eye(p.numel(), dtype=p.dtype, device=p.device).view(-1, *p.shape).unbind()
        columns[list(self._sizes).index(name)][rows] = gradients.project(units)

    def end(self) -> None:
        self._sum += (self._rows.T @ self._rows).to(self._sum.device)

    def _sums(self) -> list[Tensor]:
        return [self._sum]

    def _result(self, averages: list[Tensor]) -> Tensor:
        refuse_infinite(averages)
        return averages[0].cpu()


class Kronecker(Collected[Factors]):
    """The two factors of the weights of linear layers and convolutions, A [I, I] and G [O, O]."""

    def __init__(self, estimation: Estimation) -> None:
        super().__init__(estimation, kronecker_weights(estimation.model, estimation.selected()))
        self._factors: Factors = {}
        for name, p in self._parameters.items():
            rows = len(p)
            columns = p.numel() // rows
            self._factors[name] = estimation.zeros(p, (columns, columns)), estimation.zeros(p, (rows, rows))
        self._found: set[str] = set()
        self._first = True

    def begin(self, samples: int, first: bool) -> None:
        self._first = first
        self._found.clear()

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        if isinstance(gradients, (LinearWeight, ConvWeight)):
            inputs, grads = self._factors[name]
            if self._first:  # the inputs are the same in every sweep of a batch
                inputs += gradients.input_factor().to(inputs.device)
            grads += gradients.grad_factor().to(grads.device)
            self._found.add(name)

    def end(self) -> None:
        missing = [name for name in self._parameters if name not in self._found]
        if missing:
            fail("model", f"{missing[0]!r} to be used by its layer only", "a weight without Kronecker factors")

    def _sums(self) -> list[Tensor]:
        return [factor for pair in self._factors.values() for factor in pair]

    def _result(self, averages: list[Tensor]) -> Factors:
        refuse_infinite(averages)
        return dict(zip(self._factors, zip(averages[::2], averages[1::2])))

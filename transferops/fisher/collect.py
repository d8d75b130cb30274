"""What is kept of per-sample gradients as they come by, parameter after parameter: one class per quantity.

A sweep announces its samples, hands over the gradients of each parameter (of all samples, or of some rows at a
time), and ends. A collector's result is a sum over samples and cotangents; the average is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from transferops.fisher.directions import Direction
from transferops.fisher.layers import ConvWeight, Gradients, LinearWeight


class Collector(Protocol):
    """One pass over per-sample gradients."""

    def begin(self, samples: int, first: bool) -> None:
        """A sweep over this many samples starts, the first or another one of its batch."""

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        """The gradients of one parameter for some of the samples."""

    def end(self) -> None:
        """The sweep is over."""


class Scores:
    """S_nk = g_n . delta_k, summed over all parameters; and, sweep by sweep, the sum of S^T S.

    Args:
        directions: delta_k, K dictionaries.
        parameters: those that they move.
        gram: float64 [K, K], to which S^T S is added.

    Attributes:
        scores: S, float64 [N, K] of the last sweep.
    """

    def __init__(self, directions: Sequence[Direction], parameters: Direction, gram: Tensor) -> None:
        self._directions = directions
        self._parameters = parameters
        self._gram = gram
        self.scores = gram

    def begin(self, samples: int, first: bool) -> None:
        some = next(iter(self._parameters.values()))
        self.scores = some.new_zeros((samples, len(self._directions)), dtype=torch.float64)

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        columns = [k for k, direction in enumerate(self._directions) if name in direction]
        moves = [self._directions[k][name].detach() for k in columns]
        part = self.scores[rows]
        part[:, columns] += gradients.project(moves)

    def end(self) -> None:
        # Only now that every parameter has been added: the Gram of a sum is not the sum of Grams.
        self._gram += (self.scores.T @ self.scores).cpu()


class Diagonal:
    """sum_n g_n^2 of every parameter, in at least float32."""

    def __init__(self) -> None:
        self._sums: Direction = {}

    def begin(self, samples: int, first: bool) -> None: ...

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        part = gradients.diagonal()
        self._sums[name] = self._sums[name].add_(part) if name in self._sums else part

    def end(self) -> None: ...

    def result(self, parameters: Direction) -> Direction:
        """Of these parameters, zero where no gradient came."""
        return {n: self._sums[n] if n in self._sums else zeros(p) for n, p in parameters.items()}


class Trace:
    """sum_n |g_n|^2."""

    def __init__(self) -> None:
        self.result = 0.0

    def begin(self, samples: int, first: bool) -> None: ...

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        self.result += float(gradients.norms().sum(dtype=torch.float64))

    def end(self) -> None: ...


class Dense:
    """R^T R, float64 [P, P], with R = [N, P] the gradients of all parameters side by side, one row per sample."""

    def __init__(self, parameters: Direction) -> None:
        self._parameters = parameters
        self._sizes = {name: p.numel() for name, p in parameters.items()}
        self._rows = torch.empty(0)
        size = sum(self._sizes.values())
        self.result = torch.zeros((size, size), dtype=torch.float64)

    def begin(self, samples: int, first: bool) -> None:
        some = next(iter(self._parameters.values()))
        self._rows = some.new_zeros((samples, len(self.result)), dtype=torch.float64)

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        p, columns = self._parameters[name], torch.split(self._rows, list(self._sizes.values()), 1)
        units = torch.eye(p.numel(), dtype=p.dtype, device=p.device).view(-1, *p.shape).unbind()
        columns[list(self._sizes).index(name)][rows] = gradients.project(units)

    def end(self) -> None:
        self.result += (self._rows.T @ self._rows).cpu()


class Kronecker:
    """The two factors of the weights of linear layers and convolutions.

    Attributes:
        inputs: name to sum_n mean_t a a^T.
        grads: name to sum_n sum_t b b^T.
    """

    def __init__(self) -> None:
        self.inputs: Direction = {}
        self.grads: Direction = {}
        self._first = True

    def begin(self, samples: int, first: bool) -> None:
        self._first = first

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        if isinstance(gradients, (LinearWeight, ConvWeight)):
            if self._first:  # the inputs are the same in every sweep of a batch
                self.inputs[name] = self.inputs.get(name, 0) + gradients.input_factor()
            self.grads[name] = self.grads.get(name, 0) + gradients.grad_factor()

    def end(self) -> None: ...


def zeros(p: Tensor) -> Tensor:
    """A zero sum over a parameter's shape, in at least float32."""
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))

"""What is kept of per-sample gradients as they come by, parameter after parameter."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from transferops.fisher.directions import Directions, LowRank, dense
from transferops.fisher.layers import Gradients, LinearWeight

_BLOCK_ELEMENTS = 1 << 26  # of one parameter of several directions at a time: 256 MiB in float32


class Collector(Protocol):
    """One pass over per-sample gradients.

    A sweep announces its samples, hands over the gradients of each parameter (of all samples, or of some rows at a
    time), and ends.
    """

    def begin(self, samples: int, first: bool) -> None:
        """A sweep over this many samples starts, the first or another one of its batch."""

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        """The gradients of one parameter for some of the samples."""

    def end(self) -> None:
        """The sweep is over."""


class Scores:
    """S_nk = g_n . delta_k, summed over all parameters; and, sweep by sweep, the sum of S^T S.

    Args:
        directions: delta_k.

    Attributes:
        scores: S, float64 [N, K] of the last sweep.
        gram: the sum of S^T S, float64 [K, K].
    """

    def __init__(self, directions: Directions) -> None:
        self._directions = directions
        self._like = next(iter(directions.parameters.values()))
        self.gram = self._like.new_zeros((len(directions), len(directions)), dtype=torch.float64)
        self.scores = self.gram

    def begin(self, samples: int, first: bool) -> None:
        self.scores = self._like.new_zeros((samples, len(self._directions)), dtype=torch.float64)

    def add(self, name: str, gradients: Gradients, rows: slice) -> None:
        parameter, moves = self._directions.parameters[name], self._directions.moving(name)
        part = self.scores[rows]
        if isinstance(gradients, LinearWeight):
            products = {k: move for k, move in moves.items() if isinstance(move, LowRank)}
            if products:
                _add_columns(part, list(products), gradients.project_products(list(products.values())))
            moves = {k: move for k, move in moves.items() if k not in products}
        columns = list(moves)
        step = max(1, _BLOCK_ELEMENTS // max(1, parameter.numel()))
        for start in range(0, len(columns), step):
            block = columns[start : start + step]
            _add_columns(part, block, gradients.project([dense(moves[k], parameter) for k in block]))

    def end(self) -> None:
        # Only now that every parameter has been added: the Gram of a sum is not the sum of Grams.
        self.gram += self.scores.T @ self.scores


def _add_columns(total: Tensor, columns: list[int], values: Tensor) -> None:
    """Add to some columns, in ascending order; a list as an index would be copied to the device, and waited for."""
    first, last = columns[0], columns[-1]
    if last - first + 1 == len(columns):
        total[:, first : last + 1] += values
    else:
        for column, value in zip(columns, values.unbind(1)):
            total[:, column] += value

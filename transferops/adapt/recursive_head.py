"""A head that follows a stream of samples, one rank-one update each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from transferops._validate import describe, fail
from transferops.adapt.head_solver import HeadSolver


class RecursiveHead:
    """Recursive least squares with forgetting, started from a :class:`HeadSolver`.

    Without forgetting the head after every sample is exactly what the solver would give for all samples so far. With a
    forgetting factor f the weights of all samples so far, and the penalty, are multiplied by f before each new one.
    Cost of a sample: p^2 + p c, against p^3 for a new solution.

    Args:
        solver: with at least one sample; it is not changed and not kept.
        lam: the penalty, positive and finite.
        forgetting: f in (0, 1].

    Attributes:
        weight: [c, p] float64.
        samples: rows seen, those of the solver included.

    Raises:
        ValueError: ``lam`` or ``forgetting`` is out of range, or the solver has no samples.
    """

    def __init__(self, solver: HeadSolver, lam: float, forgetting: float = 1.0) -> None:
        for name, value, most in (("lam", lam, float("inf")), ("forgetting", forgetting, 1.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
                fail(name, f"a positive number of at most {most:g}", describe(value))
        if lam == float("inf"):
            fail("lam", "a finite number", "inf")
        path = solver.path([lam], held_out=False)
        spectrum = path.spectrum
        if spectrum.weight <= 0:
            fail("solver", "samples of positive weight", "none")
        self.forgetting = float(forgetting)
        self.samples = spectrum.samples
        self._scale = path.target_scale
        self._labelled = solver.labelled
        self.weight, bias = path.head(lam)
        # Features are taken relative to the mean at the start, which makes the information matrix block diagonal there:
        # G + lam I for the weight, the number of samples for the bias.
        self._shift = spectrum.feature_mean
        self._offset = bias + self.weight @ self._shift
        size = len(self._shift) + 1
        self._inverse = self.weight.new_zeros(size, size)
        v = spectrum.directions
        gain = (1 / (spectrum.eigenvalues + lam) - 1 / lam).unsqueeze(1)
        self._inverse[:-1, :-1] = torch.eye(size - 1, dtype=v.dtype, device=v.device) / lam + v @ (gain * v.mT)
        self._inverse[-1, -1] = 1 / spectrum.weight

    @property
    def bias(self) -> Tensor:
        """[c] float64."""
        return self._offset - self.weight @ self._shift

    def update(self, features: Tensor | Any, targets: Tensor | Any) -> Self:
        """Add samples in order.

        Args:
            features: [N, p] floating point.
            targets: [N, c], or labels [N], as the solver had.

        Raises:
            TypeError, ValueError: as :meth:`HeadSolver.update`.
        """
        rows = HeadSolver(self.weight, keep_rows=0).check(features, targets)
        if rows.labelled != self._labelled:
            kinds = ("numbers [N, c]", "labels [N]")
            fail("targets", f"{kinds[bool(self._labelled)]} as the solver had", kinds[rows.labelled])
        dense = rows.dense_targets(len(self.weight)) * self._scale
        for z, y in zip(rows.features.double() - self._shift, dense):
            extended = torch.cat([z, z.new_ones(1)])
            gain = self._inverse @ extended
            total = self.forgetting + extended.dot(gain)
            error = y - self.weight @ z - self._offset
            change = torch.outer(error, gain / total)
            self.weight = self.weight + change[:, :-1]
            self._offset = self._offset + change[:, -1]
            self._inverse = (self._inverse - torch.outer(gain, gain) / total) / self.forgetting
        self.samples += len(rows)
        return self

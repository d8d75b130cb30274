"""Every penalty's head from one eigendecomposition.

With z, y about their means, G = sum w z z^T and R = sum w z (y - W z)^T for the prior W, the head of penalty lam is
W + ((G + lam I)^-1 R)^T. In the eigenbasis G = V diag(s) V^T this is one division per direction. With fewer samples
than features the same quantities come from the N x N matrix of inner products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from transferops._validate import fail
from transferops.adapt.head_rows import Rows
from transferops.adapt.head_statistics import HeadStatistics, weighted_mean

_GRID = (50, -8.0, 2.0)  # default penalties: how many, decades of the largest eigenvalue


@dataclass(frozen=True)
class Prior:
    """The head that small data should not move far from: weight [c, p] and bias [c] (or None), float64."""

    weight: Tensor
    bias: Tensor | None


class SampleBasis(NamedTuple):
    """All samples in the eigenbasis of their inner products, zero eigenvalues included.

    Attributes:
        vectors: [N, N - 1], orthonormal and orthogonal to the square roots of the weights; [N, N] without intercept.
        eigenvalues: [N - 1] or [N].
        along: [N - 1, c] or [N, c], the vectors' products with sqrt(w) (y - W z), W the prior.
    """

    vectors: Tensor
    eigenvalues: Tensor
    along: Tensor


@dataclass(frozen=True)
class Spectrum:
    """G and R in the eigenbasis of G, in float64.

    Attributes:
        eigenvalues: [k] s > 0, descending; those below rounding error are dropped.
        directions: [p, k] V.
        projections: [k, c] V^T R.
        residual_square: [c], sum w (y - W z)^2 about its mean: what the prior leaves, its bias fitted.
        feature_mean, target_mean: [p], [c].
        weight: sum of the weights.
        samples: how many.
        prior: the head for an infinite penalty.
        basis: of all samples, if this came from the N x N form.
        intercept: whether there is a bias without penalty. If not, the last feature is the constant 1, its weight is
            the bias and penalised like the others, and "about the mean" is about 0 everywhere.
    """

    eigenvalues: Tensor
    directions: Tensor
    projections: Tensor
    residual_square: Tensor
    feature_mean: Tensor
    target_mean: Tensor
    weight: float
    samples: int
    prior: Prior
    basis: SampleBasis | None = None
    intercept: bool = True

    @staticmethod
    def of_statistics(statistics: HeadStatistics, prior: Prior, intercept: bool = True) -> Spectrum:
        """From the p x p form; cost about 9 p^3 (one eigendecomposition) and 4 p^2 c."""
        if not intercept:
            origin = torch.zeros_like(statistics.feature_mean), torch.zeros_like(statistics.target_mean)
            statistics = statistics.about(*origin)
        explained = statistics.gram @ prior.weight.mT if prior.weight.any() else torch.zeros_like(statistics.cross)
        values, vectors = torch.linalg.eigh(statistics.gram)
        values, vectors = _significant(values, vectors, len(values))
        square = statistics.target_square + (prior.weight.mT * (explained - 2 * statistics.cross)).sum(0)
        return Spectrum(
            values, vectors, vectors.mT @ (statistics.cross - explained), square.clamp(min=0),
            statistics.feature_mean, statistics.target_mean, float(statistics.weight), statistics.samples, prior,
            None, intercept,
        )  # fmt: skip

    @staticmethod
    def of_rows(rows: Rows, targets: Tensor, prior: Prior, intercept: bool = True) -> Spectrum:
        """From the N x N form, targets [N, c] float64; cost 2 N^2 p (inner products, directions) and about 9 N^3."""
        weights = rows.weight()
        feature_mean, target_mean = weighted_mean(rows.features, weights), weighted_mean(targets, weights)
        if not intercept:
            feature_mean, target_mean = torch.zeros_like(feature_mean), torch.zeros_like(target_mean)
        root = weights.sqrt().unsqueeze(1)
        features = root * (rows.features.double() - feature_mean)
        residuals = root * (targets - target_mean) - features @ prior.weight.mT
        products = features @ features.mT
        total = weights.sum()
        if intercept:
            # The square roots of the weights are an eigenvector of eigenvalue 0. Made the largest one, it comes last
            # and can be left out without disturbing other directions of eigenvalue 0.
            unit = root / total.sqrt() if total > 0 else root
            products += (2 * products.trace() + 1) * unit @ unit.mT
        values, vectors = torch.linalg.eigh(products)
        values, vectors = values[: len(values) - intercept].clamp(min=0), vectors[:, : len(values) - intercept]
        basis = SampleBasis(vectors, values, vectors.mT @ residuals)
        values, vectors = _significant(values, vectors, max(features.shape))
        root_values = values.sqrt()
        return Spectrum(
            values, features.mT @ (vectors / root_values), root_values.unsqueeze(1) * (vectors.mT @ residuals),
            residuals.square().sum(0), feature_mean, target_mean, float(total), len(rows), prior, basis, intercept,
        )  # fmt: skip

    def shrinkage(self, lam: float | Tensor) -> Tensor:
        """1 / (s + lam): [k, 1], or [k, c] for penalties [c]."""
        lam = torch.as_tensor(lam, dtype=torch.float64, device=self.eigenvalues.device)
        return 1 / (self.eigenvalues.unsqueeze(1) + lam.reshape(1, -1))

    def change(self, lam: float | Tensor) -> Tensor:
        """V^T (W_lam - W)^T [k, c]."""
        return self.shrinkage(lam) * self.projections

    def head(self, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        """Weight [c, p] and bias [c], for one penalty or one per output."""
        weight = self.prior.weight + (self.directions @ self.change(lam)).mT
        if not self.intercept:
            return weight[:, :-1], weight[:, -1]
        bias = self.target_mean - weight @ self.feature_mean
        if self.prior.bias is not None:
            kept = torch.as_tensor(lam, dtype=torch.float64, device=bias.device).isinf()
            bias = torch.where(kept, self.prior.bias, bias)
        return weight, bias

    def training_squares(self, lams: Sequence[float]) -> Tensor:
        """sum w |y - W_lam z - b_lam|^2 [L, c]."""
        penalties = torch.tensor(lams, dtype=torch.float64, device=self.eigenvalues.device).unsqueeze(1)
        shrinkage = 1 / (self.eigenvalues + penalties)
        gain = (shrinkage * (2 - shrinkage * self.eigenvalues)) @ self.projections.square()
        squares = (self.residual_square - gain).clamp(min=0)
        return torch.where(
            penalties.isinf(), self.residual_square + self.weight * self.prior_offset().square(), squares
        )

    def prior_offset(self) -> Tensor:
        """Mean residual [c] of the prior as it is; 0 where its bias is fitted."""
        if self.prior.bias is None:
            return torch.zeros_like(self.target_mean)
        return self.target_mean - self.prior.weight @ self.feature_mean - self.prior.bias

    def default_lams(self) -> Tensor:
        """50 penalties from 1e-8 to 100 times the largest eigenvalue, and infinity."""
        largest = float(self.eigenvalues[0]) if len(self.eigenvalues) else 1.0
        count, low, high = _GRID
        grid = largest * torch.logspace(low, high, count, dtype=torch.float64)
        return torch.cat([grid, grid.new_tensor([math.inf])])


class HeldOut(NamedTuple):
    """On samples left out: mean squared residual [L, c] and, for labels, the share of right answers [L]."""

    loss: Tensor
    accuracy: Tensor | None


@dataclass(frozen=True, eq=False)
class HeadPath:
    """What every penalty of a grid gives. Losses are in units of the targets before scaling.

    Attributes:
        lams: [L] penalties, ascending; infinity is the prior as it is.
        training: [L, c] float64, mean squared residual on the samples at hand.
        held_out: [L, c], mean squared residual on samples left out, or None if that was not measured.
        accuracy: [L], share of the left-out samples whose largest output is that of their label; None if targets are
            not labels or it was not measured.
        held_out_by: how, in words.
        degrees_of_freedom: [L], sum s / (s + lam); the intercept not counted.
        change: [L], Frobenius norm of the change of the weight.
        target_scale: the factor of the targets.
        spectrum: of the centred features, from which heads are made.
    """

    lams: Tensor
    training: Tensor
    held_out: Tensor | None
    accuracy: Tensor | None
    held_out_by: str
    degrees_of_freedom: Tensor
    change: Tensor
    target_scale: float
    spectrum: Spectrum = field(repr=False)

    @staticmethod
    def of(
        spectrum: Spectrum, lams: Tensor, held_out: HeldOut | None, held_out_by: str, target_scale: float
    ) -> HeadPath:
        """Fill in what the spectrum, of scaled targets, knows; ``held_out`` is of scaled targets too."""
        values = lams.tolist()
        s = spectrum.eigenvalues
        shrinkage = 1 / (s + lams.to(s.device).unsqueeze(1))
        unit = target_scale**2
        return HeadPath(
            lams,
            spectrum.training_squares(values) / (spectrum.weight * unit),
            None if held_out is None else held_out.loss / unit,
            None if held_out is None else held_out.accuracy,
            held_out_by,
            shrinkage @ s,
            (shrinkage.square() @ spectrum.projections.square().sum(1)).sqrt(),
            target_scale,
            spectrum,
        )

    def head(self, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        """Weight [c, p] and bias [c], float64, for a penalty (on the grid or not) or one per output [c]."""
        return self.spectrum.head(lam)

    def best(self, *, per_output: bool = False) -> float | Tensor:
        """The penalty of the smallest held-out loss, of equals the largest.

        Args:
            per_output: one penalty for each output, [c], instead of one for their sum.

        Raises:
            ValueError: no loss was measured on samples left out, or none is finite.
        """
        if self.held_out is None:
            fail("path", "held-out losses to choose by", "none")
        loss = self.held_out if per_output else self.held_out.sum(1, keepdim=True)
        if not bool(loss.isfinite().any(0).all()):
            fail("path", "a penalty with a finite held-out loss for every output", "none; add larger ones")
        position = (len(loss) - 1 - loss.flip(0).argmin(0)).to(self.lams.device)
        return self.lams[position] if per_output else float(self.lams[position])

    def held_out_at(self, lam: float) -> float:
        """Held-out loss, summed over outputs, at the penalty of the grid nearest to ``lam``; NaN if not measured."""
        return math.nan if self.held_out is None else float(self.held_out[self._position(lam)].sum())

    def accuracy_at(self, lam: float) -> float:
        """Held-out accuracy at the penalty of the grid nearest to ``lam``; NaN if not measured."""
        return math.nan if self.accuracy is None else float(self.accuracy[self._position(lam)])

    def _position(self, lam: float) -> int:
        if math.isinf(lam):
            return int(self.lams.argmax())
        return int((self.lams.clamp(1e-300, 1e300).log() - math.log(max(lam, 1e-300))).abs().argmin())


def rounding_error(eigenvalues: Tensor, size: int) -> Tensor:
    """Of the eigenvalues of a matrix of this size, computed in float64."""
    return eigenvalues.max() * size * torch.finfo(torch.float64).eps if len(eigenvalues) else eigenvalues.sum()


def _significant(eigenvalues: Tensor, vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs above the rounding error of the matrix, largest first."""
    kept = eigenvalues > rounding_error(eigenvalues, size).clamp(min=0)
    return eigenvalues[kept].flip(0), vectors[:, kept].flip(1)

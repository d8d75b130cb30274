"""Every penalty's head from one eigendecomposition, and what each would lose on samples it has not seen.

With z, y about their means, G = sum w z z^T and R = sum w z (y - W z)^T for the prior W, the head of penalty lam is
W + ((G + lam I)^-1 R)^T. In the eigenbasis G = V diag(s) V^T this is one division per direction. With fewer samples
than features the same quantities come from the N x N matrix of inner products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from transferops._validate import fail
from transferops.adapt.head_rows import Rows
from transferops.adapt.head_statistics import HeadStatistics, weighted_mean

_GRID = (50, -8.0, 2.0)  # default penalties: how many, decades of the largest eigenvalue
# Of 1 - h, below which a leave-one-out residual would be rounding error: by subtraction, and summed up.
_SMALLEST_SHARE, _SMALLEST_SUM = 1e-10, 1e-14


@dataclass(frozen=True)
class Prior:
    """The head that small data should not move far from: weight [c, p] and bias [c] (or None), float64."""

    weight: Tensor
    bias: Tensor | None


class SampleBasis(NamedTuple):
    """All samples in the eigenbasis of their inner products, zero eigenvalues included.

    Attributes:
        vectors: [N, N - 1], orthonormal and orthogonal to the square roots of the weights.
        eigenvalues: [N - 1].
        along: [N - 1, c], the vectors' products with sqrt(w) (y - W z), W the prior.
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

    @staticmethod
    def of_statistics(statistics: HeadStatistics, prior: Prior) -> Spectrum:
        """From the p x p form; cost about 9 p^3 (one eigendecomposition) and 4 p^2 c."""
        explained = statistics.gram @ prior.weight.mT
        values, vectors = torch.linalg.eigh(statistics.gram)
        values, vectors = _significant(values, vectors, len(values))
        square = statistics.target_square + (prior.weight.mT * (explained - 2 * statistics.cross)).sum(0)
        return Spectrum(
            values, vectors, vectors.mT @ (statistics.cross - explained), square.clamp(min=0),
            statistics.feature_mean, statistics.target_mean, float(statistics.weight), statistics.samples, prior,
        )  # fmt: skip

    @staticmethod
    def of_rows(rows: Rows, targets: Tensor, prior: Prior) -> Spectrum:
        """From the N x N form, targets [N, c] float64; cost 2 N^2 p (inner products, directions) and about 9 N^3."""
        weights = rows.weight()
        feature_mean, target_mean = weighted_mean(rows.features, weights), weighted_mean(targets, weights)
        root = weights.sqrt().unsqueeze(1)
        features = root * (rows.features.double() - feature_mean)
        residuals = root * (targets - target_mean) - features @ prior.weight.mT
        products = features @ features.mT
        # The square roots of the weights are an eigenvector of eigenvalue 0. Made the largest one, it comes last and
        # can be left out without disturbing other directions of eigenvalue 0.
        total = weights.sum()
        unit = root / total.sqrt() if total > 0 else root
        shift = 2 * products.trace() + 1
        values, vectors = torch.linalg.eigh(products + shift * unit @ unit.mT)
        values, vectors = values[:-1].clamp(min=0), vectors[:, :-1]
        basis = SampleBasis(vectors, values, vectors.mT @ residuals)
        values, vectors = _significant(values, vectors, max(features.shape))
        root_values = values.sqrt()
        return Spectrum(
            values, features.mT @ (vectors / root_values), root_values.unsqueeze(1) * (vectors.mT @ residuals),
            residuals.square().sum(0), feature_mean, target_mean, float(total), len(rows), prior, basis,
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


def leave_one_out(spectrum: Spectrum, lams: Sequence[float], rows: Rows, targets: Tensor) -> HeldOut:
    """Leave-one-out without refitting: mean of w (e / (1 - h))^2.

    The residual of a sample under the head fitted without it is e / (1 - h), with e its residual in the fit of all
    and h = w (1 / sum w + z^T (G + lam I)^-1 z) its leverage; this holds exactly for the ridge with free intercept
    around any prior. Rows that are not all the samples give the ratio of leave-one-out to training loss, which then
    multiplies the exact training loss of all samples.

    Args:
        spectrum: of all samples.
        lams: penalties.
        rows, targets: the samples, or a uniform sample of them, with targets [M, c] float64. If the spectrum came from
            the N x N form, the same rows.
    """
    sums = [_Sums(spectrum.residual_square) for _ in lams]
    has_prior = bool(spectrum.prior.weight.any())  # without one a third of the work is saved
    start = 0
    for block in rows.blocks():
        y = targets[start : start + len(block)]
        centred = block.features.double() - spectrum.feature_mean
        residuals = y - spectrum.target_mean
        if has_prior:
            residuals -= centred @ spectrum.prior.weight.mT
        if spectrum.basis is None:
            fits = _fits(spectrum, lams, block.weight(), centred, residuals)
        else:
            fits = _complete_fits(spectrum, lams, block.weight(), start)
        for lam, total, (fit, remaining) in zip(lams, sums, fits):
            if math.isinf(lam) and spectrum.prior.bias is not None:
                fit, remaining = residuals + spectrum.prior_offset(), torch.ones_like(remaining)
            floor = _SMALLEST_SHARE if spectrum.basis is None else _SMALLEST_SUM
            left = torch.where((remaining > floor).unsqueeze(1), fit / remaining.unsqueeze(1), math.inf)
            right = (y - left).argmax(1) == block.targets if block.labelled else None
            total.add(block.weight(), fit, left, right)
        start += len(block)
    losses = torch.stack([total.left for total in sums]) / spectrum.weight
    if len(rows) < spectrum.samples:
        training = torch.stack([total.training for total in sums]) / spectrum.weight
        ratio = torch.where(training > 0, losses / training, torch.ones_like(losses))
        losses = ratio * spectrum.training_squares(lams) / spectrum.weight
    accuracy = torch.stack([total.right for total in sums]) / rows.weight().sum() if rows.labelled else None
    return HeldOut(losses, accuracy)


class _Sums:
    """Over rows, for one penalty: w e^2 and w (e / (1 - h))^2 [c], weight of the right answers []."""

    def __init__(self, like: Tensor) -> None:
        self.training, self.left = torch.zeros_like(like), torch.zeros_like(like)
        self.right = like.new_zeros(())

    def add(self, weights: Tensor, fit: Tensor, left: Tensor, right: Tensor | None) -> None:
        self.training += weights @ fit.square()
        self.left += weights @ left.square()
        if right is not None:
            self.right += weights @ right.double()


Fits = Iterator[tuple[Tensor, Tensor]]


def _fits(spectrum: Spectrum, lams: Sequence[float], weights: Tensor, centred: Tensor, residuals: Tensor) -> Fits:
    """Residuals [M, c] of the fit and 1 - h [M], for each penalty."""
    coordinates = centred @ spectrum.directions
    squares = coordinates.square()
    for lam in lams:
        shrinkage = spectrum.shrinkage(lam)[:, 0]
        fit = torch.addmm(residuals, coordinates * shrinkage, spectrum.projections, alpha=-1)
        yield fit, 1 - weights * (1 / spectrum.weight + squares @ shrinkage)


def _complete_fits(spectrum: Spectrum, lams: Sequence[float], weights: Tensor, start: int) -> Fits:
    """The same from the N x N form, up to a factor of both, where 1 - h is a sum of positive terms and cannot cancel.

    e = lam sum_j v_j (v_j^T q) / (s_j + lam) and 1 - h = lam sum_j v_j^2 / (s_j + lam), with q and e weighted by
    sqrt(w): the factor lam drops out of their ratio, and lam = 0 is the limit (the directions of eigenvalue 0 alone, if
    there are any). The rows are those from ``start`` on.
    """
    assert spectrum.basis is not None
    vectors, s, along = spectrum.basis
    rows = vectors[start : start + len(weights)]
    root = weights.sqrt().unsqueeze(1)
    for lam in lams:
        if math.isinf(lam):
            factor = torch.ones_like(s)
        elif lam > 0:
            factor = 1 / (s + lam)
        else:
            empty = s <= _cut(s, max(len(spectrum.feature_mean), len(vectors)))
            factor = empty.double() if bool(empty.any()) else 1 / s
        factor = (factor / factor.max()).unsqueeze(1)
        fit = rows @ (factor * along)
        yield torch.where(root > 0, fit / root, fit), (rows.square() @ factor)[:, 0]  # nothing counts a weight of 0


def k_fold(spectra: Sequence[Spectrum], folds: Sequence[HeadStatistics], lams: Sequence[float]) -> HeldOut:
    """The loss of each fold under the head fitted without it, from statistics alone; they know nothing of accuracy.

    Args:
        spectra: of all samples but those of the fold, fold by fold.
        folds: the statistics of the folds.
        lams: penalties.
    """
    total = torch.zeros(())
    for spectrum, fold in zip(spectra, folds, strict=True):
        total = total + torch.stack(_fold_squares(spectrum, fold, lams))
    return HeldOut(total / sum(float(fold.weight) for fold in folds), None)


def _fold_squares(spectrum: Spectrum, fold: HeadStatistics, lams: Sequence[float]) -> list[Tensor]:
    """sum w |y - W_lam z - b_lam|^2 [c] over a fold, multiplied out in the eigenbasis of the others."""
    prior, directions = spectrum.prior, spectrum.directions
    explained = fold.gram @ prior.weight.mT
    square = fold.target_square + (prior.weight.mT * (explained - 2 * fold.cross)).sum(0)
    along = directions.mT @ (fold.cross - explained)
    gram = directions.mT @ fold.gram @ directions
    moved = fold.feature_mean - spectrum.feature_mean
    moved_directions = directions.mT @ moved
    offset = fold.target_mean - spectrum.target_mean - prior.weight @ moved
    squares = []
    for lam in lams:
        change = spectrum.change(lam)
        mean = offset - moved_directions @ change
        if math.isinf(lam) and prior.bias is not None:
            mean = fold.target_mean - prior.weight @ fold.feature_mean - prior.bias
        inner = (change * (gram @ change - 2 * along)).sum(0)
        squares.append((square + inner).clamp(min=0) + fold.weight * mean.square())
    return squares


def _cut(eigenvalues: Tensor, size: int) -> Tensor:
    return eigenvalues.max() * size * torch.finfo(torch.float64).eps if len(eigenvalues) else eigenvalues.sum()


def _significant(eigenvalues: Tensor, vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs above the rounding error of the matrix, largest first."""
    kept = eigenvalues > _cut(eigenvalues, size).clamp(min=0)
    return eigenvalues[kept].flip(0), vectors[:, kept].flip(1)

"""What each penalty's head would lose on samples it has not seen, without refitting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from transferops.adapt.head_path import HeldOut, Spectrum, rounding_error
from transferops.adapt.head_rows import Rows
from transferops.adapt.head_statistics import HeadStatistics

# Of 1 - h, below which a leave-one-out residual would be rounding error: by subtraction, and summed up.
_SMALLEST_SHARE, _SMALLEST_SUM = 1e-10, 1e-14


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
    for block, y, fits in _left_out(spectrum, lams, rows, targets):
        for total, (fit, left) in zip(sums, fits):
            right = (y - left).argmax(1) == block.targets if block.labelled else None
            total.add(block.weight(), fit, left, right)
    losses = torch.stack([total.left for total in sums]) / spectrum.weight
    if len(rows) < spectrum.samples:
        training = torch.stack([total.training for total in sums]) / spectrum.weight
        ratio = torch.where(training > 0, losses / training, torch.ones_like(losses))
        losses = ratio * spectrum.training_squares(lams) / spectrum.weight
    accuracy = torch.stack([total.right for total in sums]) / rows.weight().sum() if rows.labelled else None
    return HeldOut(losses, accuracy)


def left_out_outputs(spectrum: Spectrum, lam: float, rows: Rows, targets: Tensor) -> Tensor:
    """Outputs [M, c] for each row of the head fitted without it; arguments as for :func:`leave_one_out`."""
    return torch.cat([y - left for _, y, fits in _left_out(spectrum, [lam], rows, targets) for _, left in fits])


Fits = Iterator[tuple[Tensor, Tensor]]


def _left_out(
    spectrum: Spectrum, lams: Sequence[float], rows: Rows, targets: Tensor
) -> Iterator[tuple[Rows, Tensor, Fits]]:
    """Block by block the rows, their targets, and for each penalty the residuals with and without a row [M, c].

    The residuals of the N x N form with the row are right up to a factor.
    """
    has_prior = bool(spectrum.prior.weight.any())  # without one a third of the work is saved
    floor = _SMALLEST_SHARE if spectrum.basis is None else _SMALLEST_SUM
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
        yield block, y, _each(spectrum, lams, fits, residuals, floor)
        start += len(block)


def _each(spectrum: Spectrum, lams: Sequence[float], fits: Fits, residuals: Tensor, floor: float) -> Fits:
    for lam, (fit, remaining) in zip(lams, fits):
        if math.isinf(lam) and spectrum.prior.bias is not None:
            kept = residuals + spectrum.prior_offset()
            yield kept, kept
        else:
            yield fit, torch.where((remaining > floor).unsqueeze(1), fit / remaining.unsqueeze(1), math.inf)


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


def _fits(spectrum: Spectrum, lams: Sequence[float], weights: Tensor, centred: Tensor, residuals: Tensor) -> Fits:
    """Residuals [M, c] of the fit and 1 - h [M], for each penalty."""
    coordinates = centred @ spectrum.directions
    share = 1 / spectrum.weight if spectrum.intercept else 0.0
    shrinkage = torch.cat([spectrum.shrinkage(lam) for lam in lams], 1)
    leverages = coordinates.square() @ shrinkage
    few = len(coordinates) < residuals.shape[1]  # the smaller factor is scaled
    for factor, leverage in zip(shrinkage.unbind(1), leverages.unbind(1)):
        left = coordinates * factor if few else coordinates
        right = spectrum.projections if few else factor.unsqueeze(1) * spectrum.projections
        yield torch.addmm(residuals, left, right, alpha=-1), 1 - weights * (share + leverage)


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
            empty = s <= rounding_error(s, max(len(spectrum.feature_mean), len(vectors)))
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

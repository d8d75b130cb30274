"""How outputs lie along the singular vectors of uncentred features."""

from __future__ import annotations

import torch
from torch import Tensor

from transferops import ops
from transferops.scores.moments import FeatureMoments

# s_k [r], the nonzero squared singular values of F, ascending, and x_k^2 [M, r]: the squared coefficients of the M
# outputs along the left singular vectors.
Spectrum = tuple[Tensor, Tensor]


def spectrum_of_moments(moments: FeatureMoments) -> Spectrum:
    """N > D: everything from F^T F and F^T Y, which the centred moments and the means give."""
    gram = torch.addr(moments.gram, moments.mean, moments.mean, alpha=moments.samples)
    cross = moments.sums + moments.counts.unsqueeze(1) * moments.mean  # [C, D]: sums of features by class
    values, vectors = torch.linalg.eigh(gram)
    first = _first_kept(values)
    return values[first:], (cross @ vectors[:, first:]).square() / values[first:]


def spectrum_of_samples(features: Tensor, centred: ops.SampleGram, targets: Tensor) -> Spectrum:
    """N <= D: from the eigenvectors of F F^T and targets [N, M]."""
    mean = centred.shift
    along = features.double() @ mean - mean.dot(mean)  # y_n . mean, for y = f - mean
    values, vectors = torch.linalg.eigh(centred.gram + along + along.unsqueeze(1) + mean.dot(mean))
    first = _first_kept(values)
    return values[first:], (vectors[:, first:].mT @ targets).square().mT


def spectrum_of_features(features: Tensor, targets: Tensor) -> Spectrum:
    """From features [N, D] and targets [N, M]."""
    if len(features) <= features.shape[1]:
        return spectrum_of_samples(features, ops.sample_gram(features), targets)
    wide = features.double()
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    first = _first_kept(values)
    return values[first:], (targets.mT @ wide @ vectors[:, first:]).square() / values[first:]


def _first_kept(values: Tensor) -> int:
    """Where the ascending eigenvalues rise above rounding."""
    return int((values <= len(values) * torch.finfo(torch.float64).eps * values[-1]).sum())

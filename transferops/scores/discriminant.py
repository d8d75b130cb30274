"""Linear discriminant analysis with a shrunk covariance, the classifier inside SFDA and ETran.

The papers take generalised eigenvectors U of the between- and within-class covariances, normalised to U^T S U = I with
S the shrunk within-class covariance, and classify by x^T U U^T mu_c - mu_c^T U U^T mu_c / 2 + ln pi_c. With all
eigenvectors, as in the released code, U U^T = S^-1 [derived]: one Cholesky factorisation gives the same classifier.
(Code that takes eigh of the unsymmetric S^-1 S_b gets an orthonormal U instead, U U^T = I: the nearest class mean.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transferops.scores.moments import FeatureMoments

_LEAST_SHRINKAGE = 1e-10


class Discriminant:
    """Class probabilities of a Gaussian model with one covariance (1 - lambda) S_w + lambda tr(S_w)/D I.

    S_w is the within-class covariance over N. lambda = max(exp(-strength sigma), 1e-10), sigma its largest eigenvalue
    [paper: Shao et al., ECCV 2022; the trace in the target of the shrinkage as in the released code].

    Args:
        moments: of labelled features.
        strength: the factor in lambda.
        shrinkage: lambda, if it is given and not computed.

    Attributes:
        shrinkage: lambda.
        caveat: the text of a warning, or "".
    """

    def __init__(self, moments: FeatureMoments, strength: float, shrinkage: float | None = None) -> None:
        samples, dimension = moments.samples, moments.mean.numel()
        counts = moments.counts.double()
        means = moments.sums / counts.unsqueeze(1)
        total = float(moments.gram.trace()) / samples
        within = (moments.gram - (means * counts.unsqueeze(1)).mT @ means) / samples
        scale = float(within.trace())
        self.caveat = ""
        if scale <= 1e-14 * total:
            within, scale = torch.zeros_like(within), 1e-10 * total
            self.caveat = (
                "every feature is constant"
                if total == 0
                else "the samples of each class coincide, so the classes are perfectly apart"
            )
        if shrinkage is None:
            largest = float(torch.linalg.eigvalsh(within)[-1])
            shrinkage = max(math.exp(-strength * largest), _LEAST_SHRINKAGE)
        self.shrinkage = shrinkage
        covariance = within * (1 - shrinkage)
        covariance.diagonal().add_(shrinkage * scale / dimension if total > 0 else 1.0)
        self._mean = moments.mean
        self._weights = torch.cholesky_solve(means.mT, torch.linalg.cholesky(covariance))
        self._bias = (counts / samples).log() - (means.mT * self._weights).sum(0) / 2

    def log_posterior(self, features: Tensor) -> Tensor:
        """ln p(c | x), [N, C] float64."""
        return ((features.double() - self._mean) @ self._weights + self._bias).log_softmax(1)

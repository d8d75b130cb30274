"""TransRate: mutual information between features and labels, by coding rates.

[paper: Huang et al., ICML 2022, "Frustratingly Easy Transferability Estimation"]: with Z the centred features [N, D]
and R(Z) = 1/2 ln det(I + Z^T Z / (N eps)), TransRate = R(Z) - sum_c (n_c / N) R(Z_c), Z_c the rows of class c.

The published code averages the classes without their sizes and uses eps = 1e-4 whatever the scale of the features. Here
classes are weighted by size, as in the definition, and eps is relative to the mean variance of a feature by default
[derived], so that the score does not change when all features are multiplied by one number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import describe, fail
from transferops.scores._warnings import warn
from transferops.scores.moments import check_batch, check_finite
from transferops.scores.rows import RowScore


class TransRate(RowScore):
    """Streaming :func:`trans_rate`. Keeps the features: the rate of a class needs its rows.

    Args:
        eps, relative: as for :func:`trans_rate`.
    """

    def __init__(self, eps: float = 1e-4, *, relative: bool = True) -> None:
        super().__init__()
        if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not (0 < eps < math.inf):
            fail("eps", "a positive number", describe(eps))
        self.eps = float(eps)
        self.relative = bool(relative)

    def _check(self, values: Any, labels: Any) -> tuple[Tensor, Tensor]:
        features, labels = check_batch(values, labels)
        check_finite(features)
        return features, labels

    def _score(self, values: Tensor, labels: Tensor) -> float:
        samples, dim = values.shape
        whole = _Rate.of(values, None)
        if whole.trace == 0:
            warn("trans_rate: every feature is constant, so the score is 0")
            return 0.0
        eps = self.eps * (whole.trace / (samples * dim) if self.relative else 1.0)
        classes, index = torch.unique(labels, return_inverse=True)
        if len(classes) == 1:
            warn("trans_rate: all samples are of one class, so there is nothing to tell apart and the score is 0")
            return 0.0
        within = 0.0
        for label in range(len(classes)):
            rows = values[index == label]
            within += len(rows) / samples * _Rate.of(rows, whole.mean).rate(eps)
        return whole.rate(eps) - within


class _Rate:
    """The smaller Gram matrix of rows about a point, and how many rows."""

    def __init__(self, gram: Tensor, mean: Tensor, rows: int) -> None:
        self.gram, self.mean, self.rows = gram, mean, rows
        self.trace = float(gram.trace())

    @staticmethod
    def of(features: Tensor, about: Tensor | None) -> _Rate:
        """About ``about`` [D], or the column means."""
        rows, dim = features.shape
        if rows > dim:
            one_class = torch.zeros(rows, dtype=torch.long, device=features.device)
            _, _, gram, mean = ops.class_moments(features, one_class, 1)
            if about is not None:
                offset = mean - about
                gram = gram + rows * torch.outer(offset, offset)
            return _Rate(gram, mean, rows)
        gram, mean = ops.sample_gram(features)
        if about is not None:
            offset = mean - about
            along = features.double() @ offset - mean.dot(offset)
            gram = gram + along + along.unsqueeze(1) + offset.dot(offset)
        return _Rate(gram, mean, rows)

    def rate(self, eps: float) -> float:
        """1/2 ln det(I + Z^T Z / (N eps)); the same for Z Z^T."""
        matrix = self.gram / (self.rows * eps)
        matrix.diagonal().add_(1)
        return float(torch.linalg.cholesky(matrix).diagonal().log().sum())


def trans_rate(features: Tensor | Any, labels: Tensor | Any, *, eps: float = 1e-4, relative: bool = True) -> float:
    """TransRate of features for labels; higher means more transferable.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16.
        labels: [N] integers of any values.
        eps: distortion of the code, positive.
        relative: eps is in units of the mean variance of a feature; False for the published, scale-dependent form.

    Returns:
        The score in nats, at least 0 up to rounding.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a feature is NaN or infinite, eps is not positive.

    Warns:
        ScoreWarning: a single class or constant features (the score is 0).
    """
    return TransRate(eps, relative=relative).update(features, labels).compute()

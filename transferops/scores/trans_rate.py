"""TransRate: mutual information between features and labels, by coding rates.

[paper: Huang et al., ICML 2022, "Frustratingly Easy Transferability Estimation"]: with Z the centred features [N, D]
and R(Z) = 1/2 ln det(I + Z^T Z / (N eps)), TransRate = R(Z) - sum_c (n_c / N) R(Z_c), Z_c the rows of class c.

The published code averages the classes without their sizes and uses eps = 1e-4 whatever the scale of the features. Here
classes are weighted by size, as in the definition, and eps is relative to the mean variance of a feature by default
[derived], so that the score does not change when all features are multiplied by one number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import check_positive
from transferops.scores.base import ScoreDetails
from transferops.scores.features import FeatureScore, FeatureSet


class TransRate(FeatureScore):
    """Streaming :func:`trans_rate`. Keeps the features: the rate of a class needs its rows.

    Args:
        eps, relative: as for :func:`trans_rate`.
    """

    name = "trans_rate"
    keeps_rows = True

    def __init__(self, eps: float = 1e-4, *, relative: bool = True) -> None:
        self.eps = check_positive("eps", eps)
        self.relative = bool(relative)
        super().__init__()

    def _evaluate(self, data: FeatureSet) -> ScoreDetails:
        samples, dimension, classes = data.samples, data.dimension, data.classes
        gram = data.sample_gram.gram if data.few else data.moments.gram
        trace = float(gram.trace())
        caveat = ""
        if trace == 0:
            caveat = "trans_rate: every feature is constant, so the score is 0"
        elif classes == 1:
            caveat = "trans_rate: all samples are of one class, so there is nothing to tell apart and the score is 0"
        if caveat:
            return ScoreDetails(0.0, samples, classes, dimension, warnings=(caveat,))
        eps = self.eps * (trace / (samples * dimension) if self.relative else 1.0)
        whole = _rate(gram, samples, eps)
        within = sum(
            len(rows) / samples * _rate(_gram_about(data.features.index_select(0, rows), data.mean), len(rows), eps)
            for rows in data.by_class
        )
        parts = {"rate": whole, "rate_within_classes": within, "eps": eps}
        return ScoreDetails(whole - within, samples, classes, dimension, parts=parts)


def _gram_about(features: Tensor, about: Tensor) -> Tensor:
    """The smaller Gram matrix, [N, N] or [D, D], of rows about a point."""
    rows, dim = features.shape
    if rows > dim:
        one_class = torch.zeros(rows, dtype=torch.long, device=features.device)
        _, _, gram, mean = ops.class_moments(features, one_class, 1, validate=False)
        offset = mean - about
        return torch.addr(gram, offset, offset, alpha=rows)
    gram, mean = ops.sample_gram(features, validate=False)
    offset = mean - about
    along = (features.to(offset.dtype) @ offset).sub_((mean - offset / 2).dot(offset))  # with |offset|^2 / 2 each
    return gram.add_(along).add_(along.unsqueeze(1))


def _rate(gram: Tensor, rows: int, eps: float) -> float:
    """1/2 ln det(I + Z^T Z / (N eps)) from Z^T Z; the same from Z Z^T."""
    matrix = gram / (rows * eps)
    matrix.diagonal().add_(1)
    factor, info = torch.linalg.cholesky_ex(matrix, upper=True)  # as LAPACK's, without a transposed copy
    if not info:
        return float(factor.diagonal().log().sum())
    # The identity is below the rounding of the Gram matrix, which is singular then: what stands out of that counts.
    spectrum = torch.linalg.eigvalsh(gram)
    kept = spectrum[spectrum > len(spectrum) * torch.finfo(spectrum.dtype).eps * spectrum[-1]]
    return float((kept / (rows * eps)).log1p().sum() / 2)


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
    return TransRate(eps, relative=relative)._once(features, labels)

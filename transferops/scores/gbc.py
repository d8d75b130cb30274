"""GBC: how little the classes overlap, each taken as a Gaussian.

[paper: Pandy et al., CVPR 2022, "Transferability Estimation using Bhattacharyya Class Separability"]: on the leading 64
principal components of the features, with mean mu_c and covariance S_c per class (diagonal, or one variance for all
directions: spherical), the Bhattacharyya distance of two classes, S = (S_i + S_j) / 2,

    D_ij = 1/8 (mu_i - mu_j)^T S^-1 (mu_i - mu_j) + 1/2 ln(det S / sqrt(det S_i det S_j)),

and GBC = - sum over i != j of exp(-D_ij), each pair counted twice as in the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transferops._validate import check_positive_int, describe, fail
from transferops.scores.base import ScoreDetails
from transferops.scores.features import FeatureScore, FeatureSet

_BLOCK_ELEMENTS = 1 << 22
_COVARIANCES = ("diagonal", "spherical")


class Gbc(FeatureScore):
    """Streaming :func:`gbc`. Keeps the features: the principal components are known only at the end.

    Args:
        covariance, components: as for :func:`gbc`.
    """

    name = "gbc"
    keeps_rows = True

    def __init__(self, covariance: str = "diagonal", *, components: int | None = 64) -> None:
        if covariance not in _COVARIANCES:
            fail("covariance", " or ".join(map(repr, _COVARIANCES)), describe(covariance))
        self.covariance = covariance
        self.components = components if components is None else check_positive_int("components", components)
        super().__init__()

    def _evaluate(self, data: FeatureSet) -> ScoreDetails:
        points = data.principal_components(self.components)
        rank, classes = points.shape[1], data.classes
        caveat = ""
        if classes == 1:
            caveat = "gbc: all samples are of one class, so there is nothing to tell apart and the score is 0"
        elif rank == 0:
            caveat = "gbc: every feature is constant, so the classes coincide"
        elif int(data.counts.min()) == 1:
            single = int((data.counts == 1).sum())
            caveat = f"gbc: {single} of {classes} classes have one sample: without a variance they overlap with none"
        means = points.new_zeros(classes, rank).index_add_(0, data.index, points) / data.counts.unsqueeze(1)
        spread = points.new_zeros(classes, rank).index_add_(0, data.index, (points - means[data.index]).square())
        variances = spread / data.counts.unsqueeze(1)
        # What is left of a variance that is zero but for rounding.
        variances[variances < 1e-24 * points.square().mean(0)] = 0
        if self.covariance == "spherical":
            variances = variances.mean(1, keepdim=True).expand_as(variances)
        value = -_overlap(means, variances)
        warnings = (caveat,) if caveat else ()
        return ScoreDetails(value, data.samples, classes, data.dimension, rank=rank, warnings=warnings)


def _overlap(means: Tensor, variances: Tensor) -> float:
    """sum over i != j of exp(-D_ij); means, variances [C, k]."""
    classes, width = means.shape
    rows = max(_BLOCK_ELEMENTS // max(classes * width, 1), 1)
    logs = variances.log()
    total = 0.0
    for start in range(0, classes, rows):
        part = slice(start, start + rows)
        pooled = (variances[part].unsqueeze(1) + variances) / 2
        distance = (means[part].unsqueeze(1) - means).square() / pooled / 8
        distance = distance + (pooled.log() - (logs[part].unsqueeze(1) + logs) / 2) / 2
        # Two classes without variance in a direction: nothing if they coincide there, apart for good otherwise.
        both = pooled == 0
        apart = means[part].unsqueeze(1) != means
        distance = torch.where(both, torch.where(apart, torch.inf, 0.0), distance)
        overlap = torch.exp(-distance.sum(2))
        rows_here = torch.arange(len(overlap), device=overlap.device)
        overlap[rows_here, rows_here + start] = 0
        total += float(overlap.sum())
    return total


def gbc(
    features: Tensor | Any, labels: Tensor | Any, *, covariance: str = "diagonal", components: int | None = 64
) -> float:
    """Gaussian Bhattacharyya coefficient of the classes; higher means more transferable.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16.
        labels: [N] integers of any values.
        covariance: "diagonal" or "spherical".
        components: principal components to keep, at most the rank; None for all.

    Returns:
        The score, between -C(C-1) and 0. It does not change with the features' scale, nor under rotation.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a feature is NaN or infinite, an option is unknown.

    Warns:
        ScoreWarning: a single class; constant features; classes of one sample.
    """
    return Gbc(covariance, components=components)._once(features, labels)

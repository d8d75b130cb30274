"""PARC: do samples of a class lie closer together than others?

[paper: Bolya, Mittapalli and Hoffman, NeurIPS 2021, "Scalable Diverse Model Selection for Accessible Transfer
Learning"]: the Spearman correlation, times 100, of two distances over all pairs of samples: 1 - Pearson correlation of
their features (the leading principal components, each scaled to unit variance), and of their one-hot labels.

A correlation over components depends on the sign of each, which is free: the largest loading of each direction is taken
to be positive, as by the scikit-learn of the released code.

The second distance takes two values only, so the rank correlation is that of the first one's ranks with "other class"
[derived]: no N x N matrix of labels, and no ranks of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from transferops._validate import check_positive_int
from transferops.scores.base import ScoreDetails
from transferops.scores.features import FeatureScore, FeatureSet


class Parc(FeatureScore):
    """Streaming :func:`parc`. Keeps the features.

    Args:
        components: as for :func:`parc`.
    """

    name = "parc"
    keeps_rows = True

    def __init__(self, *, components: int | None = 32) -> None:
        self.components = components if components is None else check_positive_int("components", components)
        super().__init__()

    def _evaluate(self, data: FeatureSet) -> ScoreDetails:
        samples, classes = data.samples, data.classes
        points = data.features.double() if self.components is None else data.principal_components(self.components)
        points = points - points.mean(0)
        points = points / _or_one(points.square().mean(0).sqrt())
        points = points - points.mean(1, keepdim=True)
        norms = points.norm(dim=1, keepdim=True)
        level = norms < 1e-12  # of values scaled to variance 1
        points = torch.where(level, 0, points / _or_one(norms))
        upper = torch.triu_indices(samples, samples, 1, device=points.device)
        # Correlations that differ by rounding are tied: of two components all are 1 or -1.
        distance = -(points @ points.mT)[upper[0], upper[1]].round(decimals=10)
        other = data.index[upper[0]] != data.index[upper[1]]
        value, caveat = _rank_correlation(distance, other), ""
        if value is None:
            value = 0.0
            caveat = "parc: all pairs of samples are equally far in features or in labels, so the score is 0"
        elif bool(level.any()):
            caveat = f"parc: {int(level.sum())} samples are level over all components: their correlations count as 0"
        warnings = (caveat,) if caveat else ()
        parts = {"pairs": float(len(distance))}
        rank = None if self.components is None else points.shape[1]
        return ScoreDetails(100 * value, samples, classes, data.dimension, rank=rank, warnings=warnings, parts=parts)


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1)


def _rank_correlation(values: Tensor, flag: Tensor) -> float | None:
    """Spearman correlation of values with a flag, ties at their mean rank; None if either is constant."""
    count = len(values)
    ordered, order = values.sort()
    _, ties = torch.unique_consecutive(ordered, return_counts=True)
    flagged = int(flag.sum())
    if count == 0 or len(ties) == 1 or flagged in (0, count):
        return None
    ends = ties.cumsum(0).double()
    ranks = torch.repeat_interleave(ends - (ties.double() - 1) / 2 - (count + 1) / 2, ties)  # about their mean
    # sum r^2 = (n^3 - n - sum (t^3 - t)) / 12 with ties of t.
    lengths = ties.double()
    variance = (float(count) ** 3 - count - float((lengths.pow(3) - lengths).sum())) / 12 / count
    share = flagged / count
    covariance = float(ranks[flag[order]].sum()) / count
    return covariance / math.sqrt(variance * share * (1 - share))


def parc(features: Tensor | Any, labels: Tensor | Any, *, components: int | None = 32) -> float:
    """Pairwise annotation representation comparison; higher means more transferable.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16.
        labels: [N] integers of any values.
        components: principal components to compare, at most the rank; None for the features themselves.

    Returns:
        The score, between -100 and 100, near 0 for random labels. Memory and time grow with N^2: the paper takes 500
        samples.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a feature is NaN or infinite, an option is unknown.

    Warns:
        ScoreWarning: a single class, all classes of one sample, or constant features (the score is 0).
    """
    return Parc(components=components)._once(features, labels)

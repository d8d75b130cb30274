"""Leave-one-out accuracy of a k-nearest-neighbour classifier: the simplest score, and hard to beat.

(arXiv 2503.18528 finds it ahead of 23 transferability metrics.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transferops._validate import check_positive_int, describe, fail
from transferops.scores.moments import check_batch, check_finite
from transferops.scores.rows import RowScore

_BLOCK = 1024  # queries at a time: memory is _BLOCK * N distances, not N^2
_METRICS = ("cosine", "euclidean")


class Knn(RowScore):
    """Streaming :func:`knn`. Keeps the features.

    Args:
        neighbors, metric: as for :func:`knn`.
    """

    def __init__(self, neighbors: int = 1, *, metric: str = "cosine") -> None:
        super().__init__()
        self.neighbors = check_positive_int("neighbors", neighbors)
        if metric not in _METRICS:
            fail("metric", " or ".join(map(repr, _METRICS)), describe(metric))
        self.metric = metric

    def _check(self, values: Any, labels: Any) -> tuple[Tensor, Tensor]:
        features, labels = check_batch(values, labels)
        check_finite(features)
        return features, labels

    def _score(self, values: Tensor, labels: Tensor) -> float:
        samples = len(values)
        if samples <= self.neighbors:
            fail("features", f"more than {self.neighbors} samples for {self.neighbors} neighbors", f"{samples}")
        points = values.double() if values.dtype == torch.float64 else values.float()
        points = points - points.mean(0) if self.metric == "euclidean" else torch.nn.functional.normalize(points)
        squares = points.square().sum(1)
        classes, index = torch.unique(labels, return_inverse=True)
        correct = 0
        for start in range(0, samples, _BLOCK):
            queries = points[start : start + _BLOCK]
            closeness = queries @ points.mT
            if self.metric == "euclidean":
                closeness = 2 * closeness - squares  # minus the squared distance, but for the query's own square
            rows = torch.arange(len(queries), device=points.device)
            closeness[rows, rows + start] = -torch.inf  # leave the query itself out
            nearest = index[closeness.topk(self.neighbors, dim=1).indices]
            votes = torch.zeros(len(queries), len(classes), device=points.device)
            votes.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=votes.dtype))
            # A tie goes to the class of the nearest among the tied neighbours.
            tied = votes.gather(1, nearest) == votes.max(1, keepdim=True).values
            winner = nearest.gather(1, tied.int().argmax(1, keepdim=True)).squeeze(1)
            correct += int((winner == index[start : start + _BLOCK]).sum())
        return correct / samples


def knn(features: Tensor | Any, labels: Tensor | Any, *, neighbors: int = 1, metric: str = "cosine") -> float:
    """Leave-one-out accuracy of the nearest neighbours; higher means more transferable.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16.
        labels: [N] integers of any values.
        neighbors: how many vote; a tie goes to the nearest of the tied.
        metric: "cosine" (a row of zeros is equally far from all) or "euclidean".

    Returns:
        The share of samples whose neighbours name their class, in [0, 1]. Distances in float32 (float64 for float64).

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, too few samples, a feature is NaN or infinite, an option is unknown.
    """
    return Knn(neighbors, metric=metric).update(features, labels).compute()

"""Leave-one-out accuracy of a k-nearest-neighbour classifier: the simplest score, and hard to beat.

(arXiv 2503.18528 finds it ahead of 23 transferability metrics.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from transferops._validate import check_positive_int, describe, fail
from transferops.scores.base import ScoreDetails
from transferops.scores.features import FeatureScore, FeatureSet

_BLOCK = 1024  # samples on a side of a block of closeness; memory is a few blocks, not N^2
_GROUP = 32  # columns whose largest entry stands for them in the search of the k nearest
_METRICS = ("cosine", "euclidean")


class Knn(FeatureScore):
    """Streaming :func:`knn`. Keeps the features.

    Args:
        neighbors, metric: as for :func:`knn`.
    """

    name = "knn"
    keeps_rows = True

    def __init__(self, neighbors: int = 1, *, metric: str = "cosine") -> None:
        self.neighbors = check_positive_int("neighbors", neighbors)
        if metric not in _METRICS:
            fail("metric", " or ".join(map(repr, _METRICS)), describe(metric))
        self.metric = metric
        super().__init__()

    def _evaluate(self, data: FeatureSet) -> ScoreDetails:
        samples = data.samples
        if samples <= self.neighbors:
            fail("features", f"more than {self.neighbors} samples for {self.neighbors} neighbors", f"{samples}")
        points = data.features if data.features.dtype == torch.float64 else data.features.float()
        euclidean = self.metric == "euclidean"
        points = _scaled(points, rows=not euclidean)
        points = points - points.mean(0) if euclidean else torch.nn.functional.normalize(points)
        nearest = data.index[_nearest(points, self.neighbors, euclidean=euclidean)]
        winner = nearest[:, 0] if self.neighbors == 1 else _vote(nearest, data.classes)
        accuracy = int((winner == data.index).sum()) / samples
        caveat = ""
        if data.classes == 1:
            caveat = "knn: all samples are of one class, so there is nothing to tell apart and the score is 1"
        elif bool((points == points[0]).all()):
            caveat = "knn: all samples lie in one place, so the order in which they came decides"
        return ScoreDetails(accuracy, samples, data.classes, data.dimension, warnings=(caveat,) if caveat else ())


def _scaled(points: Tensor, *, rows: bool) -> Tensor:
    """Times a power of two that brings the largest entry (of each row) to about one: squares stay within range."""
    largest = points.abs().amax(1, keepdim=True) if rows else points.abs().amax()
    exponent = torch.frexp(largest).exponent
    room = math.frexp(torch.finfo(points.dtype).max)[1] - 2
    return points * torch.exp2(-exponent.clamp(-room, room).to(points.dtype))


def _nearest(points: Tensor, neighbors: int, *, euclidean: bool) -> Tensor:
    """[N, k], each sample's nearest others, nearest first.

    Closeness is symmetric, so each block of it is computed once and searched along its rows and its columns.
    """
    samples = len(points)
    squares = points.square().sum(1) / 2 if euclidean else None
    best = [_Best() for _ in range(0, samples, _BLOCK)]
    for i, start in enumerate(range(0, samples, _BLOCK)):
        rows = slice(start, start + _BLOCK)
        for j in range(i + 1):
            columns = slice(j * _BLOCK, (j + 1) * _BLOCK)
            closeness = points[rows] @ points[columns].mT
            if squares is not None:  # minus half the squared distance
                closeness -= squares[columns]
                closeness -= squares[rows].unsqueeze(1)
            if i == j:
                closeness.fill_diagonal_(-torch.inf)  # leave the sample itself out
            else:
                best[j].add(*_largest(closeness.mT.contiguous(), neighbors), start, neighbors)
            best[i].add(*_largest(closeness, neighbors), j * _BLOCK, neighbors)
    return torch.cat([block.positions for block in best])


class _Best:
    """The k closest samples so far of each row of a block: closeness and positions, closest first."""

    values: Tensor
    positions: Tensor

    def add(self, values: Tensor, positions: Tensor, offset: int, neighbors: int) -> None:
        positions = positions + offset
        if hasattr(self, "values"):
            values = torch.cat([self.values, values], 1)
            positions = torch.cat([self.positions, positions], 1)
        self.values, chosen = values.topk(min(neighbors, values.shape[1]), dim=1)
        self.positions = positions.gather(1, chosen)


def _largest(closeness: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, or all if there are no more, and their columns."""
    width = closeness.shape[1]
    if neighbors == 1:
        values, columns = closeness.max(1, keepdim=True)
        return values, columns
    if width % _GROUP or neighbors * _GROUP >= width:
        values, columns = closeness.topk(min(neighbors, width), dim=1)
        return values, columns
    # The k largest lie in the k groups of columns whose largest entries are largest.
    groups = closeness.reshape(-1, width // _GROUP, _GROUP)
    leading = groups.amax(2).topk(neighbors, dim=1).indices
    candidates = groups.gather(1, leading.unsqueeze(2).expand(-1, -1, _GROUP)).flatten(1)
    values, chosen = candidates.topk(neighbors, dim=1)
    columns = leading.gather(1, chosen // _GROUP) * _GROUP + chosen % _GROUP
    return values, columns


def _vote(nearest: Tensor, classes: int) -> Tensor:
    """The class most of the neighbours [N, k] name; a tie goes to that of the nearest among the tied."""
    votes = torch.zeros(len(nearest), classes, device=nearest.device)
    votes.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=votes.dtype))
    tied = votes.gather(1, nearest) == votes.max(1, keepdim=True).values
    return nearest.gather(1, tied.int().argmax(1, keepdim=True)).squeeze(1)


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

    Warns:
        ScoreWarning: a single class; samples that all lie in one place.
    """
    return Knn(neighbors, metric=metric)._once(features, labels)

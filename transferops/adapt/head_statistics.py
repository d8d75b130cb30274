"""The sufficient statistics of a linear head: what least squares needs to know of features and targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import fail
from transferops.adapt.head_rows import BLOCK, Rows


class Spread(NamedTuple):
    """Sums of w times squares about the mean, over samples and outputs: of a head's outputs and of the targets."""

    outputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class HeadStatistics:
    """Weighted sums over samples z [p] with targets y [c], about their weighted means. All tensors float64.

    Attributes:
        samples: rows counted, whatever their weights.
        weight: [], the sum of the weights.
        feature_mean: [p].
        target_mean: [c].
        gram: [p, p], sum w (z - mean)(z - mean)^T.
        cross: [p, c], sum w (z - mean)(y - mean)^T.
        target_square: [c], sum w (y - mean)^2.
    """

    samples: int
    weight: Tensor
    feature_mean: Tensor
    target_mean: Tensor
    gram: Tensor
    cross: Tensor
    target_square: Tensor

    @staticmethod
    def of(rows: Rows, outputs: int) -> HeadStatistics:
        """The statistics of some rows. Cost: N p^2 operations, and 2 N p c for targets that are not labels."""
        if rows.weights is not None:
            return _weighted(rows, outputs)
        features, count = rows.features, rows.features.new_full((), len(rows), dtype=torch.float64)
        if rows.labelled:
            moments = ops.class_moments(features, rows.targets, outputs)
            share = moments.counts / count
            return HeadStatistics(
                len(rows), count, moments.shift, share - 1 / outputs, moments.gram, moments.sums.mT.contiguous(),
                moments.counts * (1 - share),
            )  # fmt: skip
        single = torch.zeros(len(rows), dtype=torch.int64, device=features.device)
        moments = ops.class_moments(features, single, 1)
        mean = _mean(rows.targets)
        cross = moments.gram.new_zeros(features.shape[1], outputs)
        square = moments.gram.new_zeros(outputs)
        for z, y in zip(torch.split(features, BLOCK), torch.split(rows.targets, BLOCK)):
            centred = y.double() - mean
            cross += (z.double() - moments.shift).mT @ centred
            square += centred.square().sum(0)
        return HeadStatistics(len(rows), count, moments.shift, mean, moments.gram, cross, square)

    def about(self, feature_mean: Tensor, target_mean: Tensor) -> HeadStatistics:
        """The same sums about other points, exactly."""
        z, y = self.feature_mean - feature_mean, self.target_mean - target_mean
        return replace(
            self,
            feature_mean=feature_mean,
            target_mean=target_mean,
            gram=self.gram + self.weight * torch.outer(z, z),
            cross=self.cross + self.weight * torch.outer(z, y),
            target_square=self.target_square + self.weight * y.square(),
        )

    def merge(self, other: HeadStatistics) -> HeadStatistics:
        """Of both sets of samples together (Chan, Golub and LeVeque 1983)."""
        weight = self.weight + other.weight
        share = other.weight / weight if weight > 0 else weight
        feature_mean = self.feature_mean + (other.feature_mean - self.feature_mean) * share
        target_mean = self.target_mean + (other.target_mean - self.target_mean) * share
        a, b = self.about(feature_mean, target_mean), other.about(feature_mean, target_mean)
        return HeadStatistics(
            a.samples + b.samples, weight, feature_mean, target_mean,
            a.gram + b.gram, a.cross + b.cross, a.target_square + b.target_square,
        )  # fmt: skip

    def subtract(self, other: HeadStatistics) -> HeadStatistics:
        """Of the samples that are in this set and not in ``other``, which has to be a part of it."""
        samples, weight = self.samples - other.samples, self.weight - other.weight
        if samples <= 0 or weight <= 0:
            fail("other", f"fewer than the {self.samples} samples at hand, and less weight", f"{other.samples}")
        share = other.weight / weight
        feature_mean = self.feature_mean - (other.feature_mean - self.feature_mean) * share
        target_mean = self.target_mean - (other.target_mean - self.target_mean) * share
        a, b = self.about(feature_mean, target_mean), other.about(feature_mean, target_mean)
        square = a.target_square - b.target_square
        tolerance = 1e-9 * a.target_square
        if bool((square < -tolerance).any()) or bool(((a.gram - b.gram).diagonal() < -1e-9 * a.gram.diagonal()).any()):
            fail("other", "samples that are all in this set", "sums that exceed it")
        return HeadStatistics(
            samples, weight, feature_mean, target_mean, a.gram - b.gram, a.cross - b.cross, square.clamp(min=0)
        )

    def scaled(self, factor: float) -> HeadStatistics:
        """With every target multiplied by ``factor``."""
        return replace(
            self,
            target_mean=self.target_mean * factor,
            cross=self.cross * factor,
            target_square=self.target_square * factor**2,
        )

    def spread(self, weight: Tensor) -> Spread:
        """Of the outputs of a head with this weight [c, p], and of the targets."""
        return Spread((weight.mT * (self.gram @ weight.mT)).sum(), self.target_square.sum())

    def discount(self, factor: float) -> HeadStatistics:
        """With every weight multiplied by ``factor``."""
        return replace(
            self,
            weight=self.weight * factor,
            gram=self.gram * factor,
            cross=self.cross * factor,
            target_square=self.target_square * factor,
        )


def row_spread(rows: Rows, targets: Tensor, weight: Tensor) -> Spread:
    """:meth:`HeadStatistics.spread` from rows with targets [N, c] float64."""
    weights = rows.weight()

    def square(values: Tensor) -> Tensor:
        return (weights @ (values - weighted_mean(values, weights)).square()).sum()

    return Spread(square(rows.features.double() @ weight.mT), square(targets))


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean [D] float64 of values [N, D] with weights [N], 0 where all weights are."""
    total = weights.sum()
    if total == 0:
        return weights.new_zeros(values.shape[1])
    first = values[0].double()  # a common offset, however large, costs no digits
    mean = torch.zeros_like(first)
    for block, weight in zip(torch.split(values, BLOCK), torch.split(weights, BLOCK)):
        mean += weight @ (block.double() - first)
    return first + mean / total


def _weighted(rows: Rows, outputs: int) -> HeadStatistics:
    weights = rows.weight()
    feature_mean = weighted_mean(rows.features, weights)
    if rows.labelled:
        counts = weights.new_zeros(outputs).index_add_(0, rows.targets, weights)
        target_mean = counts / weights.sum().clamp(min=torch.finfo(torch.float64).tiny) - 1 / outputs
    else:
        target_mean = weighted_mean(rows.targets, weights)
    gram = weights.new_zeros(rows.features.shape[1], rows.features.shape[1])
    cross = weights.new_zeros(rows.features.shape[1], outputs)
    square = weights.new_zeros(outputs)
    for block in rows.blocks():
        root = block.weight().sqrt().unsqueeze(1)
        features = root * (block.features.double() - feature_mean)
        targets = root * (block.dense_targets(outputs) - target_mean)
        gram += features.mT @ features
        cross += features.mT @ targets
        square += targets.square().sum(0)
    return HeadStatistics(len(rows), weights.sum(), feature_mean, target_mean, gram, cross, square)


def _mean(values: Tensor) -> Tensor:
    return weighted_mean(values, torch.ones(len(values), dtype=torch.float64, device=values.device))

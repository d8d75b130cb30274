"""Scores of labelled features: what they keep, and how they see it.

A feature score asks a :class:`FeatureSet` for what its formula needs: moments, rows, or a Gram matrix of the samples.
Each is computed once, so scores that look at the same set share them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import as_tensor, describe, fail
from transferops.scores.base import Collection, Score
from transferops.scores.moments import FeatureMoments, MomentsAccumulator, check_batch, check_finite
from transferops.scores.rows import Rows


class FeatureSet:
    """Labelled features [N, D], by their rows, their moments, or both.

    Args:
        rows: features and labels, if they were kept.
        moments: accumulated moments, if they were.
        norms: whether moments made from rows include the norm moments.
    """

    def __init__(self, rows: tuple[Tensor, Tensor] | None, moments: FeatureMoments | None, *, norms: bool) -> None:
        self._rows, self._moments, self._norms = rows, moments, norms

    @property
    def features(self) -> Tensor:
        """[N, D], in the dtype in which they came."""
        assert self._rows is not None
        return self._rows[0]

    @property
    def samples(self) -> int:
        """N."""
        return len(self._rows[0]) if self._rows is not None else self.moments.samples

    @property
    def dimension(self) -> int:
        """D."""
        return self._rows[0].shape[1] if self._rows is not None else self.moments.mean.numel()

    @property
    def few(self) -> bool:
        """N <= D: the scores go by the samples, whose rows are then always at hand."""
        return self.samples <= self.dimension

    @cached_property
    def moments(self) -> FeatureMoments:
        """The moments of all samples."""
        if self._moments is None:
            assert self._rows is not None
            self._moments = FeatureMoments.of(*self._rows, norms=self._norms)
        return self._moments

    @cached_property
    def sample_gram(self) -> ops.SampleGram:
        """Inner products between centred samples [N, N], and the mean."""
        return ops.sample_gram(self.features)

    @cached_property
    def _classes(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self._rows is not None
        names, index, counts = torch.unique(self._rows[1], return_inverse=True, return_counts=True)
        return names, index, counts

    @property
    def index(self) -> Tensor:
        """[N], the class of each row, 0 .. C-1."""
        return self._classes[1]

    @property
    def counts(self) -> Tensor:
        """[C] int64, samples of each class, all positive."""
        return self.moments.counts if self._rows is None else self._classes[2]

    @property
    def classes(self) -> int:
        """C, classes with at least one sample."""
        return len(self.counts)

    @cached_property
    def by_class(self) -> tuple[Tensor, ...]:
        """Positions of the rows of each class."""
        return torch.split(self.index.argsort(stable=True), self.counts.tolist())

    @cached_property
    def mean(self) -> Tensor:
        """[D] float64, the mean of all rows."""
        if self._moments is not None or not self.few:
            return self.moments.mean
        return self.sample_gram.shift

    @cached_property
    def class_means(self) -> Tensor:
        """[C, D] float64."""
        if self._moments is not None or not self.few:
            return self.moments.sums / self.moments.counts.unsqueeze(1) + self.moments.mean
        sums = self.mean.new_zeros(self.classes, self.dimension)
        sums.index_add_(0, self.index, self.features.double() - self.mean)
        return sums / self.counts.unsqueeze(1) + self.mean

    @cached_property
    def _centred_spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [r], descending, and vectors of the centred Gram matrix that is smaller, D x D or N x N."""
        gram = self.sample_gram.gram if self.few else self.moments.gram
        values, vectors = torch.linalg.eigh(gram)
        cut = len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
        first = int((values <= cut).sum())
        return values[first:].flip(0), vectors[:, first:].flip(1)

    def principal_components(self, components: int | float | None) -> Tensor:
        """Centred features on their leading principal directions, [N, k] float64.

        The largest loading of each direction is positive, as in scikit-learn.

        Args:
            components: k, or as many directions as carry more than this share of the variance (a float below 1), or
                None for all; never more than the rank.
        """
        values, vectors = self._centred_spectrum
        if isinstance(components, float):
            share = values.cumsum(0) / values.sum()
            components = int((share <= components).sum()) + 1
        values, vectors = values[:components], vectors[:, :components]
        centred = self.features.double() - self.mean
        loadings = centred.mT @ vectors if self.few else vectors
        if not len(values):
            return centred @ loadings
        sign = loadings.gather(0, loadings.abs().argmax(0, keepdim=True)).sign()
        return vectors * (values.sqrt() * sign) if self.few else centred @ (vectors * sign)


class FeatureScore(Score):
    """Base of the scores of labelled features.

    Class attributes:
        keeps_rows: whether the formula needs the rows when there are more of them than features.
    """

    keeps_rows: ClassVar[bool] = False

    @property
    def needs_norms(self) -> bool:
        """Whether the formula needs the norm moments."""
        return False

    @property
    def keeps_targets(self) -> bool:
        """Whether the labels are regression targets, not classes."""
        return False

    def _collection(self) -> Collection:
        return feature_collection(rows=self.keeps_rows, norms=self.needs_norms)

    def _view(self, data: Any) -> FeatureSet:
        return feature_set(data, norms=self.needs_norms)


class TargetScore(FeatureScore):
    """Base of the scores that take regression targets, too: with ``regression``, their rows are kept as they are."""

    regression: bool

    @property
    def keeps_targets(self) -> bool:
        return self.regression

    def _collection(self) -> Collection:
        return Rows(check_targets) if self.regression else super()._collection()

    def _view(self, data: Any) -> Any:
        return data.all() if self.regression else super()._view(data)


def feature_collection(*, rows: bool, norms: bool) -> Rows | MomentsAccumulator:
    """An empty collection of labelled features."""
    return Rows(check_features) if rows else MomentsAccumulator(norms=norms)


def feature_set(data: Rows | MomentsAccumulator, *, norms: bool) -> FeatureSet:
    """What a collection, which has seen at least one sample, holds."""
    if isinstance(data, Rows):
        return FeatureSet(data.all(), None, norms=norms)
    rows = data.as_samples()
    return FeatureSet(rows, data.as_moments() if rows is None else None, norms=norms)


def check_features(features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """A batch as tensors: finite features [N, D], labels [N]."""
    features, labels = check_batch(features, labels)
    check_finite(features)
    return features, labels


def check_targets(features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """A batch as tensors: finite features [N, D], finite regression targets [N, M] in float64."""
    targets = as_tensor("labels", labels)
    if not targets.is_floating_point():
        fail("labels", "floating-point targets", describe(targets), TypeError)
    if targets.dim() not in (1, 2) or targets.shape[1:].numel() == 0:
        fail("labels", "shape [N] or [N, M]", describe(targets))
    features, _ = check_batch(features, torch.zeros(len(targets), dtype=torch.long, device=targets.device))
    check_finite(features)
    targets = targets.detach().double().reshape(len(targets), targets.shape[1:].numel())
    if not bool(torch.isfinite(targets).all()):
        position = (~torch.isfinite(targets)).nonzero()[0].tolist()
        fail("labels", "finite values", f"{targets[tuple(position)].item()} at position {position}")
    return features, targets

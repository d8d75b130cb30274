"""The moments that transferability scores share, over any number of batches, in any order.

:class:`FeatureMoments` is a value: the moments of some samples, which can be merged with those of others by the
formulas of Chan, Golub and LeVeque (1983). :class:`MomentsAccumulator` collects batches into one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import as_tensor, describe, fail
from transferops.ops.moments import check_finite_sums
from transferops.scores import _distributed


@dataclass(frozen=True)
class FeatureMoments:
    """Moments of N samples of D features in C classes, about the column means. All float64 unless stated.

    Attributes:
        classes: [C] int64, the labels that occurred, ascending.
        counts: [C] int64, samples of each class, all positive.
        sums: [C, D], sum over the class of x - mean.
        gram: [D, D], sum over all samples of (x - mean)(x - mean)^T.
        mean: [D].
        norms: sum |x - mean|^2 (x - mean) [D] and sum |x - mean|^4 [], or None if they were not asked for.
        unit_roundoff: the largest relative rounding error of the features as they came (2^-24 for float32).
        samples: N, the number of samples.
    """

    classes: Tensor
    counts: Tensor
    sums: Tensor
    gram: Tensor
    mean: Tensor
    norms: ops.NormMoments | None
    unit_roundoff: float
    samples: int

    @staticmethod
    def of(features: Tensor, labels: Tensor, *, norms: bool = False) -> FeatureMoments:
        """The moments of ``features`` [N, D] with integer ``labels`` [N] of any values.

        Raises:
            ValueError: a feature is NaN or infinite, or shapes disagree.
        """
        classes, index = torch.unique(labels, return_inverse=True)
        moments = ops.class_moments(features, index, len(classes), validate=False)  # the labels are in range
        own_norms = ops.norm_moments(features, moments.shift, validate=False) if norms else None
        sums = [moments.shift, moments.gram.diagonal(), *([] if own_norms is None else [own_norms.quartic])]
        check_finite_sums(features, *sums)
        return FeatureMoments(
            classes=classes,
            counts=moments.counts,
            sums=moments.sums,
            gram=moments.gram,
            mean=moments.shift,
            norms=own_norms,
            unit_roundoff=torch.finfo(features.dtype).eps / 2,
            samples=len(features),
        )

    def about(self, mean: Tensor) -> FeatureMoments:
        """The same samples' moments about another point [D], exactly."""
        offset = mean - self.mean
        total = self.sums.sum(0)
        samples = self.samples
        square = offset.dot(offset)
        gram = self.gram - torch.outer(total, offset) - torch.outer(offset, total)
        norms = None
        if self.norms is not None:
            # |y - o|^2 = |y|^2 - 2 y.o + |o|^2, multiplied out and summed over y with the moments at hand.
            trace, gram_offset, along = self.gram.trace(), self.gram @ offset, total.dot(offset)
            norms = ops.NormMoments(
                cubic=self.norms.cubic
                - 2 * gram_offset
                + square * total
                - (trace - 2 * along + samples * square) * offset,
                quartic=self.norms.quartic
                - 4 * self.norms.cubic.dot(offset)
                + 2 * square * trace
                + 4 * offset.dot(gram_offset)
                - 4 * square * along
                + samples * square.square(),
            )
        return replace(
            self,
            sums=self.sums - self.counts.unsqueeze(1) * offset,
            gram=gram + samples * torch.outer(offset, offset),
            mean=mean,
            norms=norms,
        )

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """The moments of both sets of samples together.

        Raises:
            ValueError: they differ in their number of features, their device, or in having norm moments.
        """
        if self.mean.shape != other.mean.shape:
            fail("other", f"{self.mean.numel()} features", f"{other.mean.numel()}")
        if self.mean.device != other.mean.device:
            fail("other", f"moments on {self.mean.device}", f"moments on {other.mean.device}")
        if (self.norms is None) != (other.norms is None):
            fail("other", "norm moments in both or in neither", "them in one only")
        mean = self.mean + (other.mean - self.mean) * (other.samples / (self.samples + other.samples))
        a, b = self.about(mean), other.about(mean)
        classes = torch.unique(torch.cat([a.classes, b.classes]))
        counts = classes.new_zeros(len(classes))
        sums = a.sums.new_zeros(len(classes), len(mean))
        for part in (a, b):
            index = torch.searchsorted(classes, part.classes)
            counts.index_add_(0, index, part.counts)
            sums.index_add_(0, index, part.sums)
        norms = None
        if a.norms is not None and b.norms is not None:
            norms = ops.NormMoments(a.norms.cubic + b.norms.cubic, a.norms.quartic + b.norms.quartic)
        return FeatureMoments(
            classes,
            counts,
            sums,
            a.gram + b.gram,
            mean,
            norms,
            max(a.unit_roundoff, b.unit_roundoff),
            a.samples + b.samples,
        )

    @staticmethod
    def none(dimension: int, device: torch.device, *, norms: bool = False) -> FeatureMoments:
        """The moments of no samples."""
        return FeatureMoments.of(
            torch.zeros(0, dimension, device=device), torch.zeros(0, dtype=torch.long, device=device), norms=norms
        )

    def all_reduce(self, group: Any = None) -> FeatureMoments:
        """The moments of the samples of all processes of a torch.distributed group, the same in each."""
        facts = (self.samples, self.mean.cpu(), self.classes.tolist(), self.unit_roundoff)
        everyone = [facts for facts in _distributed.gather(facts, group) if facts[0]]
        total = sum(samples for samples, _, _, _ in everyone)
        mean = torch.zeros_like(everyone[0][1])
        for samples, theirs, _, _ in everyone:
            mean += theirs * (samples / total)
        moved = self.about(mean.to(self.mean.device))
        classes = torch.tensor(sorted({label for _, _, labels, _ in everyone for label in labels}))
        classes = classes.to(self.classes.device)
        counts, sums = self.counts.new_zeros(len(classes)), self.sums.new_zeros(len(classes), len(mean))
        index = torch.searchsorted(classes, moved.classes)
        counts.index_add_(0, index, moved.counts)
        sums.index_add_(0, index, moved.sums)
        gram = moved.gram.clone()
        norms = [value.clone() for value in moved.norms] if moved.norms is not None else []
        _distributed.sum_over([counts, sums, gram, *norms], group)
        return FeatureMoments(
            classes=classes,
            counts=counts,
            sums=sums,
            gram=gram,
            mean=moved.mean,
            norms=ops.NormMoments(*norms) if norms else None,
            unit_roundoff=max(roundoff for _, _, _, roundoff in everyone),
            samples=total,
        )


_MOMENTS = ("classes", "counts", "sums", "gram", "mean")


class MomentsAccumulator:
    """Collects batches of labelled features into :class:`FeatureMoments`.

    Rows wait in the dtype in which they came until there are more than D of them, and are then folded into the D x D
    moments. So small batches cost no D x D update each, and a set of at most D samples in all stays available as
    samples, which the N x N forms of the scores need.

    For a batch on a GPU the program waits once, or, where rows are folded, for the classes, the sums' being finite and
    the classes of both sides: a batch with NaN is refused before it changes anything.

    Args:
        norms: collect the norm moments too (for shrinkage).
    """

    def __init__(self, *, norms: bool = False) -> None:
        self.norms = norms
        self._folded: FeatureMoments | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_rows = 0

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return self._waiting_rows + (self._folded.samples if self._folded is not None else 0)

    @property
    def dimension(self) -> int | None:
        """D, or None before the first batch."""
        if self._folded is not None:
            return self._folded.mean.numel()
        return self._waiting[0][0].shape[1] if self._waiting else None

    def update(self, features: Tensor | Any, labels: Tensor | Any, *, copy: bool = True) -> None:
        """Add a batch. Nothing is changed if the batch is refused.

        Args:
            features: [N, D] float32, float64, float16 or bfloat16.
            labels: [N] integers of any values.
            copy: False if the tensors will not change while the accumulator is in use.

        Raises:
            TypeError: an argument is no array or has the wrong kind of dtype.
            ValueError: shapes or devices disagree with each other or with earlier batches, or a feature is NaN or Inf.
        """
        features, labels = check_batch(features, labels)
        if self.dimension is not None and features.shape[1] != self.dimension:
            fail("features", f"{self.dimension} features as in the batches before", f"{features.shape[1]}")
        if self.dimension is not None and features.device != self._device():
            fail("features", f"the device of the batches before, {self._device()}", str(features.device))
        if len(features) > features.shape[1]:
            self._fold(FeatureMoments.of(features, labels, norms=self.norms))
        elif len(features):
            check_finite(features)
            self._waiting.append((features.clone(), labels.clone()) if copy else (features, labels))
            self._waiting_rows += len(features)
            if self._waiting_rows > features.shape[1]:
                self._fold_waiting()

    def merge(self, other: MomentsAccumulator) -> None:
        """Add all that ``other`` has seen; ``other`` is left as it is.

        Raises:
            TypeError: ``other`` is something else.
            ValueError: the numbers of features differ, or only one keeps norm moments.
        """
        if not isinstance(other, MomentsAccumulator):
            fail("other", "a MomentsAccumulator", describe(other), TypeError)
        if self.norms != other.norms:
            fail("other", f"norms={self.norms}", f"norms={other.norms}")
        if None not in (self.dimension, other.dimension) and self.dimension != other.dimension:
            fail("other", f"{self.dimension} features", f"{other.dimension}")
        if other._folded is not None:
            self._fold(other._folded)
        for features, labels in list(other._waiting):
            self.update(features, labels)

    def as_samples(self) -> tuple[Tensor, Tensor] | None:
        """Features [N, D] and labels [N] if there are at most D samples, else None."""
        if self._folded is not None or not self._waiting:
            return None
        if len(self._waiting) > 1:
            # One dtype for all; where batches differ, the wider one holds every value exactly.
            dtype = self._waiting[0][0].dtype
            for features, _ in self._waiting:
                dtype = torch.promote_types(dtype, features.dtype)
            features = torch.cat([features.to(dtype) for features, _ in self._waiting])
            self._waiting = [(features, torch.cat([labels for _, labels in self._waiting]))]
        return self._waiting[0]

    def as_moments(self) -> FeatureMoments:
        """The moments of all samples; at least one batch must have come."""
        if self._folded is None:  # few samples, which are kept
            return functools.reduce(FeatureMoments.merge, self._moments_of_waiting())
        self._fold_waiting()
        return self._folded

    def state_dict(self) -> dict[str, Any]:
        """The moments and the rows that wait."""
        folded = None
        if self._folded is not None:
            folded = {name: getattr(self._folded, name) for name in _MOMENTS}
            folded["unit_roundoff"] = self._folded.unit_roundoff
            if self._folded.norms is not None:
                folded["norms"] = list(self._folded.norms)
        return {"norms": self.norms, "folded": folded, "waiting": [list(rows) for rows in self._waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what was seen by that of a state.

        Raises:
            ValueError: only one of the two keeps norm moments.
        """
        if state["norms"] != self.norms:
            fail("state", f"norms={self.norms}", f"norms={state['norms']}")
        self._folded, self._waiting, self._waiting_rows = None, [], 0
        if state["folded"] is not None:
            folded = dict(state["folded"])
            norms = folded.pop("norms", None)
            folded["samples"] = int(folded["counts"].sum())
            self._folded = FeatureMoments(**folded, norms=ops.NormMoments(*norms) if norms is not None else None)
        for features, labels in state["waiting"]:
            self.update(features, labels)

    def all_reduce(self, group: Any = None) -> None:
        """Sum the moments of all processes; at most D samples in all are gathered as rows instead.

        Raises:
            ValueError: torch.distributed is not initialised, or the processes' samples differ in shape.
        """
        _distributed.check_group()
        device = _distributed.device_of(self._device() if self.samples else None)
        everyone = _distributed.gather((self.samples, self.dimension, self.norms), group)
        _distributed.same_everywhere("features", [dimension for _, dimension, _ in everyone], "number of features")
        _distributed.same_everywhere("norms", [norms for _, _, norms in everyone], "choice of norms")
        total = sum(samples for samples, _, _ in everyone)
        dimension = next((dimension for _, dimension, _ in everyone if dimension is not None), None)
        if dimension is None:
            return
        if total <= dimension:
            parts = _distributed.gather(_distributed.to_cpu(self._waiting), group)
            self._waiting = [(x.to(device), y.to(device)) for part in parts for x, y in part]
            self._waiting_rows = total
            return
        mine = self.as_moments() if self.samples else FeatureMoments.none(dimension, device, norms=self.norms)
        self._folded, self._waiting, self._waiting_rows = mine.all_reduce(group), [], 0

    def _device(self) -> torch.device:
        return self._folded.mean.device if self._folded is not None else self._waiting[0][0].device

    def _fold(self, moments: FeatureMoments) -> None:
        self._folded = moments if self._folded is None else self._folded.merge(moments)

    def _fold_waiting(self) -> None:
        for moments in self._moments_of_waiting():
            self._fold(moments)
        self._waiting, self._waiting_rows = [], 0

    def _moments_of_waiting(self) -> Iterator[FeatureMoments]:
        """Those of the rows of each dtype."""
        for dtype in dict.fromkeys(features.dtype for features, _ in self._waiting):
            rows = [(features, labels) for features, labels in self._waiting if features.dtype == dtype]
            features, labels = (torch.cat(column) for column in zip(*rows))
            yield FeatureMoments.of(features, labels, norms=self.norms)


def check_batch(features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Check and detach one batch: features [N, D] floating point, labels [N] integers, on one device."""
    features = as_tensor("features", features).detach()
    labels = as_tensor("labels", labels).detach()
    if not features.is_floating_point() or features.dtype not in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
    ):
        fail("features", "float32, float64, float16 or bfloat16", describe(features), TypeError)
    if features.dim() != 2 or features.shape[1] == 0:
        fail("features", "shape [N, D] with D >= 1", describe(features))
    if labels.is_floating_point() or labels.is_complex():
        fail("labels", "integers", describe(labels), TypeError)
    if labels.dim() != 1 or len(labels) != len(features):
        fail("labels", f"shape [{len(features)}], one label per row of features", describe(labels))
    if labels.device != features.device:
        fail("labels", f"the device of features, {features.device}", str(labels.device))
    return features, labels.long()


def check_finite(features: Tensor, argument: str = "features") -> None:
    """Raise if an entry is NaN or infinite, naming its position."""
    if not features.numel() or bool(torch.stack(torch.aminmax(features)).isfinite().all()):
        return
    bad = (~torch.isfinite(features)).nonzero()
    if len(bad):
        position = bad[0].tolist()
        fail(argument, "finite values", f"{features[tuple(position)].item()} at position {position}")

"""The samples: the target and its sources end to end, so that one position names one sample."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from transferops._content import content_hash
from transferops._transfer import ahead, to_device
from transferops._validate import describe, fail

_EVALUATION_BATCH = 512


class Samples(Protocol):
    """Anything with ``inputs`` float32 ``[N, ...]`` and ``labels`` int64 ``[N]``, such as a domain."""

    @property
    def inputs(self) -> torch.Tensor: ...

    @property
    def labels(self) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class TensorSamples:
    """The plainest :class:`Samples`."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


Source = Samples | Dataset[Any]
"""Tensors, or a map-style data set of (input, label) pairs.

A data set is read sample by sample as it is needed, so it may be larger than memory. Its labels are needed
beforehand: they are its attribute ``labels`` or ``targets``, or found in one pass over it.
"""


class Pool:
    """Parts one after the other. Tensors are copied once, onto the device; data sets are read batch by batch.

    Args:
        parts: By name; tensors all of them, or data sets.
        device: Where batches go.
        workers: Processes that read data sets ahead.

    Attributes:
        names: Of the parts.
        labels: int64 on the CPU, by position; those of unseen parts included.

    Raises:
        ValueError: A part is empty or holds NaN, inputs and labels differ in number, or samples in shape.
        TypeError: A part is neither tensors nor a map-style data set.
    """

    def __init__(self, parts: Mapping[str, Source], device: torch.device, workers: int = 0) -> None:
        self.names = tuple(parts)
        self.device = device
        labels = [_labels(name, part) for name, part in parts.items()]
        self.labels = torch.cat(labels)
        self._positions = list(torch.split(torch.arange(len(self.labels)), [len(part) for part in labels]))
        self._workers = workers
        self._format = torch.preserve_format
        self._inputs: torch.Tensor | None = None
        self._content: list[str] = []  # of one entry, once it is known; shared with all views
        if all(_is_tensors(part) for part in parts.values()):
            inputs = {name: cast(Samples, part).inputs for name, part in parts.items()}
            shape = inputs[self.names[0]].shape[1:]
            for name, own in inputs.items():
                if own.shape[1:] != shape:
                    fail(name, f"inputs of shape {[len(own), *shape]}, as in {self.names[0]}", describe(own))
            self._inputs = torch.cat([own.to(device) for own in inputs.values()])
            self._device_labels = self.labels.to(device)
        else:
            self._dataset: Dataset[Any] = ConcatDataset([_as_dataset(part) for part in parts.values()])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each part."""
        return tuple(len(part) for part in self._positions)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sample_shape(self) -> torch.Size:
        """Of a sample, the first one."""
        inputs, _ = next(self.batches(torch.arange(1)))
        return inputs.shape[1:]

    def view(self, parts: Mapping[str, Sequence[int]]) -> Pool:
        """The same samples, of which only some parts are seen, or several as one.

        Args:
            parts: Numbers of this pool's parts by the name of the new one.
        """
        return self.choose({name: torch.cat([self._positions[i] for i in own]) for name, own in parts.items()})

    def choose(self, parts: Mapping[str, torch.Tensor]) -> Pool:
        """The same samples, of which only some are seen.

        Args:
            parts: Positions of its samples by the name of the part, int64 ``[n]``.
        """
        seen = copy.copy(self)
        seen.names, seen._positions = tuple(parts), list(parts.values())
        return seen

    def channels_last(self) -> Pool | None:
        """The same samples with the channels of images last in memory; ``None`` if they are not images."""
        if len(self.sample_shape) != 3:
            return None
        changed = copy.copy(self)
        changed._format = torch.channels_last
        if self._inputs is not None:
            changed._inputs = self._inputs.contiguous(memory_format=torch.channels_last)
        return changed

    def content(self) -> str:
        """A hash of the samples and of what is seen of them; of data sets, which may be large, of the labels only."""
        if not self._content:
            self._content.append(content_hash([self.labels, *([] if self._inputs is None else [self._inputs])]))
        return content_hash(self._positions) + self._content[0]

    def positions(self, part: int | None = None) -> torch.Tensor:
        """All positions, or those of a part."""
        return torch.cat(self._positions) if part is None else self._positions[part]

    def part_of(self, positions: torch.Tensor) -> torch.Tensor:
        """The part that each position belongs to."""
        parts = torch.full(self.labels.shape, -1)
        for number, own in enumerate(self._positions):
            parts[own] = number
        return parts[positions]

    def part_labels(self, part: int) -> torch.Tensor:
        """The labels of a part, on the CPU."""
        return self.labels[self._positions[part]]

    def read(self, batches: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``(inputs, labels)`` on the device for each tensor of positions; to a GPU they are copied one batch ahead."""
        if self._inputs is not None:
            sizes = [len(batch) for batch in batches]
            positions = to_device(torch.cat(list(batches)), self.device)  # once, not batch by batch
            for index in torch.split(positions, sizes):
                yield self._in_format(self._inputs[index]), self._device_labels[index]
            return
        loader = DataLoader(
            self._dataset,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else it would draw from the global generator
        )
        yield from ahead(loader, self._bring, lambda pair: pair, self.device)

    def _bring(self, pair: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = (to_device(value, self.device) for value in pair)
        return self._in_format(inputs), labels

    def _in_format(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.to(memory_format=self._format)

    def batches(
        self, positions: torch.Tensor | None = None, size: int = _EVALUATION_BATCH
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``(inputs, labels)`` in order, at most ``size`` at a time; of all samples or those at ``positions``."""
        index = self.positions() if positions is None else positions
        if len(index):
            yield from self.read(list(torch.split(index, size)))


def _collate(pairs: Sequence[tuple[Any, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch; labels may be numbers or tensors."""
    inputs: torch.Tensor = default_collate([pair[0] for pair in pairs])
    return inputs, torch.tensor([int(pair[1]) for pair in pairs])


def _is_tensors(part: Any) -> bool:
    return isinstance(getattr(part, "inputs", None), torch.Tensor)


def _is_of_tensors(part: Any) -> bool:
    """Whether this is a pair (inputs, labels) of tensors, which would pass for a data set of two samples."""
    return isinstance(part, (tuple, list)) and len(part) > 0 and isinstance(part[0], torch.Tensor)


def _labels(name: str, part: Source) -> torch.Tensor:
    """The labels of a part, int64 on the CPU, checked."""
    found = getattr(part, "labels", None)
    if _is_tensors(part):
        inputs = cast(Samples, part).inputs
        if found is None or len(found) != len(inputs):
            count = "none" if found is None else str(len(found))
            fail(name, f"{len(inputs)} labels, one for each of its inputs", count)
        if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
            fail(name, "finite inputs", "infinities or NaN among them")
    elif not hasattr(part, "__getitem__") or not hasattr(part, "__len__") or _is_of_tensors(part):
        expected = "inputs and labels, or a map-style data set with a length"
        fail(name, expected, describe(part), TypeError)
    elif found is None:
        found = getattr(part, "targets", None)
    if found is None:
        dataset = cast(Any, part)
        found = [int(dataset[i][1]) for i in range(len(dataset))]
    labels = torch.as_tensor(found)
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        fail(name, "integer labels, shape [N]", describe(labels))
    if len(labels) == 0:
        fail(name, "at least one sample", "none")
    return labels.to("cpu", torch.int64)


class _TensorDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Tensors beside data sets, in one pool."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._samples.inputs[index], self._samples.labels[index]


def _as_dataset(part: Source) -> Dataset[Any]:
    return _TensorDataset(cast(Samples, part)) if _is_tensors(part) else cast("Dataset[Any]", part)


def check_labels(pool: Pool, names: Iterable[str], classes: int) -> None:
    """Raise ``ValueError`` unless every label has a logit; ``names`` are those of the arguments."""
    for part, name in enumerate(names):
        labels = pool.part_labels(part)
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= classes:
            expected = f"labels from 0 to {classes - 1}, one per logit of the model"
            fail(name, expected, f"labels from {lowest} to {highest}")

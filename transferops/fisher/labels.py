"""Integer targets: which count, and which are no classes, without waiting for a GPU batch by batch."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from transferops._validate import fail
from transferops.fisher.batches import Batch

IGNORE = -100


def readable(value: Tensor) -> bool:
    """Whether what a tensor holds can be looked at without waiting for a GPU."""
    return value.device.type == "cpu"


def counts(labels: Tensor) -> Tensor:
    """Which positions count."""
    return labels.long() != IGNORE  # which in 8 unsigned bits would be class 156


class LabelCheck:
    """Refuses targets that are no classes: those that came on the CPU at once, others when :meth:`finish` is called."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # int64 [4]: if there was one, its batch's place below, its own, its value
        self._batches: list[tuple[int, torch.Size, int]] = []

    def look(self, batch: Batch, labels: Tensor, classes: int) -> Tensor:
        """``labels``, the batch's targets as int64 on the model's device; what is no class may be 0 in them."""
        if readable(batch.given):
            given = batch.given.long()
            bad = _bad(given, classes)
            if bad.any():
                place = int(bad.flatten().nonzero()[0])
                _refuse(batch.index, classes, given.shape, place, int(given.flatten()[place]))
            return labels
        if labels.numel():
            bad = _bad(labels, classes).flatten()
            first = bad.byte().argmax(0, keepdim=True)  # if there is one
            number = first.new_full((1,), len(self._batches))
            found = torch.cat([bad.gather(0, first).long(), number, first, labels.flatten().gather(0, first)])
            self._first = found if self._first is None else torch.where(self._first[0] > 0, self._first, found)
            self._batches.append((batch.index, labels.shape, classes))
            labels = torch.where(bad.view_as(labels), 0, labels)
        return labels

    def finish(self) -> None:
        """Raise for the first target that was no class; waits for the device once."""
        if self._first is not None:
            found, number, place, value = self._first.tolist()
            if found:
                index, shape, classes = self._batches[number]
                _refuse(index, classes, shape, place, value)
            self._first, self._batches = None, []


def _bad(labels: Tensor, classes: int) -> Tensor:
    return ((labels < 0) | (labels >= classes)) & (labels != IGNORE)


def _refuse(index: int, classes: int, shape: torch.Size, place: int, value: int) -> NoReturn:
    where = [int(i) for i in torch.unravel_index(torch.tensor(place), shape)]
    got = f"{value} at position {where[0] if len(where) == 1 else where}"
    fail(f"batches[{index}]", f"targets of {classes} classes 0..{classes - 1} or {IGNORE}", got)

"""The collection of the scores that need every sample again when they are computed.

It keeps the rows it is given (in their dtype), so its memory grows with the samples; merging appends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transferops._validate import describe, fail
from transferops.scores import _distributed

Check = Callable[[Any, Any], tuple[Tensor, Tensor]]


class Rows:
    """Rows of values [N, ...] and labels [N, ...].

    Args:
        check: turns a batch into tensors, or refuses it.
    """

    def __init__(self, check: Check) -> None:
        self._check = check
        self._rows: list[tuple[Tensor, Tensor]] = []

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return sum(len(labels) for _, labels in self._rows)

    def update(self, values: Any, labels: Any, *, copy: bool = True) -> None:
        """Add a batch. Nothing is changed if the batch is refused."""
        values, labels = self._check(values, labels)
        self._append(values, labels, copy=copy)

    def _append(self, values: Tensor, labels: Tensor, *, copy: bool) -> None:
        if self._rows:
            first, first_labels = self._rows[0]
            for argument, found, before in (("values", values, first), ("labels", labels, first_labels)):
                if found.shape[1:] != before.shape[1:]:
                    fail(argument, f"rows of shape {list(before.shape[1:])} as before", f"{list(found.shape[1:])}")
            if values.device != first.device:
                fail("values", f"the device of the batches before, {first.device}", str(values.device))
        if len(labels):
            self._rows.append((values.clone(), labels.clone()) if copy else (values, labels))

    def merge(self, other: Rows) -> None:
        """Add all that ``other`` has seen; ``other`` is left as it is."""
        if not isinstance(other, Rows):
            fail("other", "Rows", describe(other), TypeError)
        for values, labels in list(other._rows):
            self._append(values, labels, copy=True)

    def all(self) -> tuple[Tensor, Tensor]:
        """All values and labels; at least one batch must have come."""
        if len(self._rows) > 1:
            # One dtype for all; where batches differ, the wider one holds every value exactly.
            dtype = self._rows[0][0].dtype
            for values, _ in self._rows:
                dtype = torch.promote_types(dtype, values.dtype)
            merged = torch.cat([values.to(dtype) for values, _ in self._rows])
            self._rows = [(merged, torch.cat([labels for _, labels in self._rows]))]
        return self._rows[0]

    def state_dict(self) -> dict[str, Any]:
        """The rows, in at most one batch."""
        return {"rows": [list(self.all())] if self._rows else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the rows by those of a state."""
        self._rows = []
        for values, labels in state["rows"]:
            self._append(values, labels, copy=True)

    def all_reduce(self, group: Any = None) -> None:
        """Gather the rows of all processes, in the order of the ranks."""
        _distributed.check_group()
        device = self._rows[0][0].device if self._rows else None
        parts = _distributed.gather(_distributed.to_cpu([self.all()] if self._rows else []), group)
        _distributed.same_everywhere(
            "values", [part[0][0].shape[1:] if part else None for part in parts], "shape of rows"
        )
        device = _distributed.device_of(device)
        self._rows = [(values.to(device), labels.to(device)) for part in parts for values, labels in part]

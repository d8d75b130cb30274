"""Scores that need every sample again when they are computed: what their streaming classes share.

They keep the rows they are given (in their dtype), so their memory grows with the samples; merging appends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from transferops._validate import describe, fail


class RowScore(ABC):
    """Base of the row-keeping scores. A score defines ``_check`` (the checked batch) and ``_score`` (of all rows)."""

    higher_is_better: ClassVar[bool] = True

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor]] = []

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return sum(len(labels) for _, labels in self._rows)

    def update(self, values: Tensor | Any, labels: Tensor | Any) -> Self:
        """Add a batch (arguments and errors as for the function; an empty batch changes nothing)."""
        values, labels = self._check(values, labels)
        if self._rows:
            first, _ = self._rows[0]
            if values.shape[1:] != first.shape[1:]:
                fail("values", f"rows of shape {list(first.shape[1:])} as before", f"{list(values.shape[1:])}")
            if values.device != first.device:
                fail("values", f"the device of the batches before, {first.device}", str(values.device))
        if len(labels):
            self._rows.append((values.clone(), labels.clone()))
        return self

    def merge(self, other: Self) -> Self:
        """Add all that ``other`` has seen, which is left as it is."""
        if type(other) is not type(self) or other._options() != self._options():
            fail("other", f"a {type(self).__name__} with the same options", describe(other))
        for values, labels in other._rows:
            self.update(values, labels)
        return self

    def compute(self) -> float:
        """The score of all samples seen so far."""
        if not self._rows:
            fail("values", "at least one sample before the score is computed", "none")
        if len(self._rows) > 1:
            dtype = self._rows[0][0].dtype
            for values, _ in self._rows:
                dtype = torch.promote_types(dtype, values.dtype)
            merged = torch.cat([values.to(dtype) for values, _ in self._rows])
            self._rows = [(merged, torch.cat([labels for _, labels in self._rows]))]
        return self._score(*self._rows[0])

    def reset(self) -> None:
        """Forget all samples."""
        self._rows = []

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @abstractmethod
    def _check(self, values: Any, labels: Any) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _score(self, values: Tensor, labels: Tensor) -> float: ...

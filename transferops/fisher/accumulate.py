"""A quantity of a Fisher information as a sum over samples: batch by batch, part by part, over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, distributed
from typing_extensions import Self

from transferops._validate import describe, fail
from transferops.fisher.batches import Batch
from transferops.fisher.estimation import Estimation

Result = TypeVar("Result")


class Accumulator(ABC, Generic[Result]):
    """Sums over the samples seen so far, and what they amount to.

    Made by :meth:`transferops.fisher.FisherInformation.accumulate`. However the samples are divided over calls of
    :meth:`update`, accumulators that are merged, and processes: what :meth:`compute` returns is what one pass over
    all of them gives, up to rounding. The model has to be the same throughout.

    Attributes:
        samples: how many have been seen.
    """

    def __init__(self, estimation: Estimation) -> None:
        self.samples = 0
        self._estimation = estimation
        self._likelihood = estimation.likelihood()
        self._spoilt = False

    def update(self, batches: Iterable[Any]) -> Self:
        """Add batches; none at all change nothing. After an error in one of them the accumulator cannot be used.

        Nothing waits for a GPU: a target on one that is no class, like anything that is not finite, is refused by
        what needs the sums (:meth:`compute`, :meth:`merge`, :meth:`all_reduce`).

        Raises:
            TypeError: ``batches`` is no iterable of batches.
            ValueError: as the method of :class:`transferops.fisher.FisherInformation`.
            RuntimeError: there was an error in an update before.
        """
        with self._estimation.passes():
            self._take(batches)
        return self

    def _take(self, batches: Iterable[Any]) -> None:
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            fail("batches", "an iterable of batches, such as [inputs]", describe(batches), TypeError)
        self._check_whole("update")
        self._spoilt = True
        for batch in self._estimation.batches(batches):
            self._add(batch)
            self.samples += batch.samples
        self._spoilt = False

    def merge(self, other: Self) -> Self:
        """Add what ``other`` has seen, which is left as it is: of the same quantity, estimator and shapes.

        That both have the same model, directions and selection is the caller's to ensure.

        Raises:
            ValueError: ``other`` is of something else, or a target on a GPU was no class.
            RuntimeError: one of them has had an error in an update.
        """
        self._check_whole("merge")
        if not isinstance(other, Accumulator) or other._identity() != self._identity():
            got = f"one of {other._identity()}" if isinstance(other, Accumulator) else describe(other)
            fail("other", f"an accumulator of {self._identity()}", got)
        other._check_whole("merge")
        for part in (self, other):
            part._likelihood.labels.finish()
        for mine, theirs in zip(self._sums(), other._sums()):
            mine += theirs.to(mine.device)
        self.samples += other.samples
        return self

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> Self:
        """Add what the accumulators of all other processes of a group have seen; afterwards all hold the same.

        Call it once, when this process's share has been added; a share may be empty. Monte-Carlo draws are independent
        between processes only if their seeds differ.

        Args:
            group: the default one if None.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
        """
        self._check_whole("all_reduce")
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError("group: expected torch.distributed to be initialised, got no process group")
        self._likelihood.labels.finish()
        count = torch.tensor([self.samples], dtype=torch.float64)
        accelerated = distributed.get_backend(group) == "nccl"
        for value in (count, *self._sums()):
            # NCCL takes tensors of the process's GPU only.
            shared = value.cuda() if accelerated else value.contiguous()
            distributed.all_reduce(shared, group=group)
            if shared is not value:
                value.copy_(shared)
        self.samples = int(count)
        return self

    def compute(self) -> Result:
        """The quantity, averaged over all samples seen so far.

        Raises:
            ValueError: there is no sample, the model's outputs or derivatives are not finite, or a target on a GPU
                was no class.
        """
        return self._result([value / self._count() for value in self._sums()])

    def finish(self) -> Result:
        """:meth:`compute` for the last time: the sums become the averages, without a copy."""
        averages = [value.div_(self._count()) for value in self._sums()]
        self._spoilt = True
        return self._result(averages)

    def _count(self) -> int:
        self._check_whole("compute")
        self._likelihood.labels.finish()
        if not self.samples:
            fail("batches", "at least one sample", "none")
        return self.samples

    def _check_whole(self, method: str) -> None:
        if self._spoilt:
            got = "one after an update that failed, or after finish()"
            raise RuntimeError(f"{method}: expected an accumulator that has whole sums, got {got}")

    def _identity(self) -> str:
        """What has to agree for sums to be added."""
        shapes = [list(value.shape) for value in self._sums()]
        kind = type(self).__name__.lower()
        return f"{kind}, {self._estimation.estimator}, {self._estimation.loss}, shapes {shapes}"

    @abstractmethod
    def _add(self, batch: Batch) -> None:
        """Add the samples of a batch."""

    @abstractmethod
    def _sums(self) -> list[Tensor]:
        """The sums themselves, in an order that does not depend on the samples."""

    @abstractmethod
    def _result(self, averages: list[Tensor]) -> Result:
        """What the sums amount to, divided by the number of samples."""


def evaluate(
    estimation: Estimation, empty: Callable[[Estimation], Accumulator[Result]], batches: Iterable[Any]
) -> Result:
    """What an accumulator amounts to after one update, the model being made ready once for all of it."""
    with estimation.passes():
        accumulator = empty(estimation)
        accumulator._take(batches)
        return accumulator.finish()

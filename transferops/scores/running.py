"""Running moments of a task's gradients, apart for each group of restarts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import fail
from transferops.scores._distributed import gather


class RunningGradients:
    """Means, and perhaps sums of squared deviations, of lists of gradients in groups (Welford, Chan).

    Args:
        like: tensors of the gradients' shapes. Moments are float64 for float64, float32 otherwise.
        groups: how many groups.
        classes: of the task, for the record.
        squares: keep the squared deviations.

    Attributes:
        counts: gradients in each group.
        means: per group a list of tensors.
        batches: batches seen.
    """

    def __init__(self, like: Sequence[Tensor], groups: int, classes: int, squares: bool) -> None:
        def zeros() -> list[Tensor]:
            wide = (torch.float64 if x.dtype == torch.float64 else torch.float32 for x in like)
            return [torch.zeros_like(x, dtype=dtype) for x, dtype in zip(like, wide)]

        self.classes, self.batches = classes, 0
        self.counts = [0] * groups
        self.means = [zeros() for _ in range(groups)]
        self.squares = [zeros() for _ in range(groups)] if squares else None

    def add(self, gradients: Sequence[Tensor], groups: Sequence[int]) -> None:
        """Add gradients [R, *shape]; ``groups`` [R], ascending, says where each belongs."""
        first = 0
        for group, members in itertools.groupby(groups):
            count = len(list(members))
            part = [g[first : first + count] for g in gradients]
            squares = None if self.squares is None else self.squares[group]
            ops.gradient_expectation_(self.means[group], squares, part, self.counts[group], stacked=True)
            self.counts[group] += count
            first += count

    def mean(self) -> list[Tensor]:
        """Over all groups."""
        total = sum(self.counts)
        return [sum(count / total * mean for count, mean in zip(self.counts, means)) for means in zip(*self.means)]

    def variance(self) -> list[Tensor]:
        """Over all groups, with n - 1 in the denominator."""
        assert self.squares is not None
        whole, total = self.mean(), sum(self.counts)
        result = []
        for mean, means, squares in zip(whole, zip(*self.means), zip(*self.squares)):
            parts = (q + n * (m - mean).square() for n, m, q in zip(self.counts, means, squares))
            result.append(sum(parts) / max(total - 1, 1))
        return result

    def merge(self, other: RunningGradients) -> None:
        """Add another's gradients, group by group."""
        if self.classes != other.classes:
            fail("other", f"{self.classes} classes", f"{other.classes}")
        for group, count in enumerate(other.counts):
            total = self.counts[group] + count
            if count == 0:
                continue
            for i, (mean, theirs) in enumerate(zip(self.means[group], other.means[group])):
                apart = theirs - mean
                if self.squares is not None and other.squares is not None:
                    between = self.counts[group] * count / total * apart.square()
                    self.squares[group][i] += other.squares[group][i] + between
                mean += apart * (count / total)
            self.counts[group] = total
        self.batches = max(self.batches, other.batches)

    def all_reduce(self, group: Any = None) -> None:
        """Join the ranks of ``torch.distributed``, group by group: sums of the moments about the joint mean."""
        device = self.means[0][0].device
        counts = torch.tensor([*self.counts, self.batches], dtype=torch.int64, device=device)
        torch.distributed.all_reduce(counts[:-1], group=group)
        torch.distributed.all_reduce(counts[-1:], torch.distributed.ReduceOp.MAX, group=group)
        *totals, self.batches = counts.tolist()
        for index, (own, total) in enumerate(zip(self.counts, totals)):
            for i, mean in enumerate(self.means[index]):
                joint = mean * (own / max(total, 1))
                torch.distributed.all_reduce(joint, group=group)
                if self.squares is not None:
                    self.squares[index][i] += own * (mean - joint).square()
                    torch.distributed.all_reduce(self.squares[index][i], group=group)
                mean.copy_(joint)
        self.counts = totals

    def copy(self) -> RunningGradients:
        """An independent copy."""
        return RunningGradients.from_state(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Copies of the moments, and the counts."""

        def copies(lists: list[list[Tensor]] | None) -> list[list[Tensor]] | None:
            return None if lists is None else [[x.clone() for x in tensors] for tensors in lists]

        return {
            "classes": self.classes,
            "batches": self.batches,
            "counts": list(self.counts),
            "means": copies(self.means),
            "squares": copies(self.squares),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RunningGradients:
        """What :meth:`state_dict` describes."""
        running = cls([], len(state["counts"]), state["classes"], state["squares"] is not None)
        running.batches, running.counts = state["batches"], list(state["counts"])
        running.means = [[x.clone() for x in tensors] for tensors in state["means"]]
        if state["squares"] is not None:
            running.squares = [[x.clone() for x in tensors] for tensors in state["squares"]]
        return running


def gather_tasks(tasks: Mapping[str, int], group: Any = None) -> list[tuple[str, int]]:
    """Names and classes of the tasks of all ranks, in an order that all ranks share.

    Raises:
        ValueError: ranks disagree about a task's number of classes.
    """
    union: dict[str, int] = {}
    for found in gather(dict(tasks), group):
        for name, classes in found.items():
            if union.setdefault(name, classes) != classes:
                fail("task", f"{union[name]} classes of {name!r} on all ranks", f"{classes}")
    return list(union.items())

"""The inner loops that every strategy shares: an epoch of training, an evaluation, a stratified draw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

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

    @classmethod
    def on(cls, device: torch.device, samples: Samples) -> TensorSamples:
        """``samples`` on ``device``."""
        return cls(samples.inputs.to(device), samples.labels.to(device))

    @classmethod
    def union(cls, parts: Sequence[Samples]) -> TensorSamples:
        """All samples of ``parts``, which are on one device, in order."""
        return cls(torch.cat([part.inputs for part in parts]), torch.cat([part.labels for part in parts]))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: torch.Tensor) -> TensorSamples:
        """The samples at ``index``, int64 ``[M]``."""
        return TensorSamples(self.inputs[index], self.labels[index])

    def batches(self, size: int = _EVALUATION_BATCH) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``(inputs, labels)`` in order, at most ``size`` samples at a time."""
        yield from zip(torch.split(self.inputs, size), torch.split(self.labels, size), strict=True)


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and the share of right answers on a set of samples."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, samples: TensorSamples) -> Evaluation:
    """Cross-entropy and accuracy of ``model``, put in evaluation mode, on ``samples``."""
    model.eval()
    loss = torch.zeros((), device=samples.labels.device, dtype=torch.float64)
    right = torch.zeros((), device=samples.labels.device, dtype=torch.int64)
    for inputs, labels in samples.batches():
        logits = model(inputs)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        right += (logits.argmax(1) == labels).sum()
    return Evaluation(loss.item() / len(samples), right.item() / len(samples))


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: TensorSamples,
    batch_size: int,
    min_steps: int,
    generator: torch.Generator,
) -> float:
    """Pass over ``samples`` in random order, again and again until ``min_steps`` steps are made.

    The batches differ in size by at most one sample: a last batch of a single sample would upset the
    optimiser's moments and stop a normalisation layer.

    Returns:
        The mean cross-entropy over the samples, each measured just before its step.

    Raises:
        RuntimeError: If that is not finite: the training has diverged.
    """
    model.train()
    device = samples.labels.device
    steps = math.ceil(len(samples) / batch_size)
    passes = max(1, math.ceil(min_steps / steps))
    total = torch.zeros((), device=device)
    for _ in range(passes):
        order = torch.randperm(len(samples), generator=generator).to(device)
        for index in order.tensor_split(steps):
            loss = F.cross_entropy(model(samples.inputs[index]), samples.labels[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(index)
    mean = total.item() / (passes * len(samples))
    if not math.isfinite(mean):
        raise RuntimeError(f"the training diverged: its mean loss is {mean}; a smaller learning rate may help")
    return mean


def draw(labels: torch.Tensor, quantity: int, generator: torch.Generator) -> torch.Tensor:
    """Choose samples at random, without replacement, in the proportions of the classes.

    The sample that comes r-th (from 0) in a random order of its class of m gets the key (r + u) / m, u
    uniform in [0, 1), and the smallest keys are taken: every class is represented by its share of
    ``quantity`` up to a rounding that is itself random.

    Args:
        labels: int64 ``[N]``.
        quantity: How many, from 0 to N.
        generator: On the CPU.

    Returns:
        Positions, int64 ``[quantity]``, on the device of ``labels``.
    """
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels.cpu()[order]
    keys = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    for label in torch.unique(shuffled):
        members = shuffled == label
        count = int(members.sum())
        keys[members] = (keys[members] + torch.arange(count)) / count
    return order[keys.argsort()[:quantity]].to(labels.device)

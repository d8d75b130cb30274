"""What every training is made of: an evaluation, and the optimiser steps of one epoch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from transferops._transfer import to_device
from transferops.otqms.augmentation import translated
from transferops.otqms.distributed import World
from transferops.otqms.options import BuiltInSchedule, TrainingOptions
from transferops.otqms.pool import Pool

_RISE = 0.02  # of a phase: Adam's first steps are as long as all others, whatever the gradients
_PLATEAU = 0.6  # of a phase
_PLATEAU_END = 0.05  # of the learning rate


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and the share of right answers on a set of samples."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, samples: Pool, part: int | None = None, world: World | None = None) -> Evaluation:
    """Cross-entropy and accuracy of ``model``, put in evaluation mode, on ``samples`` or one part of them."""
    world = world or World()
    model.eval()
    positions = samples.positions(part)
    sums = torch.zeros(2, device=samples.device, dtype=torch.float64)
    for inputs, labels in samples.batches(world.share(positions)):
        logits = model(inputs)
        sums[0] += F.cross_entropy(logits.float(), labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    loss, right = world.sum(sums).tolist()
    return Evaluation(loss / len(positions), right / len(positions))


@torch.no_grad()
def misclassified(model: nn.Module, samples: Pool) -> torch.Tensor:
    """Whether ``model``, put in evaluation mode, is wrong about each of ``samples``, bool ``[N]`` on the CPU."""
    model.eval()
    return torch.cat([model(inputs).argmax(1) != labels for inputs, labels in samples.batches()]).cpu()


@torch.no_grad()
def predict(model: nn.Module, samples: Pool, positions: torch.Tensor) -> torch.Tensor:
    """The probabilities of the classes that ``model``, put in evaluation mode, gives, float64 ``[n, C]`` on the CPU."""
    model.eval()
    return torch.cat([model(inputs).double().softmax(1) for inputs, _ in samples.batches(positions)]).cpu()


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The batches of an epoch: ``passes`` passes over the drawn samples, each in an order of its own.

    The batches of a pass differ in size by at most one sample: a last batch of a single sample would upset
    the optimiser's moments and stop a normalisation layer.

    Attributes:
        order: Positions, int64 ``[passes, n]``.
        steps: Batches in a pass.
        weights: Loss weight of each entry of ``order``, of mean 1 in a pass; ``None``: all 1.
        offsets: Translation of each entry of ``order``, an image, see :func:`transferops.otqms.augmentation.translate`:
            int64 ``[passes, n, 2]``; ``None``: none.
    """

    order: torch.Tensor
    steps: int
    weights: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    @classmethod
    def shuffled(
        cls,
        drawn: torch.Tensor,
        batch_size: int,
        min_steps: int,
        generator: torch.Generator,
        weights: torch.Tensor | None = None,
    ) -> EpochPlan:
        """Passes over ``drawn`` until at least ``min_steps`` steps are made; ``weights`` are those of ``drawn``."""
        steps = math.ceil(len(drawn) / batch_size)
        passes = max(1, math.ceil(min_steps / steps))
        shuffles = torch.stack([torch.randperm(len(drawn), generator=generator) for _ in range(passes)])
        scaled = None if weights is None else (weights / weights.mean())[shuffles]
        return cls(drawn[shuffles], steps, scaled)

    @property
    def samples(self) -> int:
        """Samples in a pass."""
        return int(self.order.shape[1])

    @property
    def total_steps(self) -> int:
        """Steps of all passes."""
        return self.steps * len(self.order)

    def on_device(self, device: torch.device) -> EpochPlan:
        """The same with weights and offsets on a device, in one copy each; positions stay."""
        weights, offsets = (None if x is None else to_device(x, device) for x in (self.weights, self.offsets))
        return replace(self, weights=weights, offsets=offsets)

    def batches(self) -> list[torch.Tensor]:
        """The positions of every step."""
        return self._by_step(self.order)

    def batch_weights(self) -> list[torch.Tensor] | None:
        """The weights of every step."""
        return None if self.weights is None else self._by_step(self.weights)

    def batch_offsets(self) -> list[torch.Tensor] | None:
        """The offsets of every step."""
        return None if self.offsets is None else self._by_step(self.offsets)

    def _by_step(self, values: torch.Tensor) -> list[torch.Tensor]:
        return [batch for row in values for batch in row.tensor_split(self.steps)]


class Stepper:
    """Takes optimiser steps; what it consists of is what a checkpoint keeps.

    The gradient of a step is that of the weighted mean loss over the whole batch, in however many pieces and
    processes it is computed.

    Args:
        model: Trained in place.
        options: How.
        lr: Learning rate.
        world: The processes that share every batch.
    """

    def __init__(self, model: nn.Module, options: TrainingOptions, lr: float, world: World) -> None:
        self.model = model
        self._options = options
        self._lr = lr
        self._world = world
        self._device = next(model.parameters()).device
        self._parallel = world.parallel(model, options.sharded)
        trained = [parameter for parameter in self._parallel.module.parameters() if parameter.requires_grad]
        self.optimizer = options.optimizer(trained, lr=lr)
        self._schedule = options.schedule(self.optimizer) if callable(options.schedule) else None
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=options.autocast is torch.float16)
        self._forward: Any = torch.compile(self._parallel.module) if options.compile else self._parallel.module

    def steps(self, samples: Pool, plan: EpochPlan, first: int, progress: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Take the steps of ``plan`` from ``first`` on.

        Args:
            samples: What the plan's positions are in.
            plan: The epoch.
            first: Steps already taken, from 0.
            progress: Epochs before this one, and in all: where a schedule is.

        Yields:
            After every step, this process's part of the loss summed over the batch, as it was before the step: on the
            device, where nothing has waited for it.
        """
        self._parallel.module.train()
        batches = plan.batches()[first:]
        plan = plan.on_device(self._device)
        weights, offsets = plan.batch_weights(), plan.batch_offsets()
        pieces = [self._pieces(batch) for batch in batches]
        if weights is None:
            factors: list[list[torch.Tensor] | None] = [None] * len(batches)
        else:
            factors = [self._pieces(weight) for weight in weights[first:]]
        stream = samples.read([piece for own in pieces for piece in own])
        if offsets is not None:
            stream = translated(stream, [piece for batch in offsets[first:] for piece in self._pieces(batch)])
        for number, (batch, own, factor) in enumerate(zip(batches, pieces, factors, strict=True), start=first):
            if isinstance(self._options.schedule, str):
                before, after = ((progress[0] + n / plan.total_steps) / progress[1] for n in (number, number + 1))
                self._set_lr(self._lr * _lr_factor(self._options.schedule, before, after))
            yield self._step(stream, len(batch), own, factor, idle=self._world.rank >= len(batch))

    def end_epoch(self) -> None:
        """Tell the scheduler."""
        if self._schedule is not None:
            self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, scheduler and loss scale, for :meth:`load_state_dict`; the model is kept apart.

        Every process must call it.
        """
        return {
            "optimizer": self._parallel.state_of(self.optimizer),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._parallel.load_state(self.optimizer, state["optimizer"])
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    def _step(
        self,
        stream: Iterator[tuple[torch.Tensor, torch.Tensor]],
        batch: int,
        pieces: Sequence[torch.Tensor],
        factors: Sequence[torch.Tensor] | None,
        idle: bool,
    ) -> torch.Tensor:
        options = self._options
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self._device)
        for i in range(len(pieces)):
            inputs, labels = next(stream)
            with contextlib.ExitStack() as stack:
                if i < len(pieces) - 1:
                    stack.enter_context(self._parallel.accumulating())
                with torch.autocast(self._device.type, options.autocast, enabled=options.autocast is not None):
                    logits = self._forward(inputs)
                losses = options.loss(logits if options.autocast is None else logits.float(), labels)
                if factors is not None:
                    losses = losses * factors[i]
                loss = losses.sum()
                if idle:
                    loss = 0 * loss
                # Processes average their gradients, hence the factor of their number.
                self._scaler.scale(loss * (self._world.size / batch)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._parallel.collect()
        return total

    def _pieces(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """This process's part of a batch, in pieces; one sample, which will not count, if it has none."""
        own = self._world.share(batch)
        if len(own) == 0:
            own = batch[:1]
        return list(own.tensor_split(min(self._options.accumulate, len(own))))

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def _lr_factor(schedule: BuiltInSchedule, before: float, after: float) -> float:
    """On the learning rate of a step, given the parts of the phase that are over before and after it."""
    rise = min(after / _RISE, 1.0)
    if schedule == "cosine":
        return rise * (1 + math.cos(math.pi * before)) / 2
    if schedule == "plateau":
        fall = max(before - _PLATEAU, 0.0) / (1 - _PLATEAU)
        return rise * (1 - (1 - _PLATEAU_END) * fall)
    return rise

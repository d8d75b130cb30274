"""A batch as the estimators see it: inputs to call the model with, targets, and how to take some of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from transferops._transfer import to_device
from transferops._validate import describe, fail


@dataclass(frozen=True)
class Batch:
    """Samples of one batch.

    Attributes:
        index: its position among the batches, for messages.
        inputs: a tensor [N, ...], or keyword arguments of which tensors of leading size N hold samples and
            everything else is shared by them.
        targets: as given; None if there are none.
        samples: N.
        given: the targets where they came from: what they are can be read from the CPU without waiting for a GPU.
    """

    index: int
    inputs: torch.Tensor | dict[str, Any]
    targets: Any
    samples: int
    given: Any = None

    @classmethod
    def parse(cls, index: int, batch: Any, device: torch.device) -> Batch:
        """From what an iterable yields: inputs, (inputs, targets, ...), or a mapping with targets as "labels"."""
        inputs, targets = batch, None
        if isinstance(batch, (tuple, list)) and batch:
            inputs, targets = batch[0], batch[1] if len(batch) > 1 else None
        elif isinstance(batch, Mapping) and "labels" in batch:
            inputs, targets = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
        tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
        sizes = [len(t) for t in tensors if isinstance(t, torch.Tensor) and t.dim() > 0]
        if not sizes:
            expected = "a tensor of inputs, a mapping with tensors of inputs, or (inputs, targets)"
            fail(f"batches[{index}]", expected, describe(batch), TypeError)
        if sizes[0] == 0:
            shape = list(next(t.shape for t in tensors if isinstance(t, torch.Tensor) and t.dim() > 0))
            fail(f"batches[{index}]", "at least one sample", f"inputs of shape {shape}")
        if isinstance(inputs, Mapping):
            moved: Any = {name: _settle(value, device) for name, value in inputs.items()}
        else:
            moved = _settle(inputs, device)
        return cls(index, moved, _settle(targets, device), sizes[0], targets)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All on the device."""
        values = [*(self.inputs.values() if isinstance(self.inputs, dict) else [self.inputs]), self.targets]
        return [value for value in values if isinstance(value, torch.Tensor)]

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the model."""
        return ((), self.inputs) if isinstance(self.inputs, dict) else ((self.inputs,), {})

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for batches whose samples look alike."""
        items = self.inputs.items() if isinstance(self.inputs, dict) else [("", self.inputs)]
        described = [
            (name, value.dtype, value.shape[1:] if self.holds_samples(value) else value.shape)
            if isinstance(value, torch.Tensor)
            else (name, type(value))
            for name, value in items
        ]
        return (self.samples > 1, *described)

    def holds_samples(self, value: Any) -> bool:
        """Whether the leading dimension of ``value`` is that of the samples."""
        return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == self.samples

    def copy(self) -> Batch:
        """The same in memory of its own."""

        def copied(value: Any) -> Any:
            return value.clone() if isinstance(value, torch.Tensor) else value

        given, targets = self.inputs, copied(self.targets)
        inputs = {n: copied(v) for n, v in given.items()} if isinstance(given, dict) else copied(given)
        return Batch(self.index, inputs, targets, self.samples, targets)

    def repeated(self) -> Batch:
        """As many samples, all of them the first."""

        def first(value: Any) -> Any:
            return value[:1].expand_as(value).clone() if self.holds_samples(value) else value

        given, targets = self.inputs, first(self.targets)
        inputs = {n: first(v) for n, v in given.items()} if isinstance(given, dict) else first(given)
        return Batch(self.index, inputs, targets, self.samples, targets)

    def rows(self, start: int, stop: int) -> Batch:
        """The samples from ``start`` to ``stop``, without their targets."""
        return self._part(slice(start, stop), stop - start)

    def pick(self, *samples: int) -> Batch:
        """Some samples in an order of one's own, without their targets."""
        return self._part(list(samples), len(samples))

    def _part(self, index: slice | list[int], samples: int) -> Batch:
        def take(value: Any) -> Any:
            return value[index] if self.holds_samples(value) else value

        if isinstance(self.inputs, dict):
            inputs: Any = {name: take(value) for name, value in self.inputs.items()}
        else:
            inputs = take(self.inputs)
        return Batch(self.index, inputs, None, samples)

    def run(self, model: nn.Module, parameters: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The model's outputs [N, ..., C], with some parameters replaced if given."""
        args, kwargs = self.arguments
        if parameters is None:
            return self.check_outputs(model(*args, **kwargs))
        return self.check_outputs(functional_call(model, dict(parameters), args, kwargs))

    def check_outputs(self, outputs: Any) -> torch.Tensor:
        """The tensor of outputs, itself or as the attribute ``logits`` of what the model returned."""
        outputs = getattr(outputs, "logits", outputs)
        if not isinstance(outputs, torch.Tensor):
            fail("model", "one tensor of outputs [N, C] or [N, T, C]", describe(outputs), TypeError)
        if outputs.dim() < 2 or len(outputs) != self.samples:
            expected = f"outputs of shape [{self.samples}, C] or [{self.samples}, T, C]"
            fail("model", expected, f"shape {list(outputs.shape)}")
        if not outputs.is_floating_point():
            fail("model", "floating-point outputs", describe(outputs), TypeError)
        return outputs


def _settle(value: Any, device: torch.device) -> Any:
    """On the model's device, detached, and usable by autograd even if made in inference mode."""
    if not isinstance(value, torch.Tensor):
        return value
    value = to_device(value.detach(), device)
    return value.clone() if value.is_inference() else value

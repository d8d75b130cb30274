"""The last linear layer of a model: finding it, and its input as rows of a least-squares problem."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transferops._models import layer_calls
from transferops._validate import describe, fail
from transferops.fisher.batches import Batch
from transferops.fisher.modes import evaluation

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Head:
    """A layer whose output is the model's, up to a change of shape.

    Attributes:
        name: its path in the model.
        module: nn.Linear, nn.Conv1d or nn.Conv2d.
        positions: rows per sample.
    """

    name: str
    module: nn.Module
    positions: int

    @property
    def weight(self) -> Tensor:
        """[c, p]: kernels flattened."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.detach().flatten(1)

    @property
    def bias(self) -> Tensor:
        """[c], zeros if the layer has none."""
        bias = self.module.bias
        weight = self.weight
        return bias.detach() if isinstance(bias, Tensor) else weight.new_zeros(len(weight))

    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Put in another head [c, p], [c]; a layer without bias gets one."""
        module = self.module
        old: Tensor = module.weight  # type: ignore[assignment]
        with torch.no_grad():
            old.copy_(weight.reshape(old.shape))
        if isinstance(module.bias, Tensor):
            with torch.no_grad():
                module.bias.copy_(bias)
        else:
            module.bias = nn.Parameter(bias.to(old), requires_grad=old.requires_grad)

    def rows(self, inputs: Tensor) -> Tensor:
        """The layer's input as [N * positions, p], so that its output is rows @ weight.T + bias."""
        module = self.module
        if isinstance(module, nn.Linear):
            return inputs.reshape(-1, inputs.shape[-1])
        return _unfold(module, inputs)

    def targets(self, targets: Any, outputs: Tensor) -> Tensor:
        """Targets in the order of the rows: [N * positions, c], or labels [N * positions].

        Args:
            targets: numbers in the shape of the model's outputs, or integer labels, one for each row.
            outputs: of the layer.
        """
        if not isinstance(targets, Tensor):
            fail("batches", "a tensor of targets beside the inputs", describe(targets), TypeError)
        channels_first = not isinstance(self.module, nn.Linear)
        if not targets.is_floating_point():
            rows = outputs.numel() // len(self.weight)
            if targets.numel() != rows:
                fail("targets", f"{rows} labels, one for each output position", f"shape {list(targets.shape)}")
            return targets.reshape(-1)
        if targets.numel() != outputs.numel():
            fail("targets", f"numbers in the shape of the outputs, {list(outputs.shape)}", f"{list(targets.shape)}")
        shaped: Tensor = targets.reshape(outputs.shape)
        return (shaped.movedim(1, -1) if channels_first else shaped).reshape(-1, len(self.weight))


class Recorder:
    """The last input and output of a head, while the model runs."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.calls = 0

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        self.inputs = (args[0] if args else kwargs["input"]).detach()
        self.outputs = output.detach()
        self.calls += 1

    def take(self, name: str) -> tuple[Tensor, Tensor]:
        """Input and output of the one call since the last time."""
        if self.calls != 1 or self.inputs is None or self.outputs is None:
            fail("head", f"{name!r} to be called once in a forward pass", f"{self.calls} calls")
        result = self.inputs, self.outputs
        self.inputs, self.outputs, self.calls = None, None, 0
        return result


@contextmanager
def recording(module: nn.Module) -> Iterator[Recorder]:
    """Watch a layer; nothing of earlier batches is kept."""
    recorder = Recorder()
    handle = module.register_forward_hook(recorder, with_kwargs=True)
    try:
        yield recorder
    finally:
        handle.remove()


def find_head(model: nn.Module, batch: Batch, name: str | None = None) -> Head:
    """The linear or convolutional layer that puts out what the model puts out, by running the model once.

    Args:
        model: run in evaluation mode.
        batch: samples to run it on.
        name: the layer's path in the model, if it is known.

    Raises:
        ValueError: there is no such layer, something but a change of shape follows it, it is called more than once, or
            it is a convolution in groups.
    """
    modules = dict(model.named_modules())
    if name is not None and not isinstance(modules.get(name), _LAYERS):
        known = ", ".join(repr(n) for n, module in modules.items() if isinstance(module, _LAYERS)) or "none"
        fail("head", f"a Linear, Conv1d or Conv2d layer of the model ({known})", repr(name))
    with evaluation(model):
        calls, outputs = layer_calls(model, lambda: batch.run(model), _LAYERS)
    calls = [(n, output) for n, output in calls if name in (None, n)]
    found = [n for n, output in calls if _same(output, outputs)]
    if not found:
        last = calls[-1][0] if calls else "none"
        fail("head", "a Linear, Conv1d or Conv2d layer that puts out what the model does", f"last such layer: {last!r}")
    chosen = found[-1]
    if sum(n == chosen for n, _ in calls) > 1:
        fail("head", f"{chosen!r} to be called once in a forward pass", f"{sum(n == chosen for n, _ in calls)} calls")
    module = modules[chosen]
    if getattr(module, "groups", 1) != 1:
        fail("head", "a convolution without groups", f"{chosen!r} with {module.groups}")
    output = next(output for n, output in calls if n == chosen)
    head = Head(chosen, module, 1)
    return replace(head, positions=output.numel() // len(head.weight) // batch.samples)


def _same(output: Any, outputs: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.numel() == outputs.numel()
        and output.device == outputs.device
        and output.dtype == outputs.dtype  # NaN is like NaN here; the features it comes from are refused by name
        and torch.allclose(output.flatten(), outputs.flatten(), rtol=0, atol=0, equal_nan=True)
    )


def _unfold(module: nn.Module, inputs: Tensor) -> Tensor:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    kernel, stride, dilation = ((1,) * (2 - len(v)) + tuple(v) for v in (
        module.kernel_size, module.stride, module.dilation,
    ))  # fmt: skip
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0, 0)
    else:
        padding = (0,) * (2 - len(module.padding)) + tuple(module.padding)
    if isinstance(module, nn.Conv1d):
        inputs = inputs.unsqueeze(-2)
    if math.prod(kernel) == 1 and math.prod(stride) == 1 and not any(padding):
        return inputs.movedim(1, -1).reshape(-1, inputs.shape[1])
    patches = F.unfold(inputs, kernel, dilation, padding, stride)  # [N, p, L]
    return patches.mT.reshape(-1, patches.shape[1])

"""Keep a part of a model as it is through training: single elements, channels or whole tensors, statistics included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from transferops._validate import describe, fail


class Frozen:
    """A part of a model that is being kept; made by :func:`freeze`.

    Usable as a context manager; :meth:`release` ends it, and calling it again does nothing.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._asked: list[nn.Parameter] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._modes: list[nn.Module] = []
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            if name in parameters and bool(mask.any()):
                self._freeze_parameter(parameters[name], mask.to(parameters[name].device))
        for prefix, module in model.named_modules():
            self._freeze_statistics(prefix, module, masks)
        if self._kept:
            self._handles.append(register_optimizer_step_post_hook(self._restore))

    def release(self) -> None:
        """Let the part train again. Values stay; every norm takes the mode of the model."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._asked:
            parameter.requires_grad_(True)
        for module in self._modes:
            module.training = self._model.training
        self._handles, self._asked, self._kept, self._modes = [], [], [], []

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _freeze_parameter(self, parameter: nn.Parameter, mask: torch.Tensor) -> None:
        if not parameter.requires_grad:
            return
        if bool(mask.all()):
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimiser would still step with it
            self._asked.append(parameter)
            return
        # Weight decay and momentum move elements without a gradient: they are put back after every step.
        self._kept.append((parameter, mask, parameter.detach().clone()))
        hook = parameter.register_hook(lambda gradient: gradient.masked_fill(mask, 0))  # type: ignore[no-untyped-call]
        self._handles.append(hook)

    def _freeze_statistics(self, prefix: str, module: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        dot = f"{prefix}." if prefix else ""
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if not isinstance(mean, torch.Tensor) or not isinstance(variance, torch.Tensor):
            return
        none = torch.zeros(mean.shape, dtype=torch.bool)
        mask = masks.get(f"{dot}running_mean", none) & masks.get(f"{dot}running_var", none)
        if not bool(mask.any()):
            return
        if bool(mask.all()):
            self._modes.append(module)
            self._handles.append(module.register_forward_pre_hook(_in_evaluation_mode))
            module.training = False
            return
        channels = _FrozenChannels(mask.to(mean.device), mean.clone(), variance.clone())
        self._handles.append(module.register_forward_hook(channels.after))

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        for parameter, mask, values in self._kept:
            parameter.copy_(torch.where(mask, values, parameter))


def freeze(model: nn.Module, part: Mapping[str, torch.Tensor] | Iterable[str]) -> Frozen:
    """Freeze a part of ``model``, until the result is released or its ``with`` block ends.

    It stays frozen through ``.train()``, weight decay and momentum. A parameter that is frozen whole asks for no
    gradient; of one that is frozen in part the frozen elements have gradient 0 and are put back after the step of any
    ``torch.optim`` optimiser. A norm whose statistics are frozen computes with them as in evaluation mode; where only
    some channels are frozen, those do, and the others use the batch as usual.

    Args:
        model: The model, in training or not.
        part: Masks by tensor name, True where frozen (as :func:`inherit` reports), or names of tensors or modules,
            a module standing for everything in it.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A name is not the model's, or a mask has another shape.
    """
    if not isinstance(model, nn.Module):
        fail("model", "a torch.nn.Module", describe(model), TypeError)
    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    if isinstance(part, Mapping):
        for name, mask in part.items():
            if name not in tensors:
                fail("part", "names of the model's tensors", repr(name))
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != tensors[name].shape:
                fail(f"part[{name!r}]", f"a bool tensor of shape {list(tensors[name].shape)}", describe(mask))
        return Frozen(model, {name: mask.cpu() for name, mask in part.items()})
    if isinstance(part, str):
        part = [part]
    masks: dict[str, torch.Tensor] = {}
    for prefix in part:
        inside = [name for name in tensors if name == prefix or name.startswith(f"{prefix}.") or prefix == ""]
        if not inside:
            fail("part", "names of the model's tensors or modules", repr(prefix))
        masks |= {name: torch.ones(tensors[name].shape, dtype=torch.bool) for name in inside}
    return Frozen(model, masks)


def _in_evaluation_mode(module: nn.Module, _: Any) -> None:
    module.training = False


class _FrozenChannels:
    """A batch norm of which some channels keep their statistics."""

    def __init__(self, mask: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.mask = mask
        self.mean = mean
        self.variance = variance

    def after(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Put the statistics back, and what was computed with those of the batch right."""
        if not module.training:
            return output
        for buffer, value in ((module.running_mean, self.mean), (module.running_var, self.variance)):
            # Unseen by autograd, which has kept the buffers but does not use them after a step on batch statistics.
            buffer.data.copy_(torch.where(self.mask, value, buffer))
        fixed = F.batch_norm(inputs[0], self.mean, self.variance, module.weight, module.bias, False, 0.0, module.eps)
        return torch.where(self.mask.view(1, -1, *[1] * (output.ndim - 2)), fixed, output)

"""Where a model's head is: found by running it, not by names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from transferops._validate import fail

# Linear and convolutional layers; their common base of nn.modules.conv is private.
HeadLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
HEAD_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_calls(
    model: nn.Module, run: Callable[[], Any], types: tuple[type[nn.Module], ...] = HEAD_TYPES
) -> tuple[list[tuple[str, Any]], Any]:
    """Which layers run, in that order.

    Args:
        model: Any module.
        run: Calls the model, on one sample for instance; the caller sees to modes.
        types: Of the layers to watch.

    Returns:
        (name among ``model.named_modules()``, output) for each call of such a layer; and what ``run`` returned.
    """
    calls: list[tuple[str, Any]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: calls.append((name, output))

    watched = [(name, module) for name, module in model.named_modules() if isinstance(module, types)]
    handles = [module.register_forward_hook(note(name)) for name, module in watched]
    try:
        with torch.no_grad():
            outputs = run()
    finally:
        for handle in handles:
            handle.remove()
    return calls, outputs


def find_head(model: nn.Module, run: Callable[[], Any], name: str | None = None) -> tuple[str, HeadLayer]:
    """The last linear or convolutional layer to run: what turns features into outputs.

    Args:
        model: Any module.
        run: Calls the model, on one sample for instance; the caller sees to modes and gradients.
        name: The layer, if it is known: then ``run`` is not called.

    Returns:
        Its name among ``model.named_modules()`` and the layer.

    Raises:
        ValueError: There is no such layer, none runs, or it runs more than once (then it is more than a head).
        TypeError: The named layer is neither linear nor convolutional.
    """
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            fail("head", f"a module of the model, such as {', '.join(map(repr, list(modules)[-3:]))}", repr(name))
        layer = modules[name]
        if not isinstance(layer, HEAD_TYPES):
            fail("head", "a linear or convolutional layer", f"{type(layer).__name__} at {name!r}", TypeError)
        return name, layer
    calls = [called for called, _ in layer_calls(model, run)[0]]
    if not calls:
        fail("model", "a linear or convolutional layer that runs", "none")
    last = calls[-1]
    if calls.count(last) > 1:
        fail("model", "a head that runs once", f"{last!r}, which runs {calls.count(last)} times: name another as head")
    return last, modules[last]

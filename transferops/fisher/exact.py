"""The exact Fisher information along given directions, by forward-mode derivatives of the outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from transferops.fisher.batches import Batch
from transferops.fisher.directions import Direction
from transferops.fisher.modes import function_transforms


def push_forward(model: nn.Module, tangents: Direction, batch: Batch, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    """Outputs [N, ..., C] and their derivatives along K directions, [K, N, ..., C].

    Nothing is kept for a backward pass. Scaled dot-product attention runs on its plain (math) backend, the fused
    ones having no forward-mode derivative.

    Args:
        model: the model, in evaluation mode.
        tangents: name to [K, *shape].
        batch: the samples.
        chunk_size: directions at a time; all if None. 1 is a plain loop, without ``torch.vmap``.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    moving = {name: parameters[name] for name in tangents}
    fixed = {name: p for name, p in parameters.items() if name not in tangents}
    count = len(next(iter(tangents.values())))

    def push(tangent: Direction) -> tuple[Tensor, Tensor]:
        value, derivative, *_ = jvp(lambda m: batch.run(model, {**fixed, **m}), (moving,), (tangent,))
        return value, derivative

    with function_transforms(gradients=False), _constant_padding(model):
        if chunk_size == 1 or count == 1:
            pairs = [push({name: t[k] for name, t in tangents.items()}) for k in range(count)]
            return pairs[0][0], torch.stack([derivative for _, derivative in pairs])
        values, derivatives = vmap(push, chunk_size=chunk_size)(tangents)
        return values[0], derivatives


@contextlib.contextmanager
def _constant_padding(model: nn.Module) -> Iterator[None]:
    """No derivative of padding entries: reverse mode leaves them out, PyTorch's forward mode does not."""

    def hold(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        padding = args[0].eq(cast(int, module.padding_idx)).unsqueeze(-1)
        return torch.where(padding, output.detach(), output)

    handles = [
        module.register_forward_hook(hold, prepend=True)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

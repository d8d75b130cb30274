"""Training in shards (fully_shard, FSDP2): parameters, gradients and the optimiser's state, a part in every process.

Steps are taken by a sharded copy of the model. Everything else (Fisher information, evaluation, checkpoints) works with
the whole model, which follows the copy after every step.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from transferops.otqms.distributed import Replicas


class Shards(Replicas):
    """A model of which every process has a part.

    Args:
        model: Whole in every process.
        processes: How many.
    """

    def __init__(self, model: nn.Module, processes: int) -> None:
        super().__init__(model, 1)
        mesh = init_device_mesh(next(model.parameters()).device.type, (processes,))
        self._sharded = fully_shard(copy.deepcopy(model), mesh=mesh)
        self.module = cast(nn.Module, self._sharded)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """See :class:`Replicas`."""
        self._sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._sharded.set_requires_gradient_sync(True)

    @torch.no_grad()
    def collect(self) -> None:
        """See :class:`Replicas`."""
        for whole, part in zip(self.model.parameters(), self.module.parameters(), strict=True):
            whole.copy_(_whole(part))
        for buffer, own in zip(self.model.buffers(), self.module.buffers(), strict=True):
            buffer.copy_(own)

    def state_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See :class:`Replicas`."""
        state: dict[str, Any] = tree_map(_whole, optimizer.state_dict())
        return state

    def load_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """See :class:`Replicas`."""
        optimizer.load_state_dict(state)
        for parameter, own in optimizer.state.items():
            if isinstance(parameter, DTensor):
                for key, value in own.items():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        own[key] = distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value

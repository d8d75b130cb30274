"""The processes that train together: one, or as many as torchrun started.

Every process holds the whole trainer and takes every decision; only the work is shared. What is summed over
processes is summed in float64 or by DistributedDataParallel, and what decides (the Gram matrix) is sent
from process 0, so that no two processes can decide differently.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` from 0 to ``size - 1``."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """Of the default process group; alone where there is none."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, index: torch.Tensor) -> torch.Tensor:
        """This process's part of ``index``: consecutive, sizes differ by at most one; perhaps empty."""
        return index.tensor_split(self.size)[self.rank]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over processes, of the dtype and on the device of ``value``."""
        if self.size == 1:
            return value
        carried = _on_wire(value).clone()
        distributed.all_reduce(carried)
        return carried.to(value.device)

    def send(self, tensors: Iterable[torch.Tensor], source: int = 0) -> None:
        """Overwrite ``tensors`` with those of process ``source``."""
        if self.size > 1:
            for tensor in tensors:
                carried = _on_wire(tensor.detach()).contiguous()
                distributed.broadcast(carried, source)
                tensor.detach().copy_(carried)

    def gather(self, value: torch.Tensor) -> list[torch.Tensor]:
        """``value``, of the same shape everywhere, from every process in order."""
        if self.size == 1:
            return [value]
        carried = _on_wire(value)
        parts = [torch.empty_like(carried) for _ in range(self.size)]
        distributed.all_gather(parts, carried)
        return [part.to(value.device) for part in parts]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def parallel(self, model: nn.Module, sharded: bool) -> Replicas:
        """What takes the steps of ``model``, gradients averaged over processes; ``sharded`` or whole in each."""
        if not sharded or self.size == 1:
            return Replicas(model, self.size)
        from transferops.otqms.sharding import Shards  # needs parts of torch that not every build has

        return Shards(model, self.size)


class Replicas:
    """A model that is whole in every process.

    Args:
        model: Trained in place.
        processes: How many.

    Attributes:
        model: As given.
        module: What is called in a step, and has the parameters that the optimiser works on.
    """

    def __init__(self, model: nn.Module, processes: int) -> None:
        self.model = model
        self.module = model
        if processes > 1:
            device = next(model.parameters()).device
            self.module = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def accumulating(self) -> AbstractContextManager[None]:
        """Inside, gradients are added up and not yet averaged."""
        if isinstance(self.module, DistributedDataParallel):
            return cast(AbstractContextManager[None], self.module.no_sync())
        return nullcontext()

    def collect(self) -> None:
        """After a step: bring ``model`` where ``module`` is. Every process must call it."""

    def state_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's whole state, as one process would have it. Every process must call it."""
        return optimizer.state_dict()

    def load_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_of` gave."""
        optimizer.load_state_dict(state)


@contextmanager
def launched(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, connected inside; alone where it started none.

    Args:
        device: What they train on: GPUs are connected by NCCL, everything else by Gloo.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or not distributed.is_available():
        yield World.current()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # DistributedDataParallel imports this module, and the defaults of its functions are the group at that moment: they
    # would keep it, and Gloo's threads, for ever. Such a thread may end the process with "terminate called without an
    # active exception", by a tensor that it lets go while the interpreter shuts down.
    importlib.import_module("torch.distributed.nn.functional")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World.current()
    finally:
        distributed.destroy_process_group()


def _on_wire(value: torch.Tensor) -> torch.Tensor:
    """``value`` where the processes can exchange it: NCCL knows GPUs only."""
    return value.cuda() if distributed.get_backend() == "nccl" else value

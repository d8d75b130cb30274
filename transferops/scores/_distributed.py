"""torch.distributed as the scores use it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transferops._validate import fail


def check_group() -> None:
    """Raise unless there is a process group to reduce over."""
    if not (dist.is_available() and dist.is_initialized()):
        fail("group", "torch.distributed to be initialised (torch.distributed.init_process_group)", "no process group")


def gather(value: Any, group: Any) -> list[Any]:
    """``value`` (tensors in it on the CPU) of every process, in the order of the ranks."""
    result: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(result, value, group=group)
    return result


def sum_over(tensors: list[Tensor], group: Any) -> None:
    """Sum each float64 or int64 tensor over the processes, in place."""
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)


def same_everywhere(argument: str, values: list[Any], what: str) -> None:
    """Raise if the processes' ``values``, None where a process has no samples, differ."""
    known = {value for value in values if value is not None}
    if len(known) > 1:
        fail(argument, f"the same {what} in every process", ", ".join(map(str, sorted(known, key=str))))


def to_cpu(rows: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Rows that can be sent to another process."""
    return [(values.cpu(), labels.cpu()) for values, labels in rows]


def device_of(device: torch.device | None) -> torch.device:
    """The device that a process without samples takes part with."""
    if device is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

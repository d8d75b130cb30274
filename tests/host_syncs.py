"""What makes a program wait for its GPU, found without one: by the operations that are called.

:class:`HostSyncs` notices operations of which the host has to read the result, or its size. :func:`pretended_gpu`
takes the device "meta", whose tensors have no values, for a GPU: copies show, too, and reading a value raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_READING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_READING_INSIDE = {_aten.multinomial.default, _aten.bincount.default, _aten._pack_padded_sequence.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor}


class HostSyncs(TorchDispatchMode):
    """Lists, inside, every operation for which a host would wait for its GPU.

    Args:
        device: the type of device that stands for the GPU.

    Attributes:
        found: the operations, in order.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.found: list[str] = []
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._waits(func, args, kwargs or {}):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))

    def _waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if func in (_aten._to_copy.default, _aten.copy_.default):
            return self._copies(func, args, kwargs)
        if all(tensor.device.type != self._device for tensor in tensors):
            return False
        if func in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            return any(i.dtype in (torch.bool, torch.uint8) or i.device != args[0].device for i in indices)
        return any(tag in func.tags for tag in _READING) or func in _READING_INSIDE

    def _copies(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a copy between host and GPU is waited for; a number for a kernel travels with its launch."""
        if func is _aten.copy_.default:
            target, source = args[0].device.type, args[1].device.type
            patient = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            number = args[1].dim() == 0
        else:
            target, source = torch.device(kwargs.get("device") or args[0].device).type, args[0].device.type
            patient, number = kwargs.get("non_blocking", False), False
        if target == source or self._device not in (target, source):
            return False
        return source == self._device or not (patient or number)


class PretendedStream:
    """In the place of a CUDA stream."""

    def __init__(self, device: Any = None) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self) -> None: ...


@contextlib.contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostSyncs]:
    """The device "meta" is taken for a GPU; what waits for it is listed."""
    monkeypatch.setattr("transferops._transfer.is_gpu", lambda device: device.type == "meta")
    monkeypatch.setattr("transferops.fisher.modes._refuse_unfit", lambda model: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", PretendedStream)
    monkeypatch.setattr(torch.cuda, "current_stream", PretendedStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    autocast, enabled = torch.autocast, torch.is_autocast_enabled  # which know no such device
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast(_host(kind), *args, **kwargs))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: enabled(_host(kind)))
    with HostSyncs("meta") as syncs:
        yield syncs


def _host(kind: str) -> str:
    return "cpu" if kind == "meta" else kind

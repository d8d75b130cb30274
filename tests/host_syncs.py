"""What makes a program wait for its GPU, found without one: by the operations that are called.

On tensors of any device: operations whose result, or its size, the host has to read. On fake CUDA tensors
(:func:`pretended_gpu`), which have a device but no values: copies between the devices, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_READING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_READING_INSIDE = {_aten.multinomial.default, _aten.bincount.default, _aten._pack_padded_sequence.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor}


class HostSyncs(TorchDispatchMode):
    """Lists, inside, every operation for which a host would wait for its GPU.

    Args:
        on_host: tensors that a GPU's program has on the host, such as an optimiser's count of its steps.

    Attributes:
        found: the operations, in order.
    """

    def __init__(self, on_host: list[Tensor] | None = None) -> None:
        super().__init__()
        self.found: list[str] = []
        self._on_host = {id(tensor) for tensor in on_host or []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._waits(func, args, kwargs or {}):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))

    def _waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if any(id(tensor) in self._on_host for tensor in tensors):
            return False
        if any(tag in func.tags for tag in _READING) and func not in _INDEXING or func in _READING_INSIDE:
            return True
        if func in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            return any(i.dtype in (torch.bool, torch.uint8) or i.device != args[0].device for i in indices)
        if func is _aten._to_copy.default:
            device = kwargs.get("device") or args[0].device
            return _crosses(device, args[0].device) and not kwargs.get("non_blocking", False)
        if func is _aten.copy_.default:
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            scalar = args[1].dim() == 0 and args[1].device.type == "cpu"  # travels with the launch
            return _crosses(args[0].device, args[1].device) and blocking and not scalar
        return False


def _crosses(one: torch.device, other: torch.device) -> bool:
    return one.type != other.type


@contextlib.contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostSyncs]:
    """Tensors made inside have no values, and may be of the device "cuda"; what waits for it is listed."""
    monkeypatch.setattr("transferops._extension._CUDA", True)
    with FakeTensorMode(allow_non_fake_inputs=True), HostSyncs() as syncs:
        yield syncs

"""Bringing tensors to a device without making the program, or the device, wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given")
Brought = TypeVar("Brought")


def is_gpu(device: torch.device) -> bool:
    """Whether a program can go on while the device works and copies."""
    return device.type == "cuda"


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on a device. A copy to a GPU goes through pinned memory, so that the program need not wait for it."""
    if not is_gpu(device) or value.device.type != "cpu":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)  # PyTorch keeps the pinned copy until it has been read


def ahead(
    items: Iterable[Given],
    bring: Callable[[Given], Brought],
    tensors: Callable[[Brought], Iterable[Tensor]],
    device: torch.device,
) -> Iterator[Brought]:
    """``bring(item)`` for each item; to a GPU the next one is copied while the caller computes with the last.

    Args:
        items: read one ahead of the caller where the device is a GPU, with the caller's stream as the current one.
        bring: copies the tensors of an item (:func:`to_device`); to a GPU, on a stream of its own.
        tensors: those of what was brought.
        device: where to.
    """
    if not is_gpu(device):
        yield from map(bring, items)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def hand_over(brought: Brought, arrived: torch.cuda.Event) -> Brought:
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        for tensor in tensors(brought):
            tensor.record_stream(current)  # its memory is the other stream's, and now in use by this one, too
        return brought

    before: tuple[Brought, torch.cuda.Event] | None = None
    for item in items:
        stream.wait_stream(torch.cuda.current_stream(device))  # for what of the item is computed on the device
        with torch.cuda.stream(stream):
            coming = bring(item), stream.record_event()
        if before is not None:
            yield hand_over(*before)
        before = coming
    if before is not None:
        yield hand_over(*before)

"""Hashes of content, so that what was made of one thing is not taken for what is made of another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def add_tensor(digest: Any, tensor: Tensor) -> None:
    """Let ``digest``, of hashlib, cover dtype, shape and values; not the device, nor the order in memory."""
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def content_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of all of them, in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        add_tensor(digest, tensor)
    return digest.hexdigest()

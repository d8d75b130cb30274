"""Parameters from files, without running anything that is in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transferops._checkpoint import read_torch
from transferops._validate import describe, fail

_NESTED = ("state_dict", "model_state_dict", "model", "module")


def load_state(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a state dict, onto the CPU.

    A ``.safetensors`` file (with the package safetensors), or anything that ``torch.load(weights_only=True)`` takes:
    a state dict, or a checkpoint with one under "state_dict", "model_state_dict", "model" or "module".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read that way, or holds no state dict.
        ImportError: It needs safetensors, which is not installed.
    """
    file = Path(path)
    if not file.is_file():
        fail("checkpoint", "a file", f"nothing at {file}", FileNotFoundError)
    content = _safetensors(file) if file.suffix == ".safetensors" else read_torch(file, file)
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        fail("checkpoint", "a state dict", f"{describe(content)} in {file}")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        fail("checkpoint", "tensors by name", f"none in {file}")
    return tensors


def _safetensors(file: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as missing:
        raise ImportError(".safetensors files need safetensors: pip install safetensors") from missing
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: expected a safetensors file, got {file} ({error})") from error

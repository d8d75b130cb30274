"""Files that are whole or not there at all, and are known to be what was written.

A file is one line, ``transferops checkpoint 1 <SHA-256 of the rest>``, and then what ``torch.save`` writes.
It is written beside its place, flushed to the disk and moved there in one step, so that a process killed at
any moment leaves the file before or the file after. Reading runs no code from it (``weights_only``).
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from transferops._validate import fail

_MAGIC = b"transferops checkpoint 1 "


def save(state: dict[str, Any], path: Path) -> None:
    """Write ``state``, made of tensors, numbers, strings, lists and dictionaries.

    Raises:
        OSError: If it cannot be written; what was there is left.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # one name: a killed process leaves at most one behind
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n")
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load(path: Path) -> dict[str, Any] | None:
    """What :func:`save` wrote, on the CPU; ``None`` if there is no file.

    Raises:
        ValueError: If the file is not a checkpoint, or damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    line, _, rest = content.partition(b"\n")
    if not line.startswith(_MAGIC):
        fail("checkpoint", f"a file of this version at {path}", "another one")
    if hashlib.sha256(rest).hexdigest().encode() != line[len(_MAGIC) :]:
        fail("checkpoint", f"{path} as it was written", "one with another checksum; remove it to start anew")
    state: dict[str, Any] = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    return state


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk, too, where folders can be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that are whole or not there at all, and are known to be what was written.

A file is one line, ``transferops checkpoint 1 <SHA-256 of the rest>``, and then what ``torch.save`` writes.
Reading runs no code from it (``weights_only``).
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, BinaryIO

import torch

from transferops._atomic import replacing
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
    with replacing(path) as file:
        file.write(_MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n")
        file.write(content)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """What :func:`save` wrote, on a device; ``None`` if there is no file.

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
    state = read_torch(io.BytesIO(rest), path, device)
    if not isinstance(state, dict):
        fail("checkpoint", f"a dictionary in {path}", type(state).__name__)
    return state


def read_torch(source: Path | BinaryIO, path: Path, device: torch.device | str = "cpu") -> Any:
    """What ``torch.save`` wrote, without running code from it.

    Raises:
        ValueError: If the file, called ``path``, is none that torch takes.
    """
    try:
        return torch.load(source, map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises a dozen kinds for a file that is none of its own
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"checkpoint: expected a file that torch.load(weights_only=True) takes, got {path}"
            f" ({type(error).__name__}{': ' + reason[0] if reason else ''})"
        ) from error

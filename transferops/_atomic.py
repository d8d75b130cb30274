"""Files that are whole or not there at all, whatever happens while they are written, and lines added to a file."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_LEFT_OVER_SECONDS = 3600.0


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which takes the name ``path`` when all of it is on the disk.

    It is written under another name in the same folder, flushed to the disk and renamed. So a process killed at any
    moment, and a full disk, leave the file before or the file after; of several writers the last one wins. What a
    killed process left is removed an hour later, by the next to write the same file. A link is followed, so that what
    it leads to is replaced, not the link; a pipe or device is written as it is.

    Raises:
        OSError: It cannot be written; what was there is left.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with target.open("wb") as device:
            yield device
        return
    prefix = f".{target.name}."
    _remove_left_over(target.parent, prefix)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's own mode is for the owner alone
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def append_line(path: str | os.PathLike[str], line: str, *, anew: bool = False) -> None:
    """Add a line, which is on the disk when this returns; ``anew`` makes it the first and only one.

    A process killed meanwhile leaves at most a part of it, which no newline ends. A pipe or device is only written to.

    Raises:
        OSError: It cannot be written.
    """
    new = anew or not os.path.exists(path)
    with open(path, "wb" if anew else "ab") as file:
        file.write(f"{line}\n".encode())
        file.flush()
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return
        os.fsync(file.fileno())
    if new:
        sync_folder(Path(path).absolute().parent)


def _remove_left_over(folder: Path, prefix: str) -> None:
    with os.scandir(folder) as entries:
        parts = [e for e in entries if e.name.startswith(prefix) and e.name.endswith(".part")]
    for part in parts:
        try:
            if time.time() - part.stat().st_mtime > _LEFT_OVER_SECONDS:
                os.unlink(part.path)
        except FileNotFoundError:  # another process was faster
            continue


def _umask() -> int:
    """Only setting it tells it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Put new names in it on the disk, too, where folders can be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Epochs as they come: a line of JSON each, and TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transferops._atomic import append_line
from transferops.otqms.records import EpochRecord

_KEY = ("strategy", "seed", "epoch")  # of an entry
_START = b'{"strategy": '  # of a line


class EpochLog:
    """Writes every epoch at once, to the disk, so that neither a killed process nor a machine that stops loses one.

    A line that could not be finished is removed when the file is opened again. A training that goes on from a
    checkpoint may write an epoch a second time; :func:`read_log` keeps the last.

    Args:
        path: A file to append lines to, each an object with ``strategy``, ``seed`` and the record's fields.
        tensorboard: A folder for TensorBoard, with a run for each strategy and seed.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, tensorboard: str | os.PathLike[str] | None = None
    ) -> None:
        self._path = None if path is None else Path(path)
        self._folder = None if tensorboard is None else Path(tensorboard)
        self._writers: dict[tuple[str, int], Any] = {}
        if self._path is not None:
            self._end_broken_line()
        if self._folder is not None:
            import torch.utils.tensorboard  # noqa: F401  (an extra: missing it is noticed before the training)

    def __call__(self, strategy: str, seed: int, record: EpochRecord) -> None:
        """Note one epoch."""
        if self._path is not None:
            append_line(self._path, json.dumps({"strategy": strategy, "seed": seed, **dataclasses.asdict(record)}))
        if self._folder is not None:
            self._to_tensorboard(strategy, seed, record)

    def close(self) -> None:
        """Flush what TensorBoard holds back."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _to_tensorboard(self, strategy: str, seed: int, record: EpochRecord) -> None:
        from torch.utils.tensorboard import SummaryWriter

        assert self._folder is not None
        key = (strategy, seed)
        if key not in self._writers:
            self._writers[key] = SummaryWriter(str(self._folder / f"{strategy}-seed-{seed}"))
        writer = self._writers[key]
        scalars = ("samples", "train_loss", "validation_loss", "validation_accuracy", "predicted_risk", "seconds")
        for name in scalars:
            if getattr(record, name) is not None:
                writer.add_scalar(name, getattr(record, name), record.epoch)
        for source, quantity in record.quantities.items():
            writer.add_scalar(f"quantity/{source}", quantity, record.epoch)
            writer.add_scalar(f"share/{source}", record.shares.get(source, 0.0), record.epoch)
        writer.flush()

    def _end_broken_line(self) -> None:
        """A process killed while it wrote leaves a part of a line, which the next must not continue.

        It goes, unless it is whole but for the newline, or never was a line of a log.
        """
        assert self._path is not None
        if not self._path.is_file():
            return
        content = self._path.read_bytes()
        complete = content.rfind(b"\n") + 1
        part = content[complete:]
        if not part:
            return
        with self._path.open("rb+") as file:
            if _START.startswith(part) or (part.startswith(_START) and _entry(part) is None):
                file.truncate(complete)
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The epochs in a log, of several with the same strategy, seed and number the last one; broken lines left out.

    Args:
        path: Of a log that :class:`EpochLog` has written.

    Returns:
        The entries, in the order of their first occurrence.

    Raises:
        FileNotFoundError: There is no such file.
    """
    epochs = {tuple(entry[key] for key in _KEY): entry for entry in _entries(Path(path))}
    return list(epochs.values())


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines():
        entry = _entry(line)
        if entry is not None:
            yield entry


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line says, or None if it is none of a log."""
    try:
        entry = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    if isinstance(entry, dict) and all(isinstance(entry.get(key), (str, int)) for key in _KEY):
        return entry
    return None

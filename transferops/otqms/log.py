"""Epochs as they come: a line of JSON each, and TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transferops.otqms.records import EpochRecord

_KEY = ("strategy", "seed", "epoch")  # of an entry


class EpochLog:
    """Writes every epoch at once, so that a killed process loses none.

    A training that goes on from a checkpoint may write an epoch a second time; :func:`read_log` keeps the last.

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
            line = json.dumps({"strategy": strategy, "seed": seed, **dataclasses.asdict(record)}) + "\n"
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
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
        """A process killed while it wrote leaves a part of a line; the next must not continue it."""
        assert self._path is not None
        if not self._path.exists() or self._path.stat().st_size == 0:
            return
        with self._path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
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
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and all(isinstance(entry.get(key), (str, int)) for key in _KEY):
            yield entry

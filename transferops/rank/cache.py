"""Features on disk, under a hash of all that they depend on: a run that is interrupted goes on where it was.

A data set is cut into parts, each extracted and written alone (whole or not at all, with a checksum). A part's hash
covers the weights, buffers, attributes and structure of the model, the source code of its classes that are not torch's,
the layers, the samples and the versions of torch and of this package: what changes one of them is computed anew. A
damaged file is computed anew, too. What the hash does not see are other functions that the model calls, and hooks.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transferops import __version__
from transferops import _checkpoint as checkpoint
from transferops._content import add_tensor
from transferops.rank.extraction import HEAD_INPUT, Extraction, extract

_PART = 2048
_BATCH = 256
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # hooks, modes and what is hashed elsewhere


def extract_cached(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    folder: str | Path | None,
    *,
    layers: Sequence[str] = (HEAD_INPUT,),
    head: str | None = None,
    batch_size: int = _BATCH,
    on_batch: Callable[[int], None] | None = None,
) -> Extraction:
    """:func:`~transferops.rank.extraction.extract`, reading from ``folder`` what is there and writing what is not.

    Args:
        model: As for ``extract``.
        inputs: Samples, ``[N, ...]``.
        labels: int64 ``[N]``.
        folder: Made if it does not exist; ``None`` to neither read nor write.
        layers: As for ``extract``.
        head: As for ``extract``.
        batch_size: Samples at a time.
        on_batch: Called with the number of samples after every batch, or for a whole part that was read.

    Raises:
        OSError: The folder cannot be written.
        ValueError, TypeError: As for ``extract``.
    """
    model_hash = None if folder is None else _hash_of_model(model)
    parts = []
    for x, y in zip(torch.split(inputs, _PART), torch.split(labels, _PART), strict=True):
        path = None
        if folder is not None:
            key = hashlib.sha256(f"{model_hash} {list(layers)} {head} {torch.__version__} {__version__}".encode())
            for tensor in (x, y):
                add_tensor(key, tensor)
            path = Path(folder) / f"{key.hexdigest()}.features"
        part = None if path is None else _read(path, layers)
        if part is not None:
            if on_batch is not None:
                on_batch(len(part))
        else:
            part = extract(model, _batches(x, y, batch_size), layers=layers, head=head, on_batch=on_batch)
            if path is not None:
                checkpoint.save(vars(part), path)
        parts.append(part)
    return Extraction(
        {name: torch.cat([part.features[name] for part in parts]) for name in layers},
        torch.cat([part.outputs for part in parts]),
        torch.cat([part.labels for part in parts]),
    )


def _read(path: Path, layers: Sequence[str]) -> Extraction | None:
    try:
        state = checkpoint.load(path)
    except ValueError:  # damaged
        return None
    if state is None or list(state["features"]) != list(layers):
        return None
    return Extraction(**state)


def _batches(inputs: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(torch.split(inputs, size), torch.split(labels, size), strict=True)


def _hash_of_model(model: nn.Module) -> str:
    digest = hashlib.sha256(repr(model).encode())
    classes = {type(module) for module in model.modules()}
    for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__)):
        digest.update(f"{cls.__module__}.{cls.__qualname__}".encode())
        if not cls.__module__.startswith("torch."):
            digest.update(_source(cls).encode())
    for path, module in model.named_modules():
        for name, value in sorted(vars(module).items()):  # such as a number of attention heads
            if name not in _OF_EVERY_MODULE:
                digest.update(f"{path}.{name}".encode())
                _add_attribute(digest, value)
    for name, value in (*model.named_buffers(), *model.state_dict().items()):  # some buffers are not in the latter
        digest.update(name.encode())
        if isinstance(value, Tensor):
            add_tensor(digest, value)
        else:  # extra state
            _add_attribute(digest, value)
    return digest.hexdigest()


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # typed at a prompt, or compiled
        return ""


def _add_attribute(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        add_tensor(digest, value)
        return
    if isinstance(value, np.ndarray):
        digest.update(value.tobytes())  # of which the text below leaves most out
    text = str(sorted(map(repr, value))) if isinstance(value, (set, frozenset)) else repr(value)
    digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", text).encode())

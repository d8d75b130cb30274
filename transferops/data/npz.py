"""Bundles in one ``.npz`` file: arrays ``<domain>_x`` and ``<domain>_y`` for every domain."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferops._validate import fail
from transferops.data.arrays import domain_from_arrays, looks_like_counts
from transferops.data.domains import DomainBundle


def load_npz(path: str | os.PathLike[str]) -> DomainBundle:
    """Read a bundle of domains from an ``.npz`` file.

    The file holds a pair of arrays per domain: ``<domain>_x``, uint8 images ``[N, H, W]`` or
    ``[N, H, W, C]`` (``C`` 1 or 3) or a feature matrix ``[N, D]``, and ``<domain>_y``, integer labels
    ``[N]`` from 0. Feature matrices of whole numbers only (in every domain) are taken as counts. How each
    kind is scaled is said in :func:`transferops.data.arrays.domain_from_arrays`. Pickled objects are never
    loaded.

    Args:
        path: The file.

    Returns:
        The bundle, domains in the order of the file, without class names.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError, ValueError: If the file is not readable as ``.npz``, a pair is incomplete, or an array
            is not as described; the message names the file and the array.
    """
    if not os.path.isfile(path):
        fail("data", "an .npz file", f"no file at {os.fspath(path)}", FileNotFoundError)
    try:
        arrays = _read_arrays(path)
        names = _domain_names(list(arrays))
        counts = looks_like_counts([arrays[f"{name}_x"] for name in names])
        domains = [domain_from_arrays(name, arrays[f"{name}_x"], arrays[f"{name}_y"], counts=counts) for name in names]
        return DomainBundle({domain.name: domain for domain in domains})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error


def _read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    with open(path, "rb") as file:  # opened here: np.load leaves a file that it cannot read open
        try:
            archive = np.load(file, allow_pickle=False)
        # RuntimeError, here and below: what zipfile does not know, or an encrypted member
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            raise ValueError("file: expected a complete .npz archive, got something unreadable as one") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            fail("file", "an .npz archive of several arrays", "a single .npy array")
        members = archive.zip
        assert members is not None  # until it is closed
        arrays = {}
        for key in archive.files:
            try:
                _check_header(members, key)
                arrays[key] = archive[key]
            except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
                fail(key, "a readable array without pickled objects", f"one with: {error}")
    return arrays


def _check_header(archive: zipfile.ZipFile, key: str) -> None:
    """Refuse a member that is no array, or shorter or longer than its header says, before memory is taken for it."""
    information = archive.getinfo(key if key in archive.namelist() else f"{key}.npy")
    with archive.open(information) as member:
        long = np.lib.format.read_magic(member) != (1, 0)
        read = np.lib.format.read_array_header_2_0 if long else np.lib.format.read_array_header_1_0
        shape, _, dtype = read(member)
        declared, held = math.prod(shape) * dtype.itemsize, information.file_size - member.tell()
    if declared != held and not dtype.hasobject:  # objects are refused by NumPy, as such
        raise ValueError(f"a header of {declared} bytes and {held} of them")


def _domain_names(keys: list[str]) -> list[str]:
    for key in keys:
        name, suffix = key[:-2], key[-2:]
        if suffix not in ("_x", "_y") or not name:
            fail("keys", "<domain>_x and <domain>_y", repr(key))
        if not name.isprintable() or any(separator in name for separator in "/\\"):
            fail("keys", "names of domains without separators of paths or control characters", repr(key))
        partner = name + ("_y" if suffix == "_x" else "_x")
        if partner not in keys:
            fail("keys", f"{partner} beside {key}", "no such array")
    if not keys:
        fail("keys", "<domain>_x and <domain>_y", "no arrays")
    return [key[:-2] for key in keys if key.endswith("_x")]

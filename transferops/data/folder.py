"""Bundles as an image-folder tree: ``domain/class/image``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from transferops._validate import check_positive_int, fail
from transferops.data.arrays import domain_from_arrays
from transferops.data.domains import DomainBundle


def load_folder(
    path: str | os.PathLike[str], image_size: int | None = None, *, skip_undecodable: bool = False
) -> DomainBundle:
    """Read a bundle of domains from a folder tree ``path/domain/class/image``.

    Every image is decoded by Pillow, turned upright if its EXIF data says so, and converted to RGB. The
    classes are the union over the domains, sorted by name; :meth:`DomainBundle.missing_classes` says which
    domain lacks one. Hidden entries (a leading dot) and stray files beside the folders are ignored. Symbolic
    links below ``path`` are refused, so that one image cannot silently be in two domains.

    Args:
        path: The folder.
        image_size: Resize every image to ``image_size x image_size`` (bilinear). Needed where sizes differ.
        skip_undecodable: Leave out images that cannot be decoded, in place of refusing the folder. Their names
            are in the bundle, and a warning gives their number.

    Returns:
        The bundle with class names, domains sorted by name, inputs float32 ``[N, 3, H, W]`` in [-1, 1].

    Warns:
        UserWarning: Images were left out.

    Raises:
        FileNotFoundError: If there is no such folder.
        ImportError: If Pillow is missing.
        ValueError: If a level of the tree is empty, an image cannot be decoded (with ``skip_undecodable``: no image
            of a domain can), or sizes differ.
    """
    root = Path(path)
    if not root.is_dir():
        fail("data", "a folder", f"no folder at {root}", FileNotFoundError)
    if image_size is not None:
        check_positive_int("image_size", image_size)
    tree = {
        domain.name: {kind.name: _entries(kind, "images", folders=False) for kind in kinds}
        for domain in _entries(root, "domain folders")
        for kinds in [_entries(domain, "class folders")]
    }
    class_names = tuple(sorted({name for classes in tree.values() for name in classes}))
    decode = _Decoder(image_size)
    domains, undecodable = {}, list[str]()
    for domain, classes in tree.items():
        files = [(file, class_names.index(name)) for name, images in classes.items() for file in images]
        images, labels = list[NDArray[np.uint8]](), list[int]()
        for file, label in files:
            try:
                images.append(decode(file))
            except _UndecodableError:
                if not skip_undecodable:
                    raise
                undecodable.append(file.relative_to(root).as_posix())
            else:
                labels.append(label)
        if not images:
            fail("data", f"an image in {root / domain} that can be decoded", f"none among {len(files)}")
        domains[domain] = domain_from_arrays(domain, np.stack(images), np.array(labels), counts=False)
    if undecodable:
        warnings.warn(f"data: {left_out(undecodable)}", stacklevel=2)
    return DomainBundle(domains, class_names, tuple(undecodable))


def left_out(undecodable: Sequence[str], most: int = 5) -> str:
    """A sentence with their number and the first of them."""
    names = ", ".join(undecodable[:most]) + ", ..." * (len(undecodable) > most)
    return f"left out {len(undecodable)} image{'s' * (len(undecodable) > 1)} that cannot be decoded: {names}"


def _entries(folder: Path, kind: str, *, folders: bool = True) -> list[Path]:
    """The visible folders (or files) in ``folder``, sorted; none at all is an error."""
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in visible:
        if entry.is_symlink():
            fail("data", "folders and files", f"a symbolic link at {entry}")
    found = [entry for entry in visible if entry.is_dir() == folders]
    if not found:
        fail("data", f"{kind} in {folder} (domain/class/image)", "none")
    return found


class _UndecodableError(ValueError):
    """A file that should be an image."""


class _Decoder:
    """Decodes image files of one size to uint8 ``[H, W, 3]``."""

    def __init__(self, image_size: int | None) -> None:
        self._image_size = image_size
        self._first: tuple[Path, str] | None = None

    def __call__(self, file: Path) -> NDArray[np.uint8]:
        from PIL import Image, ImageOps  # an extra: only image folders need it

        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _UndecodableError(f"data: expected an image, got {file}, which cannot be decoded") from error
        if self._image_size is not None:
            image = image.resize((self._image_size, self._image_size), Image.Resampling.BILINEAR)
        size = f"{image.width}x{image.height}"
        first, expected = self._first = self._first or (file, size)
        if size != expected:
            fail("data", f"images of one size, {expected} as {first} (or image_size)", f"{size} in {file}")
        return np.asarray(image, dtype=np.uint8)

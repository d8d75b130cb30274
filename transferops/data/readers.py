"""One entrance for every format on disk."""

from __future__ import annotations

import os

from transferops._validate import fail
from transferops.data.domains import DomainBundle
from transferops.data.folder import load_folder
from transferops.data.npz import load_npz


def load_bundle(
    path: str | os.PathLike[str], image_size: int | None = None, *, skip_undecodable: bool = False
) -> DomainBundle:
    """Read a folder with :func:`load_folder` and anything else with :func:`load_npz`.

    Args:
        path: A folder ``domain/class/image`` or an ``.npz`` file.
        image_size: Passed to :func:`load_folder`; images in an ``.npz`` file have one size already.
        skip_undecodable: Passed to :func:`load_folder`; an ``.npz`` file has no images to decode.

    Raises:
        FileNotFoundError: If nothing is at ``path``.
        TypeError, ValueError: As the readers do.
    """
    if os.path.isdir(path):
        return load_folder(path, image_size, skip_undecodable=skip_undecodable)
    if not os.path.exists(path):
        fail("data", "an .npz file or an image folder", f"nothing at {os.fspath(path)}", FileNotFoundError)
    if image_size is not None:
        fail("image_size", "None for an .npz file (its images have one size)", str(image_size))
    if skip_undecodable:
        fail("skip_undecodable", "False for an .npz file (it has no images to decode)", "True")
    return load_npz(path)

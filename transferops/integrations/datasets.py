"""Domains from Hugging Face data sets. Nothing is imported for it: a data set says itself what its columns hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferops._validate import check_positive_int, describe, fail
from transferops.data import Domain
from transferops.data.arrays import domain_from_arrays

__all__ = ["from_hugging_face"]


def from_hugging_face(
    dataset: Any, name: str, *, inputs: str = "image", labels: str = "label", image_size: int | None = None
) -> Domain:
    """A domain of the samples of a data set.

    Args:
        dataset: a ``datasets.Dataset`` (one split, not a ``DatasetDict``) of N rows, which is read into memory.
        name: what the domain is called.
        inputs: the column of images (of any mode, converted to RGB) or of vectors of numbers of one length.
        labels: the column of integers from 0, a ``ClassLabel`` for instance.
        image_size: resize every image to ``image_size x image_size`` (bilinear). Needed where sizes differ.

    Returns:
        Inputs float32 [N, 3, H, W] in [-1, 1], or vectors [N, D] as they are; labels int64 [N].

    Raises:
        TypeError: not a data set, or a column holds something else.
        ValueError: a column is missing, there are no rows, sizes differ, or a value is not finite.
    """
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list):
        fail("dataset", "a datasets.Dataset of one split", describe(dataset), TypeError)
    for argument, column in (("inputs", inputs), ("labels", labels)):
        if column not in columns:
            fail(argument, f"a column among {', '.join(columns)}", repr(column))
    if len(dataset) == 0:
        fail("dataset", "at least one row", "none")
    if image_size is not None:
        check_positive_int("image_size", image_size)
    plain = dataset.with_format(None)  # as Python objects, whatever format the caller has set
    values = plain[:][inputs]
    if hasattr(values[0], "convert"):
        x = _images(inputs, values, image_size)
    elif image_size is not None:
        fail("image_size", f"None, column {inputs!r} having no images", str(image_size))
    else:
        x = _vectors(inputs, values)
    return domain_from_arrays(name, x, np.asarray(plain[:][labels]), counts=False)


def _images(column: str, images: list[Any], image_size: int | None) -> NDArray[np.uint8]:
    from PIL import Image  # the data set has decoded with it

    if image_size is not None:
        size = (image_size, image_size)
        images = [image.convert("RGB").resize(size, Image.Resampling.BILINEAR) for image in images]
    sizes = {image.size: row for row, image in reversed(list(enumerate(images)))}
    if len(sizes) > 1:
        (first, _), (other, row) = sorted(sizes.items(), key=lambda item: item[1])[:2]
        expected = f"images of one size, {first[0]}x{first[1]} as in row 0 (or image_size)"
        fail(column, expected, f"{other[0]}x{other[1]} in row {row}")
    return np.stack([np.asarray(image.convert("RGB"), dtype=np.uint8) for image in images])


def _vectors(column: str, rows: list[Any]) -> NDArray[Any]:
    try:
        vectors = np.asarray(rows)
    except ValueError as error:
        raise ValueError(f"{column}: expected vectors of one length, got {error}") from error
    if vectors.dtype.kind not in "iuf" or vectors.ndim != 2:
        fail(column, "images or vectors of numbers", f"{vectors.dtype} of shape {list(vectors.shape)}", TypeError)
    return vectors

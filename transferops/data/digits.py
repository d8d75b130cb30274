"""A small real bundle that needs no download: scikit-learn's digits under named domain shifts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from transferops.data.arrays import domain_from_arrays
from transferops.data.domains import DomainBundle

Images = NDArray[np.float64]

DEFAULT_TARGET = "rotated-30"
_TARGET_SHARE = 2  # the default target gets twice the images of a source: most of it is the test part


def load_digits_domains() -> DomainBundle:
    """The 1797 handwritten digits (8x8, from scikit-learn) as domains that share no image.

    The images are shuffled once, with a fixed seed, and cut into disjoint parts, each put through one shift:

    - ``rotated-30``: turned by 30 degrees; meant as the target, with twice as many images
    - ``rotated-15``: turned by 15 degrees: near the target
    - ``plain``: as they are
    - ``blurred``: averaged over 3x3 pixels
    - ``inverted``: dark on light
    - ``mirrored``: left and right exchanged: different shapes for most digits
    - ``rotated-90``: turned by 90 degrees: far from the target

    Returns:
        Seven domains, inputs float32 ``[N, 1, 8, 8]`` in [-1, 1], ten classes. Always the same.

    Raises:
        ImportError: If scikit-learn is missing.
    """
    from sklearn.datasets import load_digits  # an extra: only this bundle needs it

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    parts = np.array_split(order, len(_SHIFTS) - 1 + _TARGET_SHARE)
    parts = [np.concatenate(parts[:_TARGET_SHARE]), *parts[_TARGET_SHARE:]]
    domains = {}
    for (name, shift), part in zip(_SHIFTS.items(), parts, strict=True):
        images = shift(digits.images[part] / 16)  # the data set has grey levels 0..16
        pixels = np.rint(images.clip(0, 1) * 255).astype(np.uint8)
        labels = digits.target[part].astype(np.int64)
        domains[name] = domain_from_arrays(name, pixels, labels, counts=False)
    return DomainBundle(domains, tuple(str(name) for name in digits.target_names))


def _rotated(degrees: float) -> Callable[[Images], Images]:
    """Turn images anticlockwise about their centre, bilinear, black where nothing was."""
    angle = np.deg2rad(degrees)
    cosine, sine = np.cos(angle), np.sin(angle)

    def rotate(images: Images) -> Images:
        size = images.shape[1]
        centre = (size - 1) / 2
        row, column = np.mgrid[:size, :size] - centre
        # Where each pixel comes from, in the image with one black pixel around it.
        padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
        source_row = np.clip(cosine * row + sine * column + centre + 1, 0, size + 1)
        source_column = np.clip(cosine * column - sine * row + centre + 1, 0, size + 1)
        top, left = source_row.astype(int), source_column.astype(int)
        down, right = source_row - top, source_column - left
        turned: Images = (
            padded[:, top, left] * (1 - down) * (1 - right)
            + padded[:, top, left + 1] * (1 - down) * right
            + padded[:, top + 1, left] * down * (1 - right)
            + padded[:, top + 1, left + 1] * down * right
        )
        return turned

    return rotate


def _blurred(images: Images) -> Images:
    size = images.shape[1]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = [padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]
    averaged: Images = np.mean(windows, axis=0)
    return averaged


_SHIFTS: dict[str, Callable[[Images], Images]] = {
    DEFAULT_TARGET: _rotated(30),
    "rotated-15": _rotated(15),
    "plain": lambda images: images,
    "blurred": _blurred,
    "inverted": lambda images: 1 - images,
    "mirrored": lambda images: images[:, :, ::-1],
    "rotated-90": lambda images: np.rot90(images, axes=(1, 2)),
}

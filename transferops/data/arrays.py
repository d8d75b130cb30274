"""From NumPy arrays, as files hold them, to a checked :class:`Domain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transferops._validate import fail
from transferops.data.domains import Domain


def domain_from_arrays(name: str, x: NDArray[Any], y: NDArray[Any], *, counts: bool) -> Domain:
    """A domain from raw arrays.

    Args:
        name: The domain's name.
        x: uint8 images ``[N, H, W]`` or ``[N, H, W, C]`` with ``C`` 1 or 3, or a feature matrix ``[N, D]``
            of any real dtype.
        y: Integer labels ``[N]``, at least 0.
        counts: Whether a feature matrix holds counts (see :func:`looks_like_counts`).

    Returns:
        Images as float32 ``[N, C, H, W]`` in [-1, 1]; features as float32 ``[N, D]``, unchanged; counts as
        ``sqrt(D x / sum x)``: the square root evens out the variance of counts, every row has mean square
        1, and no statistic of other samples enters (a test sample stays unseen).

    Raises:
        TypeError: If a dtype is not one of these.
        ValueError: If a shape is not one of these, lengths disagree, or a value is not finite.
    """
    if y.dtype.kind not in "iu":
        fail(f"{name}_y", "integer labels", f"dtype {y.dtype}", TypeError)
    if y.ndim != 1 or len(y) != len(x):
        fail(f"{name}_y", f"shape [{len(x)}], one label per row of {name}_x", f"shape {list(y.shape)}")
    if len(x) == 0:
        fail(f"{name}_x", "at least one sample", f"shape {list(x.shape)}")
    return Domain(name, _inputs(f"{name}_x", x, counts), torch.from_numpy(y.astype(np.int64)))


def looks_like_counts(matrices: Sequence[NDArray[Any]]) -> bool:
    """Whether every matrix ``[N, D]`` holds whole numbers of at least 0 only, as word counts do."""
    return all(x.ndim == 2 and x.dtype.kind in "iuf" and bool(((x >= 0) & (x == np.floor(x))).all()) for x in matrices)


def _inputs(argument: str, x: NDArray[Any], counts: bool) -> torch.Tensor:
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        images = torch.from_numpy(np.ascontiguousarray(x[..., None] if x.ndim == 3 else x))
        if images.shape[-1] not in (1, 3):
            fail(argument, "images [N, H, W, C] with C 1 or 3", f"shape {list(x.shape)}")
        return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
    if x.ndim != 2:
        fail(argument, "uint8 images [N, H, W, C] or features [N, D]", f"{x.dtype} of shape {list(x.shape)}")
    if x.dtype.kind not in "iuf":
        fail(argument, "real numbers", f"dtype {x.dtype}", TypeError)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        features = torch.from_numpy(x.astype(np.float32))
    if not counts:
        return features
    totals = features.sum(1, keepdim=True).clamp(min=1)  # a row without any count stays 0
    return torch.sqrt(features * x.shape[1] / totals)

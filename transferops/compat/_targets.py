"""Targets as the peers' flag ``regression`` means them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transferops._validate import as_tensor, describe, fail


def real_targets(targets: Tensor | Any, regression: bool) -> Tensor:
    """Targets as a tensor: in float64 for regression, which the scores tell from classification by the dtype.

    Raises:
        TypeError: no array, complex numbers, or floating-point targets without ``regression``.
    """
    values = as_tensor("labels", targets)
    if values.is_complex():
        fail("labels", "real numbers", describe(values), TypeError)
    if values.is_floating_point() and not regression:
        fail("labels", "integers, or regression=True", describe(values), TypeError)
    return values.double() if regression else values

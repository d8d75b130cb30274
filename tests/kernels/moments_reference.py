"""The moments in extended precision, with bounds on the rounding error of any float64 summation order."""

from __future__ import annotations

import numpy as np
from moments_emulator import NARROW, Features

UNIT = 2.0**-53


def narrow_error(function: str, rows: int) -> float:
    """The error of an entry over sum_n |y_ni y_nj|; a y is within 2 u = 2^-23 of x - shift before further rounding.

    float32: a number is high + low + at most 2 u of it, low * low is dropped (2^-11 squared), so 8 u for a product;
    each of the six products of a slab of 16 rows rounds towards zero, 2 u; the sums of up to 64 slabs are added to
    nearest. The others: two factors of 11 or 8 bits; every step of 8 or 16 rows rounds towards zero, for up to 2048
    rows; such runs are added to nearest. Then float64, and 1 % for what is of second order.
    """
    unit = 2.0**-24
    if function == "float32_gram":
        error = (8 + 6 * 2 + min(-(-rows // 16), 64)) * unit
    else:
        bits, step = (11, 8) if function == "tf32_gram" else (8, 16)
        error = (
            2 * 2.0**-bits + 2.0 ** (-2 * bits) + (2 * min(-(-rows // step), 2048 // step) + -(-rows // 2048)) * unit
        )
    return 1.01 * (error + 4 * unit) + (rows + 1) * UNIT


def expected(
    function: str, features: Features, labels: np.ndarray | None = None, classes: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(value, tolerance) of every output of ``function``.

    A sum of n terms has an error of at most (n - 1) u sum |term| + O(u^2); a rounded factor adds one u.
    """
    y = features.shifted.astype(np.longdouble)
    sets, rows, columns = y.shape
    if function == "class_sums":
        sums, tolerances = np.zeros((2, sets, classes, columns), np.longdouble)
        for label in np.unique(labels):
            members = y[:, labels == label]
            sums[:, label] = members.sum(axis=1)
            tolerances[:, label] = members.shape[1] * UNIT * abs(members).sum(axis=1)
        return [(sums, tolerances)]
    transposed = y.swapaxes(1, 2)
    if function in NARROW:
        return [(transposed @ y, narrow_error(function, rows) * (abs(transposed) @ abs(y)))]
    if function == "gram":
        return [(transposed @ y, (rows + 1) * UNIT * (abs(transposed) @ abs(y)))]
    if function == "sample_gram":
        return [(y @ transposed, (columns + 1) * UNIT * (abs(y) @ abs(transposed)))]
    norms = (y**2).sum(axis=2)
    cubic, absolute = (np.einsum("sn,snd->sd", norms, values) for values in (y, abs(y)))
    quartic = (norms**2).sum(axis=1)
    return [
        (cubic, (rows + columns + 2) * UNIT * absolute),
        (quartic, (rows + 2 * columns + 3) * UNIT * quartic),
    ]

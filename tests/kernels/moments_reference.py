"""The moments in extended precision, with bounds on the rounding error of any float64 summation order."""

from __future__ import annotations

import numpy as np
from moments_emulator import Features

UNIT = 2.0**-53


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

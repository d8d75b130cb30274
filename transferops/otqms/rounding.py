"""From fractional to whole samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transferops.otqms.theory import FloatArray


def largest_remainder(
    quantities: FloatArray, limits: FloatArray, costs: FloatArray, budget: float = np.inf
) -> NDArray[np.int64]:
    """Whole numbers of samples near ``quantities``, by largest remainder.

    Rounded down first; then one sample more for the sources of largest fractional part, the first source first in a
    tie, while a limit is set by the total (the nearest integer to that of ``quantities``, halves up) and by the
    budget. A finite budget replaces the total: what it leaves after rounding down is spent on further fractional parts.

    Args:
        quantities: [K], from 0 to ``limits``, costing no more than ``budget``.
        limits: [K], samples there are; fractions of a sample are not taken.
        costs: [K], of one sample.
        budget: the most that the result may cost.

    Returns:
        int64 [K], each within one of its quantity.
    """
    slack = 1e-9 * np.maximum(quantities, 1)  # 2.9999999999 is 3, not 2 and a remainder
    whole = np.minimum(np.floor(quantities + slack), np.floor(limits))
    remainder = quantities - whole
    order = np.argsort(-remainder, kind="stable")
    order = order[(remainder[order] > slack[order]) & (whole[order] + 1 <= limits[order])]
    if np.isinf(budget):
        missing = int(np.floor(quantities.sum() + 0.5) - whole.sum())
        whole[order[: max(missing, 0)]] += 1
        return whole.astype(np.int64)
    left = budget * (1 + 1e-12) - costs @ whole
    for source in order:
        if costs[source] <= left:
            whole[source] += 1
            left -= costs[source]
    return whole.astype(np.int64)

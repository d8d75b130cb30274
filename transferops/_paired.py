"""Means of differences that are paired by seed: their intervals, and what these say in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_ERROR = 0.05


def student_interval(differences: ArrayLike, error: float) -> tuple[float, float]:
    """Student's interval of confidence 1 - ``error`` for the mean of two or more differences.

    Differences that are all the same have no spread to build it from. They count as evidence only if a two-sided sign
    test on so many does, that is if 2^(1-count) <= error; otherwise the interval is unbounded.

    Raises:
        ImportError: scipy is not installed.
    """
    values = np.asarray(differences, dtype=np.float64)
    count, mean, spread = len(values), float(values.mean()), float(values.std(ddof=1))
    if spread <= 1e-12 * max(abs(mean), 1e-300):
        return (mean, mean) if mean == 0 or 2.0 ** (1 - count) <= error else (-math.inf, math.inf)
    try:
        from scipy.stats import t
    except ImportError as missing:
        raise ImportError('intervals need scipy: pip install "transferops[otqms]"') from missing
    half = float(t.ppf(1 - error / 2, count - 1)) * spread / math.sqrt(count)
    return mean - half, mean + half


def in_words(subject: str, other: str, points: Sequence[float]) -> str:
    """How many points ``subject`` is above or below ``other``, one difference for each seed, and how sure that is."""
    mean = float(np.mean(points))
    size, side = f"{abs(mean):.1f} points", "above" if mean >= 0 else "below"
    if len(points) == 1:
        return f"{subject} is {size} {side} {other}; one seed cannot say how sure that is."
    low, high = student_interval(points, _ERROR)
    clear = "a clear difference" if low > 0 or high < 0 else "no clear difference"
    error = float(np.std(points, ddof=1)) / math.sqrt(len(points))
    return f"{subject} is {size} (± {error:.1f}) {side} {other}, {clear}."

"""Percentile intervals of bootstrap resamples."""

from __future__ import annotations

import math


def expanded_tail(count: int, error: float) -> float:
    """The share of resamples to leave out on either side, for an interval of confidence 1 - ``error``.

    Plain percentiles (``error / 2``) give an interval of normal quantiles whose variance is divided by the number of
    observations, ``count``, in place of one less, and so cover too rarely. These are the percentiles that make up for
    both (Hesterberg, 2015, "What Teachers Should Know About the Bootstrap": the expanded percentile interval).

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import norm, t
    except ImportError as missing:
        raise ImportError('intervals need scipy: pip install "transferops[otqms]"') from missing
    widened = math.sqrt(count / (count - 1)) * t.ppf(1 - error / 2, count - 1)
    return float(norm.cdf(-widened))

"""Does inheriting help or hurt? Paired differences to alpha = 0, simultaneous intervals, a verdict for each alpha."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from transferops._bootstrap import expanded_tail
from transferops._paired import student_interval
from transferops._validate import check_array, check_positive_int, describe, fail

Verdict = Literal["positive", "negative", "undecided"]
INTERVALS = ("t", "bootstrap")


@dataclass(frozen=True)
class Effect:
    """What inheriting a share alpha does to the metric, against inheriting nothing.

    Attributes:
        alpha: The share.
        metric: Mean of the metric over seeds.
        difference: Mean over seeds of the metric minus that of the same seed at alpha = 0.
        low, high: Interval of the expected difference; all intervals of a check hold at once with its confidence.
        verdict: "positive" if the interval is above 0, "negative" if it is below, else "undecided".
    """

    alpha: float
    metric: float
    difference: float
    low: float
    high: float
    verdict: Verdict


def paired_effects(
    metrics: Any,
    alphas: Sequence[float],
    *,
    confidence: float = 0.95,
    interval: str = "t",
    resamples: int = 10000,
    seed: int = 0,
) -> tuple[Effect, ...]:
    """Compare every alpha with alpha = 0, seed by seed.

    The family-wise error is held by Bonferroni's correction: each of the k intervals has confidence
    1 - (1 - confidence)/k. "t" is Student's interval of the paired differences; "bootstrap" resamples the seeds
    (percentiles, expanded for their number), makes no assumption of normality, and is too narrow for fewer than about
    ten seeds.

    Differences that are the same in every seed have no spread to build an interval from. They count as evidence
    only if a two-sided sign test on that many seeds does, that is if 2^(1-seeds) <= (1 - confidence)/k; otherwise
    the interval is unbounded.

    Args:
        metrics: ``[alphas, seeds]``, finite, larger is better; at least 2 seeds.
        alphas: One per row, 0 among them.
        confidence: Of all intervals together, in (0, 1).
        interval: "t" or "bootstrap".
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        One effect for every alpha other than 0, in the order of ``alphas``.

    Raises:
        ValueError: An argument is out of range or shapes disagree.
    """
    values = check_array("metrics", metrics)
    shares = [float(alpha) for alpha in alphas]
    if values.ndim != 2 or len(values) != len(shares) or values.shape[1] < 2:
        fail("metrics", f"shape [{len(shares)}, seeds] with at least 2 seeds", str(list(values.shape)))
    if shares.count(0.0) != 1 or len(set(shares)) < max(len(shares), 2):
        fail("alphas", "0 and at least one other share, each once", str(shares))
    if not 0 < confidence < 1:
        fail("confidence", "a number in (0, 1)", describe(confidence))
    if interval not in INTERVALS:
        fail("interval", "'t' or 'bootstrap'", describe(interval))
    error = (1 - confidence) / (len(shares) - 1)
    draws = None
    if interval == "bootstrap":
        check_positive_int("resamples", resamples)
        draws = np.random.default_rng(seed).integers(0, values.shape[1], (resamples, values.shape[1]))
    scratch = values[shares.index(0.0)]
    effects = []
    for alpha, row in zip(shares, values, strict=True):
        if alpha == 0:
            continue
        low, high = _interval(row - scratch, error, draws)
        verdict: Verdict = "positive" if low > 0 else "negative" if high < 0 else "undecided"
        effects.append(Effect(alpha, float(row.mean()), float((row - scratch).mean()), low, high, verdict))
    return tuple(effects)


def overall(effects: Sequence[Effect]) -> Verdict:
    """ "positive" or "negative" if some alpha is and none is the opposite, else "undecided"."""
    verdicts = {effect.verdict for effect in effects} - {"undecided"}
    return verdicts.pop() if len(verdicts) == 1 else "undecided"


def _interval(differences: NDArray[np.float64], error: float, draws: NDArray[np.int64] | None) -> tuple[float, float]:
    low, high = student_interval(differences, error)
    if draws is None or low == high or math.isinf(low):  # without a spread there is nothing to resample
        return low, high
    tail = expanded_tail(len(differences), error)
    low, high = np.quantile(differences[draws].mean(1), [tail, 1 - tail])
    return float(low), float(high)

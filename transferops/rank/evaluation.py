"""How well a score ranks candidates whose accuracies are known.

Four measures, the ones the literature reports, each with an interval by resampling of the candidates:

- weighted Kendall tau (Vigna, WWW 2015; hyperbolic weights, so that an error among the best counts most), as LogME and
  its successors report it;
- Pearson correlation, as PARC (Bolya et al., NeurIPS 2021) reports it;
- rel@k: the best accuracy among the k candidates of highest score, relative to the best of all (Li et al., CVPR 2023);
- recall@k: the share of the k most accurate candidates that are among the k of highest score.

The intervals are percentiles of the bootstrap, but for tau. Candidates that a resample repeats are tied, and one of
them may take the weights of several of the first ranks: tau varies more between resamples than between samples, the
more so the fewer candidates there are. Its interval comes from subsamples without replacement, of two sizes, since tau
is a matter of pairs as well as of candidates, see :func:`_subsample_interval`.

Where candidates have the same score, the last two are means over all orders of these, so that the order in which the
candidates are given says nothing.

What the literature says of such evaluations: a handful of candidates leaves wide intervals, the measures disagree with
each other, and model size or k-nearest neighbours alone often rank as well as any score (arXiv 2503.18528, 2510.06448).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferops._bootstrap import expanded_tail
from transferops._validate import check_array, check_positive_int, describe, fail

FloatArray = NDArray[np.float64]
_PAIRS = 1 << 22  # of candidates, looked at at once
_FEW = 10  # candidates, below which intervals are rough


@dataclass(frozen=True)
class Measure:
    """A measure and its interval.

    Attributes:
        value: Over all candidates (the mean over targets if there are several).
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RankingQuality:
    """How well scores rank candidates, see :func:`evaluate_ranking`.

    Attributes:
        weighted_tau: Weighted Kendall tau, -1 to 1.
        pearson: Pearson correlation, -1 to 1.
        relative_accuracy: rel@k, at most 1 for accuracies that are not negative.
        recall: recall@k, 0 to 1.
        candidates: Candidates per target.
        targets: Number of targets.
        k: Of rel@k and recall@k.
    """

    weighted_tau: Measure
    pearson: Measure
    relative_accuracy: Measure
    recall: Measure
    candidates: int
    targets: int
    k: int


def evaluate_ranking(
    scores: ArrayLike,
    accuracies: ArrayLike,
    *,
    k: int = 1,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> RankingQuality:
    """Compare scores with the accuracies that were reached.

    Args:
        scores: ``[M]``, or ``[T, M]`` for T targets; a higher score promises more. Of any scale.
        accuracies: Of the same shape; higher is better.
        k: Candidates that one would try, 1 to M.
        confidence: Of the intervals, between 0 and 1.
        resamples: Of the candidates, the same ones for all targets: with replacement, intervals being their
            percentiles, expanded for the number of candidates; for tau without, see :mod:`transferops.rank.evaluation`.
            With fewer than about 10 candidates intervals are rough. Where a resample leaves a measure undefined (a
            single value repeated), it does not count; where all do, as for tau of two candidates, the interval is NaN.
            Where all candidates are in the right order, they are so in every resample: tau's interval is a point, 1,
            and says nothing of how lucky that was.
        seed: Of the resamples.

    Returns:
        The four measures. With several targets each is the mean over targets. A measure that is undefined is NaN: the
        correlations where all scores or all accuracies are equal, rel@k where the best accuracy is 0.

    Raises:
        ValueError: Shapes differ, fewer than 2 candidates, a value that is not finite, or a number out of range.
        ImportError: scipy is not installed.
    """
    scores, accuracies = check_array("scores", scores), check_array("accuracies", accuracies)
    if scores.ndim not in (1, 2):
        fail("scores", "shape [M] or [T, M]", f"shape {list(scores.shape)}")
    if accuracies.shape != scores.shape:
        fail("accuracies", f"shape {list(scores.shape)} like scores", f"shape {list(accuracies.shape)}")
    scores, accuracies = np.atleast_2d(scores), np.atleast_2d(accuracies)
    targets, candidates = scores.shape
    if candidates < 2 or targets < 1:
        fail("scores", "at least 2 candidates", f"shape {list(scores.shape)}")
    if check_positive_int("k", k) > candidates:
        fail("k", f"at most {candidates}, the number of candidates", str(k))
    check_positive_int("resamples", resamples)
    if not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        fail("confidence", "a number between 0 and 1", describe(confidence))

    everything = np.arange(candidates)[None]
    generator = np.random.default_rng(seed)
    drawn = generator.integers(candidates, size=(resamples, candidates))
    shuffled = generator.permuted(np.repeat(everything, resamples, axis=0), axis=1)
    measures = {}
    for name, measure in _MEASURES.items():
        value = float(_over_targets(measure, scores, accuracies, everything, k)[0])
        if name == "weighted_tau":
            parts = {}
            for size in _subsample_sizes(candidates):
                found = _over_targets(measure, scores, accuracies, shuffled[:, :size], k)
                parts[size] = found[np.isfinite(found)]
            low, high = _subsample_interval(value, parts, candidates, confidence)
        else:
            found = _over_targets(measure, scores, accuracies, drawn, k)
            low, high = _bootstrap_interval(found[np.isfinite(found)], candidates, confidence)
        measures[name] = Measure(value, low, high)
    return RankingQuality(**measures, candidates=candidates, targets=targets, k=k)


def compare_scores(scores: Mapping[str, ArrayLike], accuracies: ArrayLike, **options: Any) -> dict[str, RankingQuality]:
    """:func:`evaluate_ranking` of several scores on the same candidates and the same resamples.

    Args:
        scores: By name, each of the shape of ``accuracies``. Put the honest baselines among them: the number of
            parameters, and k-nearest neighbours.
        accuracies: ``[M]`` or ``[T, M]``.
        options: As for :func:`evaluate_ranking`.

    Returns:
        By name, best weighted tau first (undefined ones last).

    Raises:
        ValueError: As :func:`evaluate_ranking`, or no scores.
    """
    if not scores:
        fail("scores", "at least one score", "none")
    qualities = {name: evaluate_ranking(values, accuracies, **options) for name, values in scores.items()}
    return dict(sorted(qualities.items(), key=lambda item: -np.nan_to_num(item[1].weighted_tau.value, nan=-np.inf)))


def _bootstrap_interval(found: FloatArray, candidates: int, confidence: float) -> tuple[float, float]:
    if not len(found):
        return math.nan, math.nan
    tail = expanded_tail(candidates, 1 - confidence)
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _subsample_sizes(candidates: int) -> list[int]:
    """A third and half of the candidates, the smaller at least 4, of which there are rankings enough."""
    small = max(round(candidates / 3), min(4, candidates - 2), 2)
    large = max(round(candidates / 2), small + 1)
    return [size for size in (small, large) if size < candidates]


def _subsample_interval(
    value: float, parts: Mapping[int, FloatArray], candidates: int, confidence: float
) -> tuple[float, float]:
    """Of the weighted tau of n candidates, from what it is for subsamples of m of them, of two sizes [derived].

    By Hoeffding's decomposition the variance of a statistic of candidates and of pairs of them is a/n + b/(n (n - 1)),
    and between subsamples of m it is a (1/m - 1/n) + b (1/(m (m - 1)) - 1/(n (n - 1))) on average: two sizes give a
    and b, and the deviations of the smaller subsamples from their median are scaled to that variance (Politis, Romano
    and Wolf, 1999, "Subsampling", section 2.3.1, is the case b = 0). Since weights of 1 / (1 + rank) make the
    estimated variance that of few candidates, quantiles are widened by Student's with as many degrees of freedom as
    their effective number, (sum w)^2 / sum w^2 (Kish, 1965, "Survey Sampling"), less one.
    """
    if not parts or not all(len(found) for found in parts.values()):
        return math.nan, math.nan
    from scipy import stats

    sizes = np.array([*parts, candidates])
    terms = 1 / np.stack([sizes, sizes * (sizes - 1)], axis=1)
    shares, variances = terms[:-1] - terms[-1], np.array([found.var() for found in parts.values()])
    components = np.linalg.lstsq(shares, variances, rcond=None)[0]
    for other, component in enumerate(components[::-1]):
        if component < 0 or len(parts) == 1:
            components = np.zeros(2)
            components[other] = (variances / shares[:, other]).mean()
            break
    weights = 1 / np.arange(1, candidates + 1)
    tail, freedom = (1 - confidence) / 2, weights.sum() ** 2 / (weights**2).sum() - 1
    found = next(iter(parts.values()))
    rare = min(tail, 0.49)  # both quantiles are 0 at one half
    widened = float(stats.t.isf(rare, freedom) / stats.norm.isf(rare))
    scale = widened * float(np.sqrt(terms[-1] @ components)) / (float(found.std()) or 1.0)
    low, median, high = np.quantile(found, [tail, 0.5, 1 - tail])
    # What a few candidates have takes so few values that the median may be the highest: then the wider of two centres.
    centres = [median, value] if candidates < _FEW else [median]
    return max(value + scale * float(low - max(centres)), -1.0), min(value + scale * float(high - min(centres)), 1.0)


def _over_targets(
    measure: Any, scores: FloatArray, accuracies: FloatArray, drawn: NDArray[np.int64], k: int
) -> FloatArray:
    """The mean over targets of a measure for each row of candidates ``drawn``, ``[R]``."""
    per_target = [measure(x[drawn], y[drawn], k) for x, y in zip(scores, accuracies, strict=True)]
    return np.asarray(np.mean(per_target, axis=0), dtype=np.float64)


def _weighted_tau(scores: FloatArray, accuracies: FloatArray, _: int) -> FloatArray:
    """The share of pairs in the same order, less the others: pairs of weight w_i + w_j, w_i = 1 / (1 + rank of i).

    Ranks are by either of the two, equal values by the other one, and the mean is taken. The share is of sqrt(a b), a
    the weight of the pairs that are unequal in scores, b in accuracies.
    """
    rows, candidates = scores.shape
    block = max(_PAIRS // candidates**2, 1)
    result = np.empty(rows)
    for start in range(0, rows, block):
        x, y = scores[start : start + block], accuracies[start : start + block]
        signs = [(z[:, :, None] > z[:, None, :]).view(np.int8) for z in (x, y)]
        signs = [above - above.transpose(0, 2, 1) for above in signs]
        alike, *apart = (part.sum(2) for part in (signs[0] * signs[1], np.abs(signs[0]), np.abs(signs[1])))
        both = np.zeros(len(x))
        for by, ties in ((x, y), (y, x)):
            weights = np.empty(x.shape)
            ranked = np.lexsort((ties, by))[:, ::-1]
            np.put_along_axis(weights, ranked, 1 / np.arange(1.0, candidates + 1)[None], axis=1)
            total, first, second = ((weights * counts).sum(1) for counts in (alike, *apart))
            with np.errstate(divide="ignore", invalid="ignore"):
                both += total / np.sqrt(first * second)
        result[start : start + block] = both / 2
    return result


def _pearson(scores: FloatArray, accuracies: FloatArray, _: int) -> FloatArray:
    x, y = scores - scores.mean(1, keepdims=True), accuracies - accuracies.mean(1, keepdims=True)
    defined = (np.ptp(scores, axis=1) > 0) & (np.ptp(accuracies, axis=1) > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return np.where(defined, correlation, np.nan)


def _relative_accuracy(scores: FloatArray, accuracies: FloatArray, k: int) -> FloatArray:
    order = np.argsort(accuracies, axis=1)
    scores, accuracies = (np.take_along_axis(values, order, axis=1) for values in (scores, accuracies))
    certain, tied, places = _highest(scores, k)
    # The chance that the best of those drawn for the places is no more accurate than each of the tied.
    chance = np.ones_like(scores)
    for place in range(k):
        worse, left = np.maximum(tied.cumsum(1) - place, 0), np.maximum(tied.sum(1) - place, 1)
        chance *= np.where((place < places)[:, None], worse / left[:, None], 1)
    surpassed = np.where(certain, accuracies, -np.inf).max(1, keepdims=True)
    best = (np.diff(chance, axis=1, prepend=0) * np.maximum(accuracies, surpassed)).sum(1)
    highest = accuracies[:, -1]
    return np.asarray(np.divide(best, highest, out=np.full(len(best), np.nan), where=highest != 0))


def _recall(scores: FloatArray, accuracies: FloatArray, k: int) -> FloatArray:
    # By value, so that candidates of equal accuracy (a resample repeats them) count alike.
    right = accuracies >= np.sort(accuracies, axis=1)[:, -k, None]
    certain, tied, places = _highest(scores, k)
    return np.asarray(((certain & right).sum(1) + places * (tied & right).sum(1) / tied.sum(1)) / k)


def _highest(scores: FloatArray, k: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """The k highest scores of each row: those certain, those tied for the last places, and these places' number."""
    lowest = np.sort(scores, axis=1)[:, -k, None]
    certain = scores > lowest
    return certain, scores == lowest, k - certain.sum(1)


_MEASURES = {
    "weighted_tau": _weighted_tau,
    "pearson": _pearson,
    "relative_accuracy": _relative_accuracy,
    "recall": _recall,
}

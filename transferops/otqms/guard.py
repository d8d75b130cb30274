"""Whether to trust the sources: tests with an error rate, and a sentence that says what they found [derived].

Three questions. Is one source near enough to the target to be of use, given how noisily the distance is estimated
(:func:`judge_sources`)? Is a model trained with sources better than another, on the few held-out samples there are
(:func:`compare_losses`)? And which is therefore to be trained (:func:`choose`)?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferops._validate import check_array, check_positive_int, describe, fail
from transferops.otqms.theory import FloatArray

_EXACT_SAMPLES = 16  # 2^16 sign patterns are enumerated


@dataclass(frozen=True, eq=False)
class SourceVerdicts:
    """Which sources are of use.

    Attributes:
        decisions: "accept", "reject" or "undecided", one for each source.
        discrepancies: N0 t, float64 [K], the measured ones less what estimation adds on average, at least 0.
        limits: the N0 t up to which a source is of use, float64 [K].
        p_useful: the probability of so large a distance from a source just near enough: small speaks against it.
        p_useless: the probability of so small a distance from a source just too far: small speaks for it.
    """

    decisions: tuple[str, ...]
    discrepancies: FloatArray
    limits: FloatArray
    p_useful: FloatArray
    p_useless: FloatArray

    def sentences(self, names: Sequence[str] | None = None) -> list[str]:
        """What was decided and why, one sentence for each source, by their names or else numbers from 0."""
        labels = [str(i) for i in range(len(self.decisions))] if names is None else names
        reasons = {
            "accept": "near enough to the target to be of use (p = {useless:.2g} of looking so near otherwise)",
            "reject": "too far from the target to be of use (p = {useful:.2g} of looking so far otherwise)",
            "undecided": "the estimates do not tell whether it is near enough to be of use",
        }
        return [
            f"source {label}: {decision}, N0 t = {found:.3g} against {limit:.3g}: "
            + reasons[decision].format(useful=useful, useless=useless)
            for label, decision, found, limit, useful, useless in zip(
                labels, self.decisions, self.discrepancies, self.limits, self.p_useful, self.p_useless
            )
        ]


def judge_sources(
    distances: ArrayLike,
    target_samples: float,
    source_samples: ArrayLike,
    dimension: float,
    *,
    gain: float = 0.1,
    level: float = 0.05,
) -> SourceVerdicts:
    """Whether each source, weighted as well as can be, is worth at least ``gain`` times the target's samples [derived].

    n samples at their optimal weight count for n / (1 + n t), so the source is of use if t <= 1/(gain N0) - 1/n. The
    measured distance estimates d t with noise from both tasks: for maximum-likelihood estimates,
    A_hat_ii / (1/N0 + 1/N_i) is noncentral chi-squared with d degrees of freedom and noncentrality
    A_ii / (1/N0 + 1/N_i). The error rates hold where that does: "reject" comes for a source of use, and "accept" for
    one that is not, with probability at most ``level`` each. With d an effective dimension the distribution is an
    approximation. Every source is judged on its own: no correction for looking at many.

    Args:
        distances: A_hat_ii = (theta_i - theta_0)^T J (theta_i - theta_0), the diagonal of the estimated Gram matrix as
            it is, not debiased; shape [K], not negative.
        target_samples: N0, at least 1.
        source_samples: N_i, shape [K], positive.
        dimension: d, positive.
        gain: the least that counts as use, positive. A source with fewer than ``gain`` N0 samples cannot be of use.
        level: error rate, between 0 and 1/2.

    Returns:
        See :class:`SourceVerdicts`.

    Raises:
        ValueError: an argument is out of its range or not finite, or shapes do not fit.
        ImportError: SciPy is not installed.
    """
    try:
        from scipy.special import gammaln
        from scipy.stats import chi2, ncx2
    except ImportError as error:
        raise ImportError("judge_sources: expected SciPy, got none; run `pip install scipy`") from error
    measured, samples = check_array("distances", distances), check_array("source_samples", source_samples)
    if measured.ndim != 1 or not measured.size or measured.min() < 0:
        fail("distances", "numbers that are not negative, shape [K]", describe(distances))
    if samples.shape != measured.shape or samples.min() <= 0:
        fail("source_samples", f"positive numbers, shape {list(measured.shape)}", describe(source_samples))
    for argument, number, least in (("target_samples", target_samples, 1.0), ("dimension", dimension, 0.0)):
        value = check_array(argument, number)
        if value.ndim or value < least or value == 0:
            fail(argument, f"a number of at least {least:g}" if least else "a positive number", describe(number))
    if not 0 < gain < np.inf:
        fail("gain", "a positive number", describe(gain))
    _check_level(level)

    per_sample = 1 / target_samples + 1 / samples
    limit = np.maximum(1 / (gain * target_samples) - 1 / samples, 0.0)
    possible = samples >= gain * target_samples
    statistic, centre = measured / per_sample, dimension * limit / per_sample
    near = centre < 1e-12 * dimension  # scipy's noncentral functions want more than nothing
    # The noncentral distribution function is at most the exponential of this (its series, with the growth of Gamma cut
    # short). Where that is nothing, scipy's may raise.
    with np.errstate(divide="ignore"):
        bound = dimension / 2 * np.log(statistic / 2) - gammaln(dimension / 2 + 1) - centre / 2
    tiny = ~near & (bound + centre * statistic / (2 * dimension + 4) < -200)
    safe, noncentral = np.where(tiny, dimension, statistic), np.where(near | tiny, 1.0, centre)
    p_useful = np.where(near, chi2.sf(safe, dimension), np.where(tiny, 1.0, ncx2.sf(safe, dimension, noncentral)))
    p_useless = np.where(near, chi2.cdf(safe, dimension), np.where(tiny, 0.0, ncx2.cdf(safe, dimension, noncentral)))
    p_useful, p_useless = np.where(possible, p_useful, 0.0), np.where(possible, p_useless, 1.0)
    decisions = np.where(p_useful <= level, "reject", np.where(p_useless <= level, "accept", "undecided"))
    return SourceVerdicts(
        decisions=tuple(decisions.tolist()),
        discrepancies=np.maximum(measured / dimension - per_sample, 0) * target_samples,
        limits=limit * target_samples,
        p_useful=p_useful,
        p_useless=p_useless,
    )


def caution(distances: ArrayLike, target_samples: float, dimension: float) -> list[str]:
    """What d above N0 means for what the formulas say of sources at these distances, in a sentence; none up to N0.

    A single source is taken whole up to N0 t = 1/2 [paper], which is A_ii = d / (2 N0).

    Args:
        distances: A_ii, shape [K], not negative.
        target_samples: N0, at least 1.
        dimension: d, positive.
    """
    if dimension <= target_samples:
        return []
    measured, reach = check_array("distances", distances), dimension / (2 * target_samples)
    return [
        f"d/N0 = {2 * reach:.3g}: outside of the theory, which is for d well below N0. Any single source of a squared "
        f"distance up to d/(2 N0) = {reach:.3g} would be taken whole, here {int((measured <= reach).sum())} of "
        f"{measured.size}: that one is taken says little of how near it is, and predicted risks are no losses to expect"
    ]


@dataclass(frozen=True)
class Comparison:
    """Which of two models is better on the same held-out samples.

    Attributes:
        decision: "accept" the candidate, "reject" it, or "undecided".
        difference: mean loss of the candidate less that of the baseline; negative speaks for the candidate.
        standard_error: of the difference.
        p_better: the probability of a difference as low as this, were the candidate worse by ``margin`` or more.
        p_worse: the probability of one as high, were it no worse than that.
        samples: how many pairs.
        margin: how much worse still counts as as good.
        level: the error rate of either decision.
        candidate: its name.
        baseline: its name.
    """

    decision: str
    difference: float
    standard_error: float
    p_better: float
    p_worse: float
    samples: int
    margin: float
    level: float
    candidate: str
    baseline: str

    def sentence(self) -> str:
        """What was decided and why."""
        bound = f" by more than {self.margin:g}" if self.margin else ""
        reason = {
            "accept": f"no worse than {self.baseline}{bound}" if self.margin else f"better than {self.baseline}",
            "reject": f"worse than {self.baseline}{bound}",
            "undecided": f"neither better nor worse than {self.baseline}{bound} beyond chance",
        }[self.decision]
        p = {"accept": self.p_better, "reject": self.p_worse}.get(self.decision, min(self.p_better, self.p_worse))
        return (
            f"{self.decision}: {self.candidate} is {reason}: mean loss difference {self.difference:+.3g} "
            f"(standard error {self.standard_error:.2g}) on {self.samples} held-out samples, p = {p:.2g}"
        )


def compare_losses(
    candidate: ArrayLike,
    baseline: ArrayLike,
    *,
    margin: float = 0.0,
    level: float = 0.05,
    draws: int = 10_000,
    seed: int = 0,
    names: tuple[str, str] = ("the candidate", "the baseline"),
) -> Comparison:
    """Accept or reject a model by its losses, against another one's on the same samples: a paired sign-flip test.

    Were the two as good as each other, sample by sample, each difference of losses would be as likely to have the other
    sign. The test statistic is the mean difference; its distribution over all sign patterns is enumerated for up to 16
    differences other than zero, and sampled for more. For losses of 0 and 1 (errors) this is McNemar's exact test. It
    supposes independent samples: with k folds their shared training samples make it approximate.

    Args:
        candidate: losses, smaller being better, shape [N]; errors (0 or 1) are losses too.
        baseline: losses of the other model on the same samples, in the same order.
        margin: the candidate is accepted unless worse by this; 0 asks for better. Not negative.
        level: error rate of either decision, between 0 and 1/2.
        draws: sign patterns sampled where they are too many to enumerate.
        seed: of these.
        names: of candidate and baseline in the sentence.

    Returns:
        See :class:`Comparison`. Very few samples decide nothing: the p-value of 4 differences is at least 1/16.

    Raises:
        ValueError: an argument is out of its range or not finite, or shapes do not fit.
    """
    first, second = check_array("candidate", candidate), check_array("baseline", baseline)
    if first.ndim != 1 or not first.size:
        fail("candidate", "losses of at least one sample, shape [N]", f"shape {list(first.shape)}")
    if second.shape != first.shape:
        fail("baseline", f"shape {list(first.shape)}, as candidate", f"shape {list(second.shape)}")
    if not 0 <= margin < np.inf:
        fail("margin", "a number that is not negative", describe(margin))
    _check_level(level)
    check_positive_int("draws", draws)
    check_positive_int("seed", seed, minimum=0)

    difference = first - second
    p_better, p_worse = _sign_flip(difference - margin, draws, seed)
    decision = "accept" if p_better <= level else "reject" if p_worse <= level else "undecided"
    spread = float(difference.std(ddof=1)) if difference.size > 1 else float("nan")
    return Comparison(
        decision=decision,
        difference=float(difference.mean()),
        standard_error=spread / difference.size**0.5,
        p_better=p_better,
        p_worse=p_worse,
        samples=difference.size,
        margin=float(margin),
        level=float(level),
        candidate=names[0],
        baseline=names[1],
    )


@dataclass(frozen=True)
class Choice:
    """What is to be trained.

    Attributes:
        candidate: what was asked for.
        chosen: that, or what takes its place.
        comparisons: of the candidate with each fallback.
        error_rates: by name, on the held-out samples.
    """

    candidate: str
    chosen: str
    comparisons: tuple[Comparison, ...]
    error_rates: dict[str, float]

    def sentences(self) -> tuple[str, ...]:
        """What was compared, and what follows."""
        rates = ", ".join(f"{name} {rate:.1%}" for name, rate in self.error_rates.items())
        if self.chosen == self.candidate:
            end = f"{self.candidate} is kept, nothing speaking against it beyond chance"
        else:
            end = f"{self.chosen} is trained in the place of {self.candidate}"
        return (*(comparison.sentence() for comparison in self.comparisons), f"{end}: held-out errors {rates}")


def choose(candidate: str, losses: Mapping[str, ArrayLike], *, level: float = 0.05) -> Choice:
    """Keep the candidate unless a fallback is better beyond chance; else take the best of the fallbacks [derived].

    Each fallback is compared by :func:`compare_losses` at ``level`` over their number, so that a candidate as good as
    each of them is given up with probability at most ``level``. The converse is not bounded: with few samples a
    candidate that is worse by little is kept.

    Args:
        candidate: name of what was asked for.
        losses: by name, on the same held-out samples in the same order, shape [N]; the candidate's, and those of the
            fallbacks.
        level: error rate, between 0 and 1/2.

    Returns:
        See :class:`Choice`. A candidate without fallbacks is kept.

    Raises:
        ValueError: as :func:`compare_losses`, or the candidate's losses are missing.
    """
    if candidate not in losses:
        fail("losses", f"an entry for the candidate, {candidate!r}", describe(list(losses)))
    fallbacks = [name for name in losses if name != candidate]
    comparisons = tuple(
        compare_losses(losses[candidate], losses[name], level=level / len(fallbacks), names=(candidate, name))
        for name in fallbacks
    )
    rates = {name: float(check_array("losses", values).mean()) for name, values in losses.items()}
    rejected = any(comparison.decision == "reject" for comparison in comparisons)
    chosen = min(fallbacks, key=lambda name: rates[name]) if rejected else candidate
    return Choice(candidate, chosen, comparisons, rates)


def _sign_flip(differences: FloatArray, draws: int, seed: int) -> tuple[float, float]:
    """How often random signs give a sum as low, and as high, as this one; the observed signs count as one draw."""
    moved = np.abs(differences[differences != 0])
    observed, tolerance = float(differences.sum()), 1e-12 * float(moved.sum())
    if moved.size <= _EXACT_SAMPLES:
        sums = np.zeros(1)
        for size in moved:
            sums = np.concatenate([sums - size, sums + size])
        return float((sums <= observed + tolerance).mean()), float((sums >= observed - tolerance).mean())
    generator = np.random.default_rng(seed)
    signs: NDArray[np.int64] = generator.integers(0, 2, (draws, moved.size), dtype=np.int8)
    sums = 2 * (signs @ moved) - moved.sum()
    low, high = (sums <= observed + tolerance).sum(), (sums >= observed - tolerance).sum()
    return float((low + 1) / (draws + 1)), float((high + 1) / (draws + 1))


def _check_level(level: float) -> None:
    if not 0 < level < 0.5:
        fail("level", "a number between 0 and 1/2", describe(level))

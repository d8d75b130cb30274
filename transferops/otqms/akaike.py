"""Shares of the loss by quasi-Akaike weights: who trains with the target, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from transferops._validate import check_array, fail
from transferops.otqms.theory import FloatArray, nonnegative, positive


class Shares(NamedTuple):
    """Shares of the loss, of sum 1.

    Attributes:
        target: q_0.
        sources: q_i, float64 [K].
        risk: the risk that they are predicted to have, in nats.
    """

    target: float
    sources: FloatArray
    risk: float


def akaike_shares(gram: ArrayLike, target_samples: float, source_samples: ArrayLike, dimension: float) -> Shares:
    """Sources among themselves by how well each explains the target, then the target against their mixture [derived].

    A source's model loses N0 A_ii / 2 nats of log-likelihood on the target's samples against the target's own, to
    second order. Those samples are overdispersed by d, the measured noise of the target's estimate: quasi-likelihood
    divides by it, and the evidence ratio of Akaike weights is exp(-Delta_i/2) with

        Delta_i = N0 (A_ii - min_j A_jj) / d,        s_i proportional to N_i exp(-Delta_i/2),    sum_i s_i = 1,

    the minimum over sources that have samples. Sources that the samples cannot tell apart thus share by their numbers
    of samples; where the minimum of a quadratic form would pick one of them by chance, nothing is picked. Of the
    mixture s, the squared distance from the target freed of the noise of theta_0, and the variance, add up to

        a = max(s^T A s - d/N0, 0) + d sum_i s_i^2/N_i,

    and q_0 = a / (a + d/N0), q_i = (1 - q_0) s_i minimise the risk (d q_0^2/N0 + (1 - q_0)^2 a) / 2.

    Args:
        gram: A = Theta^T J Theta, shape [K, K].
        target_samples: N0, positive.
        source_samples: N_i, shape [K], not negative. A source without samples gets no share.
        dimension: d, not negative. 0, an estimate without noise, gives the limits: the nearest source and all that are
            as near share by their numbers, and the target takes everything unless they are at distance 0.

    Returns:
        The shares and the risk.

    Raises:
        ValueError: an argument is out of its range or not finite, or shapes do not fit.
    """
    available = nonnegative("source_samples", source_samples)
    if available.ndim != 1 or available.size == 0:
        fail("source_samples", "shape [K], K at least 1", f"shape {list(available.shape)}")
    matrix = check_array("gram", gram)
    if matrix.shape != (available.size, available.size):
        fail("gram", f"shape {[available.size] * 2}, one row per source", f"shape {list(matrix.shape)}")
    samples, d = float(positive("target_samples", target_samples)), float(nonnegative("dimension", dimension))
    noise = d / samples
    present = available > 0
    if not present.any():
        return Shares(1.0, np.zeros(available.size), noise / 2)

    excess = matrix.diagonal() - matrix.diagonal()[present].min()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        delta = np.where(excess > 0, excess / noise, 0.0)
        logarithms = np.where(present, np.log(available) - delta / 2, -np.inf)
    mixture = np.exp(logarithms - logarithms.max())
    mixture /= mixture.sum()

    per_dimension = float((mixture[present] ** 2 / available[present]).sum())
    distance = max(float(mixture @ matrix @ mixture) - noise, 0.0)
    a = distance + d * per_dimension
    total = a + noise
    target = a / total if total > 0 else per_dimension / (per_dimension + 1 / samples)
    return Shares(target, (1 - target) * mixture, (1 - target) * a / 2)


def explain_shares(
    gram: ArrayLike, target_samples: float, source_samples: ArrayLike, dimension: float, names: Sequence[str]
) -> list[str]:
    """What :func:`akaike_shares` gives the target and each source and why, a sentence each.

    Args:
        gram: A, shape [K, K].
        target_samples: N0.
        source_samples: N_i, shape [K].
        dimension: d, positive.
        names: Of the sources.

    Raises:
        ValueError: as :func:`akaike_shares`.
    """
    found = akaike_shares(gram, target_samples, source_samples, dimension)
    distances, available = check_array("gram", gram).diagonal(), nonnegative("source_samples", source_samples)
    noise = dimension / target_samples
    sentences = [
        f"target: {found.target:.1%} of the loss, for the noise of its own estimate, d/N0 = {noise:.3g}, against the "
        f"distance and the noise of the sources together, {_together(found, noise):.3g}"
    ]
    nearest = distances[available > 0].min() if (available > 0).any() else 0.0
    for name, distance, samples, share in zip(names, distances, available, found.sources, strict=True):
        lost = target_samples * (distance - nearest) / 2
        if samples == 0:
            reason = "it has no samples"
        elif lost <= 0:
            reason = "no source explains the target's samples better"
        else:
            weight = np.exp(-lost / dimension)
            reason = (
                f"it explains the target's samples worse than the nearest source by {lost:.3g} nats, over d by "
                f"{lost / dimension:.3g}: a sample of it counts {weight:.2g} of one of that source"
            )
        sentences.append(f"source {name}: {share:.1%} of the loss: {reason}")
    return sentences


def _together(found: Shares, noise: float) -> float:
    """a, from q_0 = a / (a + d/N0)."""
    return found.target * noise / (1 - found.target) if found.target < 1 else float("inf")

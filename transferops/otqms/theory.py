"""Expected risk of training on the target's samples together with samples of other tasks.

The target (task 0) has ``target_samples`` (N0) samples, and ``quantities[i]`` (n_i) samples are taken from
source i. The risk is the expected divergence E[D(P_theta0 || P_thetahat)] in nats, thetahat being the
maximum-likelihood estimate on all of them together, pooled or weighted, theta_0 the target's parameters. It is
asymptotic, for models whose parameters differ by O(1/sqrt N0); for Gaussian models with a known covariance it is
exact.

Two quantities describe the tasks. ``dimension`` (d) is the number of trained parameters. ``gram`` (A) is
the matrix of inner products Theta^T J Theta of the parameter differences theta_i - theta_0 under the Fisher
information J of the target model; for a single source it enters as its ``discrepancy`` t = A / d.

Source: "A High-Dimensional Statistical Method for Optimizing Transfer Quantities in Multi-Source Transfer
Learning", NeurIPS 2025, arXiv 2502.04242: the formulas for pooled samples [paper]. Those for weighted samples are
[derived]; the idea is in "UOWQ", arXiv 2601.10779, in words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferops._validate import check_array, fail

FloatArray = NDArray[np.float64]


def target_only_risk(target_samples: ArrayLike, dimension: ArrayLike) -> FloatArray:
    """Risk of training on the target alone, d / (2 N0) [paper].

    Args:
        target_samples: N0, positive, any shape.
        dimension: d, positive; broadcast with ``target_samples``.

    Returns:
        Expected divergence in nats, float64, of the broadcast shape.

    Raises:
        ValueError: an argument is not positive and finite.
    """
    target_samples, dimension = positive("target_samples", target_samples), positive("dimension", dimension)
    return np.asarray(dimension / (2 * target_samples))


def single_source_risk(
    quantity: ArrayLike, discrepancy: ArrayLike, target_samples: ArrayLike, dimension: ArrayLike
) -> FloatArray:
    """Risk with n samples of one source, (d/2) (1/(N0+n) + n^2 t/(N0+n)^2) [paper].

    All arguments broadcast against each other, so a grid over any of them is one call.

    Args:
        quantity: n, samples taken from the source, not negative; fractions are allowed.
        discrepancy: t = delta^T J delta / d, not negative, where delta = theta_1 - theta_0.
        target_samples: N0, positive.
        dimension: d, positive.

    Returns:
        Expected divergence in nats, float64, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range or not finite.
    """
    quantity, discrepancy = nonnegative("quantity", quantity), nonnegative("discrepancy", discrepancy)
    target_samples, dimension = positive("target_samples", target_samples), positive("dimension", dimension)
    pooled = target_samples + quantity
    share = quantity / pooled
    return np.asarray(dimension / 2 * (1 / pooled + share**2 * discrepancy))


def risk(quantities: ArrayLike, gram: ArrayLike, target_samples: ArrayLike, dimension: ArrayLike) -> FloatArray:
    """Risk with n_i samples of each of K sources [paper, Theorem 7].

    With s = sum_i n_i and alpha_i = n_i / s the paper writes (d/2) (1/(N0+s) + s^2 t/(N0+s)^2),
    t = alpha^T A alpha / d; here the same as 1/2 (d/(N0+s) + w^T A w) with w_i = n_i/(N0+s), defined at s =
    0 too.

    Args:
        quantities: n, shape [..., K], not negative; fractions are allowed.
        gram: A = Theta^T J Theta, shape [K, K] (or [..., K, K] to broadcast), summed over parameters and
            averaged over samples, as :meth:`transferops.fisher.FisherInformation.gram` returns it.
        target_samples: N0, positive; broadcasts with the leading shape of ``quantities``.
        dimension: d, positive; broadcasts likewise.

    Returns:
        Expected divergence in nats, float64, of the broadcast leading shape.

    Raises:
        ValueError: an argument is out of its range or not finite, or ``gram`` does not fit ``quantities``.
    """
    quantities, gram = nonnegative("quantities", quantities), check_array("gram", gram)
    target_samples, dimension = positive("target_samples", target_samples), positive("dimension", dimension)
    if quantities.ndim == 0:
        fail("quantities", "an array of shape [..., K]", "a single number")
    sources = quantities.shape[-1]
    if gram.shape[-2:] != (sources, sources):
        fail("gram", f"shape [{sources}, {sources}], one row per source", f"shape {list(gram.shape)}")
    pooled = target_samples + quantities.sum(-1)
    share = quantities / pooled[..., None]
    bias = (np.matmul(gram, share[..., None])[..., 0] * share).sum(-1)
    return np.asarray((dimension / pooled + bias) / 2)


def optimal_quantity(
    discrepancy: ArrayLike, target_samples: ArrayLike, source_samples: ArrayLike = np.inf
) -> FloatArray:
    """The number of samples of one source that minimises :func:`single_source_risk` [paper].

    If N0 t <= 1/2 every sample lowers the risk and all N1 are taken; otherwise n* = N0 / (2 N0 t - 1), at
    most N1. The dimension cancels once the discrepancy is given.

    Args:
        discrepancy: t = delta^T J delta / d, not negative.
        target_samples: N0, positive.
        source_samples: N1, samples the source has, not negative; infinite for no cap.

    Returns:
        n*, float64, not rounded, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range.
    """
    discrepancy = nonnegative("discrepancy", discrepancy)
    target_samples = positive("target_samples", target_samples)
    source_samples = nonnegative("source_samples", source_samples, finite=False)
    excess = 2 * target_samples * discrepancy - 1
    with np.errstate(divide="ignore", over="ignore"):
        interior = np.where(excess > 0, target_samples / np.maximum(excess, 0), np.inf)
    return np.asarray(np.minimum(interior, source_samples))


def weighted_risk(
    masses: ArrayLike, gram: ArrayLike, target_samples: ArrayLike, quantities: ArrayLike, dimension: ArrayLike
) -> FloatArray:
    """Risk with masses q_i on n_i samples of each of K sources, 1/2 (d sum_i q_i^2/n_i + q^T A q) [derived].

    The estimate maximises sum_i q_i/n_i sum_j log p(x_ij), so a sample of source i has weight q_i/n_i; the target has
    the mass q_0 = 1 - sum_i q_i on its N0 samples, and the sum runs over it, too. Masses proportional to the number
    of samples make it :func:`risk`. Under a budget the n_i are the samples paid for.

    Args:
        masses: q, shape [..., K], not negative, of sum at most 1 (to rounding).
        gram: A, as in :func:`risk`.
        target_samples: N0, positive; broadcasts with the leading shape of ``masses``.
        quantities: n, shape [..., K], not negative, broadcasts with ``masses``; where it is 0, the mass must be.
        dimension: d, positive; broadcasts like ``target_samples``.

    Returns:
        Expected divergence in nats, float64, of the broadcast leading shape.

    Raises:
        ValueError: an argument is out of its range or not finite, or shapes do not fit.
    """
    masses, quantities = nonnegative("masses", masses), nonnegative("quantities", quantities)
    gram = check_array("gram", gram)
    target_samples, dimension = positive("target_samples", target_samples), positive("dimension", dimension)
    if masses.ndim == 0 or quantities.ndim == 0 or masses.shape[-1] != quantities.shape[-1]:
        got = f"shapes {list(masses.shape)} and {list(quantities.shape)}"
        fail("masses", "an array of shape [..., K], one mass for each of quantities", got)
    sources = masses.shape[-1]
    if gram.shape[-2:] != (sources, sources):
        fail("gram", f"shape [{sources}, {sources}], one row per source", f"shape {list(gram.shape)}")
    total = masses.sum(-1)
    if total.size and total.max() > 1 + 1e-9:
        fail("masses", "a sum of at most 1", f"{total.max():g}")
    if np.any((masses > 0) & (quantities == 0)):
        fail("masses", "no mass on a source of which there are no samples", "some")
    variance = (masses**2 / np.where(quantities > 0, quantities, 1.0)).sum(-1)
    variance = variance + np.maximum(1 - total, 0) ** 2 / target_samples
    bias = (np.matmul(gram, masses[..., None])[..., 0] * masses).sum(-1)
    return np.asarray((dimension * variance + bias) / 2)


def optimal_weight(quantity: ArrayLike, discrepancy: ArrayLike) -> FloatArray:
    """The weight of a sample of one source, relative to one of the target: 1/(1 + n t) [derived].

    It minimises :func:`weighted_risk`, whatever N0 is.

    Args:
        quantity: n, samples of the source, not negative.
        discrepancy: t = delta^T J delta / d, not negative.

    Returns:
        Relative weights between 0 and 1, float64, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range or not finite.
    """
    return np.asarray(1 / (1 + nonnegative("quantity", quantity) * nonnegative("discrepancy", discrepancy)))


def single_source_weighted_risk(
    quantity: ArrayLike, discrepancy: ArrayLike, target_samples: ArrayLike, dimension: ArrayLike
) -> FloatArray:
    """Risk with n samples of one source at their :func:`optimal_weight`, (d/2)/(N0 + n/(1 + n t)) [derived].

    It falls with n: under a budget, all that can be paid for is taken.

    Args:
        quantity: n, not negative.
        discrepancy: t, not negative.
        target_samples: N0, positive.
        dimension: d, positive.

    Returns:
        Expected divergence in nats, float64, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range or not finite.
    """
    quantity = nonnegative("quantity", quantity)
    effective = positive("target_samples", target_samples) + quantity * optimal_weight(quantity, discrepancy)
    return np.asarray(positive("dimension", dimension) / (2 * effective))


def effective_samples(risk: ArrayLike, dimension: ArrayLike) -> FloatArray:
    """How many target samples alone would give this risk, d / (2 risk) [derived]: the inverse of target_only_risk.

    Args:
        risk: in nats, positive.
        dimension: d, positive.

    Returns:
        Numbers of samples, float64, of the broadcast shape.

    Raises:
        ValueError: an argument is not positive and finite.
    """
    return target_only_risk(positive("risk", risk), dimension)


def nonnegative(argument: str, value: ArrayLike, *, finite: bool = True) -> FloatArray:
    """``value`` as a float64 array if nothing in it is negative."""
    array = check_array(argument, value, finite=finite)
    if array.size and array.min() < 0:
        fail(argument, "no negative values", f"a smallest value of {array.min():g}")
    return array


def positive(argument: str, value: ArrayLike) -> FloatArray:
    """``value`` as a float64 array if all of it is positive."""
    array = check_array(argument, value)
    if array.size and array.min() <= 0:
        fail(argument, "positive values", f"a smallest value of {array.min():g}")
    return array

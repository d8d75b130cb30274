"""Expected risk of training on the target's samples pooled with samples of other tasks.

The target (task 0) has ``target_samples`` (N0) samples, and ``quantities[i]`` (n_i) samples are taken from
source i. The risk is the expected divergence E[D(P_theta0 || P_thetahat)] in nats, thetahat being the
maximum-likelihood estimate on all of them together, theta_0 the target's parameters. It is asymptotic, for
models whose parameters differ by O(1/sqrt N0); for Gaussian models with a known covariance it is exact.

Two quantities describe the tasks. ``dimension`` (d) is the number of trained parameters. ``gram`` (A) is
the matrix of inner products Theta^T J Theta of the parameter differences theta_i - theta_0 under the Fisher
information J of the target model; for a single source it enters as its ``discrepancy`` t = A / d.

Source: "A High-Dimensional Statistical Method for Optimizing Transfer Quantities in Multi-Source Transfer
Learning", NeurIPS 2025, arXiv 2502.04242. Every formula in this file is [paper].
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
    target_samples, dimension = _positive("target_samples", target_samples), _positive("dimension", dimension)
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
    quantity, discrepancy = _nonnegative("quantity", quantity), _nonnegative("discrepancy", discrepancy)
    target_samples, dimension = _positive("target_samples", target_samples), _positive("dimension", dimension)
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
    quantities, gram = _nonnegative("quantities", quantities), check_array("gram", gram)
    target_samples, dimension = _positive("target_samples", target_samples), _positive("dimension", dimension)
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
    discrepancy = _nonnegative("discrepancy", discrepancy)
    target_samples = _positive("target_samples", target_samples)
    source_samples = _nonnegative("source_samples", source_samples, finite=False)
    excess = 2 * target_samples * discrepancy - 1
    with np.errstate(divide="ignore", over="ignore"):
        interior = np.where(excess > 0, target_samples / np.maximum(excess, 0), np.inf)
    return np.asarray(np.minimum(interior, source_samples))


def _nonnegative(argument: str, value: ArrayLike, *, finite: bool = True) -> FloatArray:
    array = check_array(argument, value, finite=finite)
    if array.size and array.min() < 0:
        fail(argument, "no negative values", f"a smallest value of {array.min():g}")
    return array


def _positive(argument: str, value: ArrayLike) -> FloatArray:
    array = check_array(argument, value)
    if array.size and array.min() <= 0:
        fail(argument, "positive values", f"a smallest value of {array.min():g}")
    return array

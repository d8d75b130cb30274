"""Positive semidefinite matrices as the allocation meets them: checked, factored, freed of noise or shrunk for it."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from transferops._validate import check_array, fail
from transferops.otqms.theory import FloatArray, nonnegative

MANY = 500
"""Sources from which on the cubic costs are felt, and a cheaper first attempt is made where there is one."""
_POWER_STEPS = 20


def storage_epsilon(gram: Any) -> float:
    """The rounding error ``gram`` was stored with; half precision is refused."""
    name = str(getattr(gram, "dtype", "float64")).removeprefix("torch.")
    if name in ("float16", "bfloat16"):
        fail("gram", "float32 or float64, half precision being too coarse to allocate by", name)
    return float(np.finfo(np.float32).eps) if name == "float32" else float(np.finfo(np.float64).eps)


def factor(matrix: FloatArray, tolerance: float) -> FloatArray:
    """R, [K, K], of a positive semidefinite matrix R^T R that is ``matrix`` within rounding.

    Symmetry and semidefiniteness are judged on the matrix scaled to unit diagonal, so that a source far from the
    target does not hide the errors of one close to it; float64 rounding of the matrix as a whole is let through as
    well. On that scale eigenvalues that float64 cannot tell from zero, and negative ones within ``tolerance``, are
    raised to the least it can, K rounding errors of the largest: that sources cancel each other's bias is believed to
    as many digits as there are.

    Raises:
        ValueError: ``matrix`` is not symmetric or not positive semidefinite by more than ``tolerance``.
    """
    epsilon = np.finfo(np.float64).eps
    rounding = float(epsilon * np.abs(matrix).max())
    scale = np.sqrt(np.maximum(np.diagonal(matrix), rounding))
    scale[scale == 0] = 1.0
    unit = matrix / scale[:, None] / scale
    difference = np.abs(unit - unit.T)
    if difference.max() > tolerance:
        i, j = sorted(int(i) for i in np.unravel_index(difference.argmax(), difference.shape))
        got = f"{matrix[i, j]:g} at [{i}, {j}] and {matrix[j, i]:g} at [{j}, {i}]"
        fail("gram", "a symmetric matrix", got)
    unit = (unit + unit.T) / 2
    try:
        return np.asarray(np.linalg.cholesky(unit).T * scale)
    except np.linalg.LinAlgError:
        if len(matrix) >= MANY:
            # Raising all eigenvalues alike comes to the same within rounding, and takes a tenth of the time.
            raised = unit + len(matrix) * epsilon * _largest_eigenvalue(unit) * np.eye(len(matrix))
            with contextlib.suppress(np.linalg.LinAlgError):
                return np.asarray(np.linalg.cholesky(raised).T * scale)
        eigenvalues, vectors = np.linalg.eigh(unit)
    if eigenvalues[0] < -tolerance:
        smallest = np.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
        if smallest < -8 * len(matrix) * rounding:
            got = f"a smallest eigenvalue of {smallest:.3g} ({eigenvalues[0]:.3g} at unit diagonal)"
            fail("gram", "a positive semidefinite matrix", got)
    floor = len(matrix) * epsilon * max(float(eigenvalues[-1]), 0.0)
    return np.asarray((vectors * np.sqrt(np.maximum(eigenvalues, floor))).T * scale)


def _largest_eigenvalue(matrix: FloatArray) -> float:
    """Of a positive semidefinite matrix, to a few per cent, from below."""
    vector = np.random.default_rng(0).standard_normal(len(matrix))
    for _ in range(_POWER_STEPS):
        vector = matrix @ vector
        size = float(np.linalg.norm(vector))
        vector /= size or 1.0
    return size


def project(matrix: FloatArray) -> FloatArray:
    """The positive semidefinite matrix nearest a symmetric one in the Frobenius norm."""
    eigenvalues, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root = vectors * np.sqrt(np.maximum(eigenvalues, 0))
    return np.asarray(root @ root.T)


def debias(gram: ArrayLike, target_noise: float, source_noise: ArrayLike) -> FloatArray:
    """An estimated Gram matrix freed of the noise of the estimates, and projected [derived].

    With theta_i + e_i in place of theta_i, e_i independent of each other, of mean 0 and E[e_i^T J e_i] = v_i, the
    differences share the target's error: E[A_hat] = A + v_0 1 1^T + diag(v_1 .. v_K). For maximum-likelihood
    estimates on N_i samples of models that have the target's Fisher information, v_i = d / N_i: the default of
    :func:`transferops.otqms.allocate`. :func:`transferops.otqms.dimension.split_halves` measures v_i instead.

    The projection keeps a matrix that noise made indefinite usable; it moves the estimate up, so the result is not
    unbiased.

    Args:
        gram: A_hat, [K, K], symmetric.
        target_noise: v_0, not negative.
        source_noise: v_i, [K], not negative.

    Returns:
        The positive semidefinite matrix nearest A_hat - v_0 1 1^T - diag(v), float64 [K, K].

    Raises:
        ValueError: a shape does not fit or a number is negative or not finite.
    """
    matrix = check_array("gram", gram)
    noise, common = check_array("source_noise", source_noise), check_array("target_noise", target_noise)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        fail("gram", "a square matrix", f"shape {list(matrix.shape)}")
    if noise.shape != matrix.shape[:1]:
        fail("source_noise", f"shape {list(matrix.shape[:1])}", f"shape {list(noise.shape)}")
    for argument, value in (("target_noise", common), ("source_noise", noise)):
        if value.size and value.min() < 0:
            fail(argument, "no negative values", f"{value.min():g}")
    if common.ndim:
        fail("target_noise", "a number", f"shape {list(common.shape)}")
    return project(matrix - common - np.diag(noise))


def pull(gram: ArrayLike, source_samples: ArrayLike, variance: float) -> float:
    """kappa = min(1, r v / |P (theta_0 - theta_bar)|_J^2): how far :func:`shrink` moves theta_0 between the sources.

    Arguments and errors as there.
    """
    matrix, mixture, noise = _mixture(gram, source_samples, variance)
    taken = mixture > 0
    image = matrix @ mixture
    apart = image - mixture @ image  # (theta_i - theta_bar) (theta_bar - theta_0)
    between = (matrix - apart[:, None] - image)[np.ix_(taken, taken)]  # of theta_i - theta_bar
    values, vectors = np.linalg.eigh((between + between.T) / 2)
    kept = values > 8 * len(values) * np.finfo(np.float64).eps * np.abs(matrix).max()  # s itself is in the null space
    distance = float(np.square(vectors[:, kept].T @ apart[taken]) @ (1 / values[kept]))
    noise *= np.count_nonzero(kept)
    return 1.0 if distance <= noise else noise / distance


def shrink(gram: ArrayLike, source_samples: ArrayLike, variance: float) -> FloatArray:
    """An estimated Gram matrix that compares the sources no better than the noise of theta_0 allows [derived].

    The program finds the mixture of sources nearest to the estimated theta_0, and where that is all noise, it fits the
    noise. The estimate is therefore shrunk as James and Stein (1961) do, towards the mean of the sources by their
    numbers of samples, theta_bar = sum_i s_i theta_i. What theta_0 is off at right angles to all that tells sources
    apart changes no comparison of them; so it is shrunk within the span of theta_i - theta_bar, of r <= K - 1
    dimensions, onto which P projects:

        theta* = theta_0 + kappa P (theta_bar - theta_0),    kappa = min(1, r v / |P (theta_0 - theta_bar)|_J^2),

    with v the variance of theta_0 in each dimension. It is the posterior mean under a normal prior about theta_bar of
    the width that the distance suggests, with the posterior variance (1 - kappa) r v. So E[A | theta_0] is the Gram
    matrix of the differences from theta*, plus (1 - kappa) r v 1 1^T; and a plug-in matrix, which this is to take the
    place of, has r v 1 1^T more. With b = A s - (s^T A s) 1 all that adds up to

        A - kappa (b 1^T + 1 b^T).

    The distance of theta_bar itself, s^T A s, is the same as before, and with it what is said of the target against
    the sources; only what tells them apart is shrunk, at kappa = 1 to where every source is taken alike.

    Args:
        gram: A_hat, [K, K], symmetric.
        source_samples: N_i, [K], not negative, not all 0.
        variance: v, not negative: 1/N_0 in the metric of the Fisher information of one sample.

    Returns:
        float64 [K, K], positive semidefinite where ``gram`` is.

    Raises:
        ValueError: a shape does not fit or a number is negative or not finite.
    """
    matrix, mixture, _ = _mixture(gram, source_samples, variance)
    image = matrix @ mixture
    beyond = pull(matrix, source_samples, variance) * (image - mixture @ image)
    return np.asarray(matrix - beyond[:, None] - beyond)


def _mixture(gram: ArrayLike, source_samples: ArrayLike, variance: float) -> tuple[FloatArray, FloatArray, float]:
    """The matrix, the sources' shares of all their samples, and the variance."""
    matrix, available = check_array("gram", gram), nonnegative("source_samples", source_samples)
    noise = nonnegative("variance", variance)
    if available.ndim != 1 or not available.any():
        fail("source_samples", "shape [K], not all 0", f"shape {list(available.shape)}, sum {available.sum():g}")
    if matrix.shape != (available.size, available.size):
        fail("gram", f"shape {[available.size] * 2}, one row per source", f"shape {list(matrix.shape)}")
    if noise.ndim:
        fail("variance", "a number", f"shape {list(noise.shape)}")
    return matrix, available / available.sum(), float(noise)

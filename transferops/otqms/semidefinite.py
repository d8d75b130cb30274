"""Positive semidefinite matrices as the allocation meets them: checked, factored, freed of estimation noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from transferops._validate import check_array, fail
from transferops.otqms.theory import FloatArray


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
        eigenvalues, vectors = np.linalg.eigh(unit)
    if eigenvalues[0] < -tolerance:
        smallest = np.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
        if smallest < -8 * len(matrix) * rounding:
            got = f"a smallest eigenvalue of {smallest:.3g} ({eigenvalues[0]:.3g} at unit diagonal)"
            fail("gram", "a positive semidefinite matrix", got)
    floor = len(matrix) * epsilon * max(float(eigenvalues[-1]), 0.0)
    return np.asarray((vectors * np.sqrt(np.maximum(eigenvalues, floor))).T * scale)


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

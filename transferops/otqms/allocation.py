"""How many samples to take from each source: one convex problem, solved with a certificate.

The paper (NeurIPS 2025, arXiv 2502.04242, Theorem 7) gives the expected risk of n_i samples from source i and
minimises it by a grid over s = sum n_i with a quadratic program at each point. In the pooled shares
w_i = n_i / (N0 + s) the whole problem is a single convex quadratic program [derived]:

    min_w  w^T A w - (d/N0) 1^T w    subject to    0 <= w_i <= (N_i/N0) (1 - 1^T w),

and n_i = N0 w_i / (1 - 1^T w). Its optimum is global, between the grid's points too, and its
Karush-Kuhn-Tucker (KKT) conditions certify it: the risk and its certificate are computed from the
quantities alone, whatever the solver said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferops._validate import check_array, describe, fail
from transferops.otqms.quadratic_program import relative_residual, solve
from transferops.otqms.theory import FloatArray, risk, target_only_risk

_MODES = ("quantity",)
_ACCEPTED_RESIDUAL = 1e-6


@dataclass(frozen=True, eq=False)
class Allocation:
    """Samples to take from each of K sources, and how good that is.

    Attributes:
        quantities: n, float64 [K], 0 <= n_i <= N_i: the continuous optimum.
        weights: w_i = n_i / (N0 + sum n), float64 [K]: the share of source i in the pooled sample.
        risk: expected risk at ``quantities``, in nats (:func:`transferops.otqms.theory.risk`).
        target_only_risk: d / (2 N0), the risk of taking nothing.
        kkt_residual: dimensionless, see :func:`kkt_residual`; at most 1e-6.
        source_samples: N_i, float64 [K].
    """

    quantities: FloatArray
    weights: FloatArray
    risk: float
    target_only_risk: float
    kkt_residual: float
    source_samples: FloatArray

    @property
    def total(self) -> float:
        """sum n, the number of samples taken from all sources before rounding."""
        return float(self.quantities.sum())

    def rounded(self) -> NDArray[np.int64]:
        """Whole samples, int64 [K]: a separate step after the optimum, by largest remainder.

        The total is rounded to the nearest integer (halves up) and every quantity down; the samples left go
        one each to the sources with the largest fractional parts, the first source first in a tie. So every
        entry is within one of its quantity and 0 <= n_i <= floor(N_i); if fractional N_i keep the total
        from being reached, it is lower. The optimum being flat, the loss in risk is of second order.
        """
        slack = 1e-9 * np.maximum(self.quantities, 1)  # 2.9999999999 is 3, not 2 and a remainder
        whole = np.minimum(np.floor(self.quantities + slack), np.floor(self.source_samples))
        remainder = self.quantities - whole
        missing = int(np.floor(self.total + 0.5) - whole.sum())
        order = np.argsort(-remainder, kind="stable")
        order = order[(remainder[order] > slack[order]) & (whole[order] + 1 <= self.source_samples[order])]
        whole[order[: max(missing, 0)]] += 1
        return whole.astype(np.int64)


def allocate(
    gram: ArrayLike,
    target_samples: float,
    source_samples: ArrayLike,
    dimension: float,
    mode: str = "quantity",
) -> Allocation:
    """The quantities that minimise the expected risk of the pooled training set.

    The risk is the paper's (Theorem 7) [paper]; that one convex quadratic program gives its global minimum is
    [derived]. A source that would raise the risk given the others gets 0. Where ``gram`` is singular
    (identical sources) the risk is unique but its minimiser may not be: the split between such sources is
    then one of the optimal ones, near the middle of their set, and not specified further.

    Args:
        gram: A = Theta^T J Theta, shape [K, K], symmetric and positive semidefinite, a tensor or array of
            float32 or float64 (or integers); see :meth:`transferops.fisher.FisherInformation.gram`. Both
            properties are judged on the matrix scaled to unit diagonal, to 1e-8 (float32: K rounding errors
            if that is more); within that tolerance the matrix is symmetrised and negative eigenvalues are
            set to zero.
        target_samples: N0, at least 1.
        source_samples: N_i, shape [K], not negative.
        dimension: d, the number of trained parameters; positive. It may be fractional (an effective
            dimension).
        mode: "quantity": how many samples of each source, all with equal weight.

    Returns:
        The optimum, see :class:`Allocation`.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        TypeError: an argument is not numeric.
        ImportError: the solver is not installed.
        RuntimeError: no allocation with a KKT residual of at most 1e-6 was found.

    Example:
        >>> round(allocate([[0.2]], target_samples=10, source_samples=[100], dimension=2).total, 6)
        10.0
    """
    if mode not in _MODES:
        fail("mode", " or ".join(repr(m) for m in _MODES), describe(mode))
    matrix, available, target_samples, dimension = _check_problem(gram, target_samples, source_samples, dimension)

    # Dimensionless: risk = d/(2 N0) (u + w^T B w), u = 1 - 1^T w, B = (N0/d) A, w_i <= c_i u, c_i = N_i/N0.
    scaled_gram, capacity = matrix * (target_samples / dimension), available / target_samples
    quantities = np.zeros_like(available)
    usable = np.flatnonzero(available > 0)
    if usable.size:
        ratios = solve(scaled_gram[np.ix_(usable, usable)], capacity[usable])
        wanted = np.where(ratios == capacity[usable], np.inf, target_samples * ratios)
        quantities[usable] = np.minimum(wanted, available[usable])

    residual = relative_residual(scaled_gram, capacity, quantities / target_samples)
    if not residual <= _ACCEPTED_RESIDUAL:
        raise RuntimeError(
            f"allocate: expected a KKT residual of at most {_ACCEPTED_RESIDUAL:g}, got {residual:.3g}: "
            "sources that cancel each other almost exactly leave float64 too few digits of gram"
        )
    return Allocation(
        quantities=quantities,
        weights=quantities / (target_samples + quantities.sum()),
        risk=float(risk(quantities, matrix, target_samples, dimension)),
        target_only_risk=float(target_only_risk(target_samples, dimension)),
        kkt_residual=residual,
        source_samples=available.copy(),
    )


def kkt_residual(
    quantities: ArrayLike,
    gram: ArrayLike,
    target_samples: float,
    source_samples: ArrayLike,
    dimension: float,
) -> float:
    """How far any given quantities are from optimal, as a dimensionless KKT residual [derived].

    Let w_i = n_i/(N0+s), B = (N0/d) A, c_i = N_i/N0, u = 1 - 1^T w: the program is min w^T B w - 1^T w
    subject to w >= 0 (multipliers lambda) and w_i - c_i u <= 0 (multipliers mu). The multipliers are formed
    here from w alone: with nu the unique root of nu + sum_i c_i max(nu - 2 (B w)_i, 0) = 1, they are
    mu = max(nu - 2 B w, 0) and lambda = max(2 B w - nu, 0), dual feasible and stationary but for rounding.
    The residual is the largest of

    - stationarity: |2 (B w)_i - 1 + c^T mu - lambda_i + mu_i| over 1 + 2 (|B| w)_i, the size of its terms;
    - primal infeasibility: max(-w_i, w_i - c_i u), w being shares of one;
    - dual infeasibility: max(-lambda_i, -mu_i);
    - complementarity: (lambda^T |w| + mu^T |c u - w|) over u + w^T B w. Where the others vanish this is the
      duality gap: it bounds the excess of the risk over its minimum, relative to the risk.

    Args:
        quantities: n, shape [K].
        gram: as in :func:`allocate`.
        target_samples: as in :func:`allocate`.
        source_samples: as in :func:`allocate`.
        dimension: as in :func:`allocate`.

    Returns:
        The residual, 0 at an exact optimum.

    Raises:
        ValueError: as :func:`allocate`, or ``quantities`` does not have shape [K].
    """
    matrix, available, target_samples, dimension = _check_problem(gram, target_samples, source_samples, dimension)
    quantities = check_array("quantities", quantities)
    if quantities.shape != available.shape:
        fail("quantities", f"shape {list(available.shape)}", f"shape {list(quantities.shape)}")
    return relative_residual(
        matrix * (target_samples / dimension), available / target_samples, quantities / target_samples
    )


def _check_problem(
    gram: ArrayLike, target_samples: float, source_samples: ArrayLike, dimension: float
) -> tuple[FloatArray, FloatArray, float, float]:
    target = check_array("target_samples", target_samples)
    if target.ndim or target < 1:
        fail("target_samples", "a number of at least 1", describe(target_samples))
    dim = check_array("dimension", dimension)
    if dim.ndim or dim <= 0:
        fail("dimension", "a positive number", describe(dimension))
    available = check_array("source_samples", source_samples)
    if available.ndim != 1 or available.size == 0:
        fail("source_samples", "one number for each source, shape [K]", f"shape {list(available.shape)}")
    if available.min() < 0:
        i = int(available.argmin())
        fail("source_samples", "no negative numbers", f"{available[i]:g} for source {i}")
    matrix = check_array("gram", gram)
    if matrix.shape != (available.size, available.size):
        expected = f"shape [{available.size}, {available.size}], one row for each of source_samples"
        fail("gram", expected, f"shape {list(matrix.shape)}")
    epsilon = max(1e-8, available.size * _storage_epsilon(gram))
    return _positive_semidefinite(matrix, epsilon), available, float(target), float(dim)


def _storage_epsilon(gram: Any) -> float:
    """The rounding error ``gram`` was stored with."""
    name = str(getattr(gram, "dtype", "float64")).removeprefix("torch.")
    if name in ("float16", "bfloat16"):
        fail("gram", "float32 or float64, half precision being too coarse to allocate by", name)
    return float(np.finfo(np.float32).eps) if name == "float32" else float(np.finfo(np.float64).eps)


def _positive_semidefinite(matrix: FloatArray, tolerance: float) -> FloatArray:
    """``matrix``, symmetrised and with negative eigenvalues within ``tolerance`` set to zero.

    Judged on the matrix scaled to unit diagonal, so that a source far from the target does not hide the
    errors of one close to it; float64 rounding of the matrix as a whole is let through as well.
    """
    rounding = float(np.finfo(np.float64).eps * np.abs(matrix).max())
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
        # Rounding makes a singular matrix slightly indefinite: harmless, and seen cheaply this way.
        np.linalg.cholesky(unit + len(unit) * np.finfo(np.float64).eps * np.eye(len(unit)))
    except np.linalg.LinAlgError:
        pass
    else:
        return np.asarray((matrix + matrix.T) / 2)
    eigenvalues, vectors = np.linalg.eigh(unit)
    if eigenvalues[0] < -tolerance:
        smallest = np.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
        if smallest < -8 * len(matrix) * rounding:
            got = f"a smallest eigenvalue of {smallest:.3g} ({eigenvalues[0]:.3g} at unit diagonal)"
            fail("gram", "a positive semidefinite matrix", got)
    root = vectors * np.sqrt(np.maximum(eigenvalues, 0)) * scale[:, None]
    return np.asarray(root @ root.T)

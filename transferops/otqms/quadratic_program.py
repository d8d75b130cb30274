"""The solver behind ``allocate``: a convex quadratic program and its certificate.

Everything here is dimensionless. With B = (N0/d) A and c_i = N_i/N0, over the shares w and u = 1 - 1^T w,

    min u + w^T B w    subject to    0 <= w_i <= c_i u,

and the ratios n_i/N0 = w_i/u are what is returned.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transferops.otqms.theory import FloatArray

_SUFFICIENT_RESIDUAL = 1e-9
_ROUNDS = 8  # of the solver; the first nearly always suffices
_POLISH_STEPS = 2


def relative_residual(gram: FloatArray, capacity: FloatArray, ratios: FloatArray) -> float:
    """:func:`~transferops.otqms.allocation.kkt_residual` of ratios n_i/N0."""
    unused = 1 / (1 + ratios.sum())
    shares = ratios * unused
    gradient = 2 * gram @ shares
    lower, upper = _multipliers(gradient, capacity)[1:]
    room = (capacity - ratios) * unused
    stationarity = np.abs(gradient - 1 + capacity @ upper - lower + upper) / (1 + 2 * np.abs(gram) @ shares)
    complementarity = (lower @ np.abs(shares) + upper @ np.abs(room)) / (unused + shares @ gradient / 2)
    infeasibility = np.maximum(np.maximum(-shares, -room), np.maximum(-lower, -upper))
    return float(max(stationarity.max(), infeasibility.max(), complementarity, 0.0))


def _multipliers(gradient: FloatArray, capacity: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """nu, lambda and mu from 2 B w, see :func:`~transferops.otqms.allocation.kkt_residual`."""
    order = np.argsort(gradient)
    ordered, weight = gradient[order], capacity[order]
    levels = (1 + np.append(0, np.cumsum(weight * ordered))) / (1 + np.append(0, np.cumsum(weight)))
    level = float(levels[np.count_nonzero(levels[:-1] > ordered)])
    return level, np.maximum(gradient - level, 0), np.maximum(level - gradient, 0)


class _Scaled(NamedTuple):
    """Over x = (w, u) / unit: min x^T H x/2 + unit_K x_K s.t. unit^T x = 1, 0 <= x_i <= limit_i x_K."""

    hessian: FloatArray  # [K+1, K+1], 2 B in units, last row and column 0
    unit: FloatArray  # [K+1]
    limit: FloatArray  # [K], at least 1
    size: float  # of the objective


def solve(gram: FloatArray, capacity: FloatArray) -> FloatArray:
    """The ratios n_i/N0 that minimise u + w^T B w; every capacity positive.

    Over (w, u) the constraints are homogeneous but for the total: 0 <= w_i <= c_i u, sum w + u = 1.
    Carrying u keeps n_i = N0 w_i/u accurate where u is small. The solver wants variables and objective of
    about one, which they are in terms of the solution; so a solution of poor residual gives the units for
    another round.
    """
    ratios = np.minimum(capacity, 0.5 / np.maximum(np.diagonal(gram), np.finfo(np.float64).tiny))
    size, shares = 1 / (1 + ratios.sum()), np.zeros_like(capacity)
    best, best_residual = ratios, np.inf
    for _ in range(_ROUNDS):
        problem = _scale(gram, capacity, ratios, shares, size)
        candidates = _polish(gram, capacity, problem, _interior_point(problem))
        for candidate in candidates:
            residual = relative_residual(gram, capacity, candidate)
            if residual < best_residual:
                best, best_residual = candidate, residual
        if best_residual <= _SUFFICIENT_RESIDUAL:
            break
        ratios = min(candidates, key=lambda r: _relative_risk(gram, r))
        shares, size = ratios / (1 + ratios.sum()), _relative_risk(gram, ratios)
    return best


def _relative_risk(gram: FloatArray, ratios: FloatArray) -> float:
    """u + w^T B w, the risk over that of the target alone."""
    unused = 1 / (1 + ratios.sum())
    return float(unused + max(ratios @ gram @ ratios * unused**2, 0.0))


def _scale(gram: FloatArray, capacity: FloatArray, ratios: FloatArray, shares: FloatArray, size: float) -> _Scaled:
    """The program in units of a guess: its shares, or what a source gets at their multiplier on its own."""
    unused = 1 / (1 + ratios.sum())
    alone = size / np.maximum(2 * np.diagonal(gram), np.finfo(np.float64).tiny * size)
    unit = np.append(np.maximum(shares, np.minimum(capacity * unused, alone)), unused)
    hessian = np.zeros((len(unit), len(unit)))
    hessian[:-1, :-1] = 2 * gram * unit[:-1, None] * unit[:-1]
    return _Scaled(hessian, unit, np.maximum(capacity * unused / unit[:-1], 1.0), size)


def _interior_point(problem: _Scaled) -> FloatArray:
    """Clarabel's x, whatever its status: the caller certifies the result."""
    try:
        import clarabel
        from scipy import sparse
    except ImportError as error:
        message = "allocate: expected the solver Clarabel, got none; run `pip install clarabel`"
        raise ImportError(message) from error
    sources = len(problem.limit)
    scale = 1 / problem.limit
    constraints = sparse.vstack(
        [
            sparse.csc_matrix(problem.unit[None, :]),
            sparse.hstack([-sparse.eye(sources), sparse.csc_matrix((sources, 1))]),
            sparse.hstack([sparse.diags(scale), sparse.csc_matrix(np.full((sources, 1), -1.0))]),
        ],
        format="csc",
    )
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    settings.static_regularization_constant = 1e-12  # the default, 1e-8, stalls far from these tolerances
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix(np.triu(problem.hessian / problem.size)),
        np.append(np.zeros(sources), problem.unit[-1] / problem.size),
        constraints,
        np.append(1.0, np.zeros(2 * sources)),
        [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(2 * sources)],
        settings,
    ).solve()
    return np.nan_to_num(np.asarray(solution.x, dtype=np.float64))


def _polish(gram: FloatArray, capacity: FloatArray, problem: _Scaled, point: FloatArray) -> list[FloatArray]:
    """Ratios from an interior solution, and after each of a few active-set steps from there.

    The steps put sources exactly on the bounds they approach and solve for the others to rounding.
    """
    unit, limit, size = problem.unit, problem.limit, problem.size
    candidates: list[FloatArray] = []
    empty, full = np.zeros(len(limit), bool), np.zeros(len(limit), bool)
    while True:
        rest = max(point[-1], 1e-100)
        relative = np.where(empty, 0.0, np.where(full, limit, np.clip(point[:-1] / rest, 0, limit)))
        candidates.append(np.where(relative == limit, capacity, relative * unit[:-1] / unit[-1]))
        if len(candidates) > _POLISH_STEPS:
            return candidates
        shares = candidates[-1] / (1 + candidates[-1].sum())
        _, lower, upper = _multipliers(2 * gram @ shares, capacity)
        # Strict complementarity: of a slack and its multiplier, the one near zero is the smaller.
        empty, full = relative * size < lower, (limit - relative) * size < limit * upper
        point = _solve_active(problem, np.append(relative * rest, rest), empty, full)


def _solve_active(problem: _Scaled, point: FloatArray, empty: NDArray[np.bool_], full: NDArray[np.bool_]) -> FloatArray:
    """The minimiser with given sources empty or full (at their limit), the bounds of the others ignored.

    The last variable carries the full sources along. Proximal steps from ``point`` (a ridge that is
    iterated away) make the system regular and, where free sources are exchangeable, keep their split.
    """
    hessian, unit = problem.hessian, problem.unit
    carried = np.append(np.where(full, problem.limit, 0.0), 1.0)
    index = np.append(np.flatnonzero(~empty & ~full), len(unit) - 1)
    reduced = hessian[np.ix_(index, index)]
    reduced[-1] = reduced[:, -1] = (hessian @ carried)[index]
    reduced[-1, -1] = carried @ hessian @ carried
    linear, mass = np.zeros(len(index)), unit[index]
    linear[-1], mass[-1] = unit[-1], unit @ carried

    root = np.sqrt(np.diagonal(reduced) / problem.size + mass)
    reduced, linear = reduced / problem.size / root[:, None] / root, linear / problem.size / root
    mass = mass / root
    system = np.block([[reduced + 1e-11 * np.eye(len(index)), -mass[:, None]], [-mass, np.zeros(1)]])
    inverse = np.linalg.inv(system)
    value, multiplier = point[index] * root, 1.0
    for _ in range(4):
        stationarity = reduced @ value + linear - multiplier * mass
        change = inverse @ np.append(stationarity, 1 - mass @ value)
        value, multiplier = value - change[:-1], multiplier - change[-1]
    moved: FloatArray = carried * (value[-1] / root[-1])
    moved[index] = value / root
    return moved

"""The solver behind ``allocate``: a convex quadratic program and the residual that certifies its solution.

Everything here is dimensionless. Over the shares w of the sources and u of the target, z = (w, u),

    min |M z|^2 + l u    subject to    w >= 0, u >= 0, 1^T w + u = 1, w_i <= c_i u.

Keeping the quadratic form as a factor M halves the digits lost where sources cancel each other. The solution is
returned as the ratios r = w / u, which stay accurate where u is small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transferops.otqms.semidefinite import MANY
from transferops.otqms.theory import FloatArray

SUFFICIENT_RESIDUAL = 1e-10
_ROUNDS = 8  # of the interior-point method; the first nearly always suffices
_POLISH_STEPS = 3
_DESCENT_STEPS = 200
_NEGLIGIBLE_RESIDUAL = 1e-12
_FAR = 1e30
_PROXIMAL_STEPS = 50
_PROXIMAL = 1e-12  # relative to the curvature of each variable at the scale of the solution
_PROXIMAL_OWN = 1e-20  # relative to its own curvature, far below that of sources that cancel to rounding
TOLERANCE = 1e-12  # of the interior-point method
_FIRST_TOLERANCE = 1e-9  # with many sources, in the first round: enough to tell most of them from their bounds


class Program(NamedTuple):
    """min |M z|^2 + linear u, see the module."""

    matrix: FloatArray  # M, [R, K + 1]
    linear: float  # l
    limit: FloatArray  # c, [K], positive, infinite for none

    def value(self, ratios: FloatArray) -> float:
        """The objective at z = (r, 1) / (1 + 1^T r)."""
        z = shares(ratios)
        return float(np.square(self.matrix @ z).sum() + self.linear * z[-1])


class Solution(NamedTuple):
    """Ratios, the dual vector that certifies them, and their KKT residual: see :func:`residual_of`."""

    ratios: FloatArray
    dual: FloatArray
    residual: float


def shares(ratios: FloatArray) -> FloatArray:
    """z = (r, 1) / (1 + 1^T r)."""
    extended = np.append(ratios, 1.0)
    return np.asarray(extended / extended.sum())


def residual_of(program: Program, ratios: FloatArray, dual: FloatArray) -> float:
    """How far the Karush-Kuhn-Tucker conditions are from holding, at r and a dual vector p for y = M z [derived].

    With g = M^T p + l e_u and nu the least of g^T z over the feasible z, the multipliers of w >= 0 are max(g - nu, 0)
    and those of w <= c u max(nu - g, 0): dual feasible. The residual is dimensionless, the largest of

    - stationarity in y: |M z - p/2| / sqrt(objective);
    - complementarity: the products of slacks and multipliers, in sum, over the objective;
    - infeasibility of z, in shares of one.

    The objective is nowhere below nu - |p|^2/4, and what it is above that is |M z - p/2|^2 plus those products: a
    residual r bounds the relative excess of the objective over its minimum by r + r^2.
    """
    z = shares(ratios)
    gradient = program.matrix.T @ dual
    gradient[-1] += program.linear
    level, lower, upper = multipliers(gradient, program.limit)
    room = np.where(upper > 0, program.limit * z[-1] - z[:-1], 0.0)
    carried = np.dot(np.where(upper > 0, program.limit, 0.0), upper)
    image = program.matrix @ z
    distance = np.square(image - dual / 2).sum()
    complementarity = lower @ z[:-1] + upper @ np.abs(room) + z[-1] * abs(gradient[-1] - level - carried)
    infeasible = np.append(-z, z[:-1] - program.limit * z[-1]).max()
    value = np.square(image).sum() + program.linear * z[-1]
    return float(max(np.sqrt(distance / value), complementarity / value, infeasible))


def multipliers(gradient: FloatArray, limit: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """nu, and the multipliers of w >= 0 and of w <= c u, for a linear objective g^T z.

    nu is the root of nu + sum_i c_i max(nu - g_i, 0) = g_u, or the least of g if no limit is finite.
    """
    if not np.isfinite(limit).all():
        level = float(gradient.min())
    else:
        order = np.argsort(gradient[:-1])
        ordered, weight = gradient[:-1][order], limit[order]
        levels = (gradient[-1] + np.append(0, np.cumsum(weight * ordered))) / (1 + np.append(0, np.cumsum(weight)))
        level = float(levels[np.count_nonzero(levels[:-1] > ordered)])
    return level, np.maximum(gradient[:-1] - level, 0), np.maximum(level - gradient[:-1], 0)


def solve(program: Program) -> Solution:
    """The ratios of least objective.

    An interior-point method finds which sources are at a bound, active-set steps give the digits. The method
    wants variables and objective of about one, which they are in terms of the solution: so a poor solution gives
    the units for another round. Every other round keeps the quadratic form factored, for digits.
    """
    curvature = np.square(program.matrix[:, :-1]).sum(0)
    ratios = np.minimum(program.limit, 1 / np.maximum(curvature, np.finfo(np.float64).tiny))
    z, size = np.append(np.zeros_like(ratios), shares(ratios)[-1]), float(shares(ratios)[-1])
    best = Solution(ratios, np.zeros(len(program.matrix)), np.inf)
    for turn in range(_ROUNDS):
        # What a source gets at the common multiplier on its own, for those that have nothing yet.
        alone = size / np.maximum(2 * curvature, 1e-200)
        unit = np.append(np.maximum(z[:-1], np.minimum(program.limit * z[-1], alone)), z[-1])
        start = _start(program, unit, size, factored=turn % 2 == 1, tolerance=first_tolerance(turn, len(ratios)))
        found = polish(program, start, unit, size)
        if found.residual < best.residual:
            best = found
        if best.residual <= SUFFICIENT_RESIDUAL:
            break
        ratios = min(found.ratios, start, key=program.value)
        z, size = shares(ratios), program.value(ratios)
    return best


def polish(program: Program, ratios: FloatArray, unit: FloatArray, size: float) -> Solution:
    """The best of an interior solution and of active-set steps from there.

    The steps put sources exactly on the bounds they approach and solve for the others to rounding.
    """
    best = Solution(ratios, np.zeros(len(program.matrix)), np.inf)
    point = ratios
    for _ in range(_POLISH_STEPS):
        empty, full = _at_bounds(program, point)
        aim, dual = active_set(program, shares(point), empty, full, unit, size)
        point = ratios_of(program, aim)
        best = _better(program, best, point, dual)
        if best.residual <= _NEGLIGIBLE_RESIDUAL:
            return best
        best = _better(program, best, point, 2 * (program.matrix @ shares(point)))
    if best.residual <= SUFFICIENT_RESIDUAL:
        return best
    best = _better(program, best, ratios, 2 * (program.matrix @ shares(ratios)))
    return _descend(program, best, ratios, unit, size)


def _at_bounds(program: Program, ratios: FloatArray) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The sources that look empty and full at the optimum: those whom a Newton step of their own would bring there."""
    z = shares(ratios)
    gradient = 2 * program.matrix.T @ (program.matrix @ z)
    gradient[-1] += program.linear
    _, lower, upper = multipliers(gradient, program.limit)
    curvature = 2 * np.square(program.matrix[:, :-1]).sum(0)
    empty = curvature * z[:-1] < lower
    return empty, (curvature * (program.limit * z[-1] - z[:-1]) < upper) & ~empty


def _descend(program: Program, best: Solution, ratios: FloatArray, unit: FloatArray, size: float) -> Solution:
    """The textbook active-set method, from the best point so far: one bound more or less at a time, never uphill."""
    ratios = min(best.ratios, ratios, key=program.value)
    empty, full = ratios <= 0, ratios >= program.limit
    norms, settled = np.linalg.norm(program.matrix[:, :-1], axis=0), np.inf
    limited = np.isfinite(program.limit)
    limit = np.where(limited, program.limit, 0.0)
    seen: set[bytes] = set()
    for _ in range(_DESCENT_STEPS):
        z = shares(ratios)
        unit = np.maximum(unit, z)
        aim, dual = active_set(program, z, empty, full, unit, size)
        best = _better(program, best, ratios_of(program, aim), dual)
        if best.residual <= _NEGLIGIBLE_RESIDUAL:
            break
        move, free = aim - z, ~empty & ~full
        step = max(1.0, least_step(program, z, move))  # proximal steps fall short where there is little curvature
        room, closing = limit * z[-1] - z[:-1], move[:-1] - limit * move[-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            emptied = np.where(free & (move[:-1] < 0), z[:-1] / -move[:-1], np.inf)
            filled = np.where(free & limited & (closing > 0), np.maximum(room, 0) / closing, np.inf)
        if move[-1] < 0:
            step = min(step, 0.99 * z[-1] / -move[-1])
        reach = np.minimum(emptied, filled)
        blocking = int(np.argmin(reach))
        if reach[blocking] < step:
            ratios = ratios_of(program, z + reach[blocking] * move)
            empty[blocking] = emptied[blocking] <= filled[blocking]
            full[blocking] = not empty[blocking]
            ratios[empty], ratios[full] = 0.0, program.limit[full]
            continue
        before, ratios = ratios, ratios_of(program, z + step * move)
        if not 1 <= step < 2:
            continue
        gradient = program.matrix.T @ dual
        gradient[-1] += program.linear
        carried = np.append(np.where(full, limit, 0.0), 1.0)
        excess = gradient[:-1] - carried @ gradient / carried.sum()
        wrong = np.where(empty, -excess, np.where(full, excess, 0.0)) / (norms + np.sqrt(size))
        worst = entering(wrong, empty, full, seen)
        if wrong[worst] <= 0:
            if best.residual > settled / 2 and np.allclose(ratios, before, rtol=1e-2, atol=0):
                break
            settled = best.residual  # once more, the proximal steps starting nearer
            continue
        empty[worst] = full[worst] = False
    return best


def entering(wrong: FloatArray, empty: NDArray[np.bool_], full: NDArray[np.bool_], seen: set[bytes]) -> int:
    """The source that leaves its bound: the one that gains most.

    From a state that was there before, to which rounding has led back, the first that gains at all, which does not go
    round in circles [Bland, 1977, Math. Oper. Res. 2(2)].
    """
    state = np.packbits([empty, full]).tobytes()
    best = np.argmax(wrong > 0) if state in seen else np.argmax(wrong)
    seen.add(state)
    return int(best)


def least_step(program: Program, z: FloatArray, move: FloatArray) -> float:
    """The t of least objective at z + t move; large if it falls without end."""
    image, change = program.matrix @ z, program.matrix @ move
    slope = 2 * (image @ change) + program.linear * move[-1]
    return float(min(-slope / max(2 * (change @ change), np.finfo(np.float64).tiny), _FAR))


def ratios_of(program: Program, z: FloatArray) -> FloatArray:
    """w / u within the bounds."""
    return np.asarray(np.clip(z[:-1] / max(z[-1], 1e-100), 0, program.limit))


def _better(program: Program, best: Solution, ratios: FloatArray, dual: FloatArray) -> Solution:
    residual = residual_of(program, ratios, dual)
    return Solution(ratios, dual, residual) if residual < best.residual else best


def active_set(
    program: Program,
    z: FloatArray,
    empty: NDArray[np.bool_],
    full: NDArray[np.bool_],
    unit: FloatArray,
    size: float,
) -> tuple[FloatArray, FloatArray]:
    """z and dual with given sources empty or full (at their limit), the bounds of the others ignored.

    The last variable, u, carries the full sources along. Proximal steps from z (a ridge that is iterated away)
    make the system regular and, where free sources are exchangeable, keep their split.
    """
    from scipy.linalg import solve_triangular

    free = np.append(~empty & ~full, True)
    carried = np.append(np.where(full, program.limit, 0.0), 1.0)
    matrix = program.matrix[:, free]
    matrix[:, -1] = program.matrix @ carried
    mass, linear = np.ones(matrix.shape[1]), np.zeros(matrix.shape[1])
    mass[-1], linear[-1] = carried.sum(), program.linear

    ridge = np.sqrt(_PROXIMAL_OWN * np.square(matrix).sum(0) + _PROXIMAL * size * mass / unit[free])
    filled = np.count_nonzero(matrix, axis=1)
    if len(ridge) >= MANY:  # without Q, which is as much work again, and with rows of a single entry in the ridge's
        single, rows = filled == 1, filled > 1
        diagonal, column = ridge.copy(), matrix[single].astype(bool).argmax(1)
        np.hypot.at(diagonal, column, matrix[single, column])
        triangle = np.asarray(np.linalg.qr(np.vstack([matrix[rows], np.diag(diagonal)]), mode="r"))
    else:
        rows = filled > 0
        orthogonal = np.zeros_like(matrix)
        factors = np.linalg.qr(np.vstack([matrix[rows], np.diag(ridge)]))
        orthogonal[rows], triangle = factors.Q[: rows.sum()], factors.R

    def half(vector: FloatArray) -> FloatArray:
        return np.asarray(solve_triangular(triangle, vector, trans="T", check_finite=False))

    def whole(vector: FloatArray) -> FloatArray:
        return np.asarray(solve_triangular(triangle, half(vector), check_finite=False)) / 2

    value, level, along = z[free], 0.0, whole(mass)
    moved = np.inf
    for _ in range(_PROXIMAL_STEPS):
        change = whole(level * mass - linear - 2 * matrix.T @ (matrix @ value))
        shift = (1 - mass @ (value + change)) / (mass @ along)
        change += shift * along
        value, level = value + change, level + shift
        previous, moved = moved, float(np.linalg.norm(ridge * change))
        if moved > previous / 2:  # rounding is reached
            break
    dual = 2 * (matrix @ value)
    for _ in range(2):
        missing = half(level * mass - linear - matrix.T @ dual)
        if len(ridge) >= MANY:
            dual = dual + matrix @ solve_triangular(triangle, missing, check_finite=False)
        else:
            dual = dual + orthogonal @ missing

    aim = carried * value[-1]
    aim[free] = value
    return aim, dual


def first_tolerance(turn: int, sources: int) -> float:
    """Of the interior-point method in a round, from 0: with many sources every iteration costs."""
    return _FIRST_TOLERANCE if turn == 0 and sources >= MANY else TOLERANCE


def upper_triangle(symmetric: FloatArray) -> Any:
    """The upper triangle of a dense matrix as a sparse one, by columns, without a search for zeros."""
    from scipy import sparse

    size = len(symmetric)
    rows, columns = np.tril_indices(size)  # row by row, which is the upper triangle column by column
    starts = np.append(0, np.cumsum(np.arange(1, size + 1)))
    return sparse.csc_matrix((symmetric[rows, columns], columns, starts), shape=(size, size))


def interior_point(
    hessian: Any,
    linear: FloatArray,
    constraints: list[Any],
    bound: FloatArray,
    cones: list[tuple[str, int]],
    tolerance: float,
) -> FloatArray:
    """Clarabel's x for min x^T H x / 2 + f^T x with b - [constraints] x in cones, whatever its status.

    Of the sparse H the upper triangle counts. The caller certifies the result.
    """
    try:
        import clarabel
        from scipy import sparse
    except ImportError as error:
        message = "allocate: expected the solver Clarabel, got none; run `pip install clarabel`"
        raise ImportError(message) from error
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = tolerance
    settings.static_regularization_constant = 1e-12  # the default, 1e-8, stalls far from these tolerances
    settings.iterative_refinement_enable = tolerance <= TOLERANCE  # half the time, for digits that a first round lacks
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix(hessian),
        linear,
        sparse.vstack([sparse.csc_matrix(block) for block in constraints], format="csc"),
        bound,
        [getattr(clarabel, f"{kind}ConeT")(size) for kind, size in cones],
        settings,
    ).solve()
    return np.nan_to_num(np.asarray(solution.x, dtype=np.float64))


def _start(program: Program, unit: FloatArray, size: float, factored: bool, tolerance: float) -> FloatArray:
    """The ratios by the interior-point method, in given units of z and of the objective.

    ``factored`` carries M z along as variables: slower, and with the digits that M^T M loses.
    """
    from scipy import sparse

    sources = len(program.limit)
    scaled = program.matrix * (unit / np.sqrt(size))
    limited = np.flatnonzero(np.isfinite(program.limit))
    entries = 1 / np.maximum(program.limit[limited] * unit[-1] / unit[limited], 1.0)
    places = (np.arange(limited.size), limited)
    bounded = sparse.csc_matrix((entries, places), shape=(limited.size, sources))
    bounded = sparse.hstack([bounded, np.full((limited.size, 1), -1.0)], format="csc")
    linear = np.append(np.zeros(sources), program.linear * unit[-1] / size)
    constraints, zeros = [unit[None, :], -sparse.eye(sources + 1, format="csc"), bounded], 1
    bound = np.append(1.0, np.zeros(sources + 1 + limited.size))
    if not factored:
        hessian = upper_triangle(2 * (scaled.T @ scaled))
    else:
        rows = len(scaled)
        hessian = sparse.diags(np.append(np.zeros(sources + 1), np.full(rows, 2.0)))
        linear = np.append(linear, np.zeros(rows))
        constraints = [sparse.hstack([c, sparse.csc_matrix((c.shape[0], rows))]) for c in constraints]
        constraints.insert(1, sparse.hstack([scaled, -sparse.eye(rows)]))
        bound = np.insert(bound, 1, np.zeros(rows))
        zeros += rows
    cones = [("Zero", zeros), ("Nonnegative", sources + 1 + limited.size)]
    point = interior_point(hessian, linear, constraints, bound, cones, tolerance)[: sources + 1]
    return ratios_of(program, point * unit)

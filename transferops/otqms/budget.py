"""The solver of the budgeted allocation: which samples to pay for, and how much weight to give them.

Dimensionless, with m_i = n_i/N0 the samples taken, k_i their cost and b the budget, over the masses q of the sources
and q_0 of the target,

    min q_0^2 + |R q|^2 + sum_i q_i^2/m_i    subject to    q >= 0, q_0 + 1^T q = 1, 0 <= m_i <= c_i, k^T m <= b.

For given ratios x = q / q_0 the best samples are m_i = min(c_i, x_i / (sigma sqrt k_i)), sigma using up the budget. So
where the set C of exhausted sources is known, the others (F) share one term, (sum_F sqrt(k_i) q_i)^2 / (b - k_C^T c_C),
and the program is one that :mod:`transferops.otqms.quadratic_program` solves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transferops.otqms.quadratic_program import (
    SUFFICIENT_RESIDUAL,
    Program,
    active_set,
    entering,
    first_tolerance,
    interior_point,
    least_step,
    ratios_of,
    shares,
    upper_triangle,
)
from transferops.otqms.theory import FloatArray

_ROUNDS = 6
_DESCENT_STEPS = 400
_NEGLIGIBLE_RESIDUAL = 1e-12


class Problem(NamedTuple):
    """See the module. The budget binds: b < k^T c."""

    factor: FloatArray  # R, [rank, K]
    capacity: FloatArray  # c, [K], positive
    cost: FloatArray  # k, [K], positive
    budget: float  # b, positive

    def value(self, ratios: FloatArray) -> float:
        """The objective at x = q / q_0 and the best samples."""
        samples, z, taken = self.samples(ratios)[0], shares(ratios), ratios > 0
        spread = np.square(z[:-1])[taken] / samples[taken]
        return float(np.square(self.factor @ z[:-1]).sum() + z[-1] ** 2 + spread.sum())

    def samples(self, ratios: FloatArray) -> tuple[FloatArray, float]:
        """The best m for given x = q / q_0, and sigma (0 if the budget is left over)."""
        level = ratios / (self.capacity * np.sqrt(self.cost))
        order = np.argsort(-level)
        left = self.budget - np.append(0, np.cumsum((self.cost * self.capacity)[order]))
        wanted = (np.sqrt(self.cost) * ratios)[order]
        rest = np.append(np.cumsum(wanted[::-1])[::-1], 0.0)
        # The first j sources exhausted, the others share what is left: right once their sigma reaches their level.
        with np.errstate(divide="ignore", invalid="ignore"):
            sigmas = np.where(left > 0, rest / left, np.inf)
        count = int(np.argmax(sigmas >= np.append(level[order], 0.0)))
        sigma = float(sigmas[count])
        samples = np.zeros_like(ratios)
        samples[order[:count]] = self.capacity[order[:count]]
        if sigma > 0:
            tail = order[count:]
            samples[tail] = np.minimum(self.capacity[tail], ratios[tail] / (sigma * np.sqrt(self.cost[tail])))
        return samples, sigma

    def program(self, exhausted: NDArray[np.bool_]) -> Program:
        """The program with the exhausted sources known; rows R, one for each of C, one for F, one for the target."""
        rank, sources = self.factor.shape
        which = np.flatnonzero(exhausted)
        matrix = np.zeros((rank + which.size + 2, sources + 1))
        matrix[:rank, :-1] = self.factor
        matrix[rank + np.arange(which.size), which] = 1 / np.sqrt(self.capacity[which])
        left = self.left(exhausted)
        if left > 0:
            matrix[-2, :-1] = np.where(exhausted, 0.0, np.sqrt(self.cost / left))
        matrix[-1, -1] = 1.0
        return Program(matrix, 0.0, np.full(sources, np.inf))

    def shortage(self, z: FloatArray, exhausted: NDArray[np.bool_]) -> FloatArray:
        """Positive where more samples are wanted than there are, at shares z and the sigma of those not exhausted."""
        root = np.sqrt(self.cost)
        wanted = root[~exhausted] @ z[:-1][~exhausted]
        return np.asarray(z[:-1] * self.left(exhausted) - self.capacity * root * wanted)

    def left(self, exhausted: NDArray[np.bool_]) -> float:
        """What the exhausted sources leave of the budget."""
        spent = (self.cost * self.capacity)[exhausted].sum()
        return float(self.budget - spent) if self.budget > spent * (1 + 1e-15) else 0.0


class Purchase(NamedTuple):
    """Ratios x = q / q_0, samples m, and their KKT residual, see :func:`residual_of`."""

    ratios: FloatArray
    samples: FloatArray
    residual: float


def residual_of(problem: Problem, ratios: FloatArray, dual: FloatArray, weight: FloatArray, price: float) -> Purchase:
    """The samples for given ratios, and how far the Karush-Kuhn-Tucker conditions are from holding.

    The multipliers are p (``dual``) for R q and q_0, a (``weight``) for the masses per sample, eta (``price``) for the
    budget. The objective is nowhere below nu - |p|^2/4 - eta b - sum_i c_i max(a_i^2 - eta k_i, 0), where nu is the
    least of p_0 and R_i^T p + 2 a_i; what it is above this at the given point is a sum of squares (stationarity) and
    of products of slacks and multipliers. The residual is as in
    :func:`transferops.otqms.quadratic_program.residual_of`.
    """
    samples, _ = problem.samples(ratios)
    z = shares(ratios)
    image = np.append(problem.factor @ z[:-1], z[-1])
    gradient = np.append(problem.factor.T @ dual[:-1] + 2 * weight, dual[-1])
    taken = samples > 0
    spread = np.square(z[:-1] - weight * samples)[taken] / samples[taken]
    excess = weight**2 - price * problem.cost
    unused = np.where(excess > 0, excess * (problem.capacity - samples), -excess * samples).sum()
    value = np.square(image).sum() + (np.square(z[:-1])[taken] / samples[taken]).sum()
    over = problem.cost @ samples / problem.budget - 1
    distance = np.square(image - dual / 2).sum() + spread.sum()
    complementarity = z @ (gradient - gradient.min()) + unused + price * abs(problem.budget - problem.cost @ samples)
    return Purchase(ratios, samples, float(max(np.sqrt(distance / value), complementarity / value, over)))


def solve_budget(problem: Problem) -> Purchase:
    """The ratios and samples of least risk under a budget that binds.

    As :func:`transferops.otqms.quadratic_program.solve`: an interior-point method, here with a second-order cone for
    each source, finds which sources are empty or exhausted, active-set steps give the digits.
    """
    reach = np.minimum(problem.capacity, problem.budget / problem.cost)
    curvature = np.square(problem.factor).sum(0) + 1 / reach
    ratios = 1 / curvature
    z, size = np.append(np.zeros_like(ratios), shares(ratios)[-1]), float(shares(ratios)[-1])
    best = Purchase(ratios, reach, np.inf)
    for turn in range(_ROUNDS):
        unit = np.append(np.maximum(z[:-1], size / (2 * curvature)), z[-1])
        start = _cone_program(problem, unit, reach, size, first_tolerance(turn, len(ratios)))
        found = _descend(problem, start, unit, size)
        if found.residual < best.residual:
            best = found
        if best.residual <= SUFFICIENT_RESIDUAL:
            break
        ratios = min(found.ratios, start, key=problem.value)
        z, size = shares(ratios), problem.value(ratios)
    return best


def _descend(problem: Problem, ratios: FloatArray, unit: FloatArray, size: float) -> Purchase:
    """The textbook active-set method from an interior solution: one source changes its state at a time, never uphill.

    The objective is quadratic while the set of exhausted sources stays, and smooth where it changes.
    """
    program = problem.program(exhausted := problem.samples(ratios)[0] >= problem.capacity)
    gradient = 2 * program.matrix.T @ (program.matrix @ shares(ratios))
    norms = np.linalg.norm(program.matrix[:, :-1], axis=0)
    # Empty are those whom a Newton step on their own would bring there.
    empty = 2 * norms**2 * shares(ratios)[:-1] < gradient[:-1] - gradient.min()
    if problem.value(np.where(empty, 0.0, ratios)) > problem.value(ratios) * 1.001:  # too far off to tell
        empty[:] = False
    exhausted &= ~empty
    best, settled = Purchase(ratios, ratios, np.inf), np.inf
    stuck: list[int] = []
    seen: set[bytes] = set()
    for _ in range(_DESCENT_STEPS):
        left = problem.left(exhausted)
        if left == 0:
            empty = ~exhausted
        ratios = np.where(empty, 0.0, ratios)
        z, program = shares(ratios), problem.program(exhausted)
        unit = np.maximum(unit, z)
        here, _ = _certified(problem, ratios, 2 * (program.matrix @ z), exhausted)
        aim, dual = active_set(program, z, empty, np.zeros_like(empty), unit, size)
        there, excess = _certified(problem, ratios_of(program, aim), dual, exhausted)
        best = min(best, here, there, key=lambda purchase: purchase.residual)
        if best.residual <= _NEGLIGIBLE_RESIDUAL:
            break
        aim = z + max(1.0, least_step(program, z, aim - z)) * (aim - z)
        # Where on the way a source would lose its last mass, or an exhausted one become free or a free one exhausted.
        before, after = problem.shortage(z, exhausted), problem.shortage(aim, exhausted)
        turned = ~empty & np.where(exhausted, after < 0, after > 0)
        turned[stuck], stuck = False, []
        emptied = ~empty & (aim[:-1] < 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            turn = np.where(turned, np.clip(np.nan_to_num(before / (before - after)), 0, 1), 1.0)
            drop = np.where(emptied, z[:-1] / (z[:-1] - aim[:-1]), 1.0)
        at = int(np.argmin(np.minimum(turn, drop)))
        if turned[at] or emptied[at]:
            step = min(turn[at], drop[at])
            ratios = ratios_of(program, z + step * (aim - z))
            if drop[at] <= turn[at]:
                empty[at], exhausted[at] = True, False
            else:
                exhausted[at] = not exhausted[at]
                stuck = [at] if step <= 1e-12 else []  # or it might turn to and fro on the spot
            continue
        start, ratios = ratios, ratios_of(program, aim)
        wrong = np.where(empty, -excess, 0.0) / (norms + np.sqrt(size))
        worst = entering(wrong, empty, exhausted, seen)
        if wrong[worst] <= 0:
            if there.residual > settled / 2 and np.allclose(ratios, start, rtol=1e-2, atol=0):
                break
            settled = there.residual  # once more, the proximal steps starting nearer
            continue
        empty[worst] = False
        if left == 0:  # room for it: the exhausted source that gains least from its samples gives way
            density = np.where(exhausted, ratios / (problem.capacity * np.sqrt(problem.cost)), np.inf)
            exhausted[int(np.argmin(density))] = False
    return best


def _certified(
    problem: Problem, ratios: FloatArray, dual: FloatArray, exhausted: NDArray[np.bool_]
) -> tuple[Purchase, FloatArray]:
    """The duals of the budgeted program from those of the program with the exhausted sources known."""
    rank, left = len(problem.factor), problem.left(exhausted)
    weight = np.zeros_like(ratios)
    weight[exhausted] = dual[rank:-2] / (2 * np.sqrt(problem.capacity[exhausted]))
    if left > 0:
        price = float(dual[-2] ** 2 / (4 * left))
    else:
        price = float((weight[exhausted] ** 2 / problem.cost[exhausted]).min())
    # Rounded down, since a^2 - eta k above zero would count times what a source has, however much that is.
    weight[~exhausted] = np.sqrt(price * problem.cost[~exhausted]) * (1 - 2 * np.finfo(np.float64).eps)
    excess = problem.factor.T @ dual[:rank] + 2 * weight - dual[-1]
    return residual_of(problem, ratios, np.append(dual[:rank], dual[-1]), weight, price), excess


def _cone_program(problem: Problem, unit: FloatArray, reach: FloatArray, size: float, tolerance: float) -> FloatArray:
    """The ratios by the interior-point method, over q, q_0, m and t_i >= q_i^2/m_i in given units."""
    from scipy import sparse

    sources = len(reach)
    scaled = problem.factor * unit[:-1]
    linear = np.zeros(3 * sources + 1)
    linear[2 * sources + 1 :] = unit[:-1] ** 2 / reach / size
    hessian = sparse.block_diag(
        [
            upper_triangle(2 * (scaled.T @ scaled) / size),
            [[2 * unit[-1] ** 2 / size]],
            sparse.csc_matrix((2 * sources, 2 * sources)),
        ]
    )

    def rows(mass: Any, taken: Any, bound: Any) -> Any:
        return sparse.hstack([mass, sparse.csc_matrix((sources, 1)), taken, bound])

    eye, none = sparse.eye(sources), sparse.csc_matrix((sources, sources))
    cone = sparse.vstack([rows(none, -eye, -eye), rows(none, eye, -eye), rows(-2 * eye, none, none)], format="csr")
    constraints = [
        np.append(unit, np.zeros(2 * sources))[None, :],
        sparse.hstack([-sparse.eye(sources + 1), sparse.csc_matrix((sources + 1, 2 * sources))]),
        rows(none, eye, none),
        np.concatenate([np.zeros(sources + 1), problem.cost * reach / problem.budget, np.zeros(sources)])[None, :],
        cone[np.arange(3 * sources).reshape(3, sources).T.ravel()],
    ]
    point = interior_point(
        hessian,
        linear,
        constraints,
        np.concatenate([[1.0], np.zeros(sources + 1), problem.capacity / reach, [1.0], np.zeros(3 * sources)]),
        [("Zero", 1), ("Nonnegative", 2 * sources + 2)] + [("SecondOrder", 3)] * sources,
        tolerance,
    )
    mass, target = np.maximum(point[:sources] * unit[:-1], 0), max(point[sources] * unit[-1], 1e-100)
    return np.asarray(mass / target)

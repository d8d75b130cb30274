"""How many samples to take from each source, or what weight to give them: convex problems, solved with a certificate.

The paper (NeurIPS 2025, arXiv 2502.04242, Theorem 7) gives the expected risk of n_i samples from source i and
minimises it by a grid over s = sum n_i with a quadratic program at each point
(:func:`transferops.otqms.paper_grid.paper_grid`). In the pooled shares w_i = n_i / (N0 + s) the whole problem is a
single convex quadratic program [derived]:

    min_w  w^T A w - (d/N0) 1^T w    subject to    0 <= w_i <= (N_i/N0) (1 - 1^T w),

and n_i = N0 w_i / (1 - 1^T w). Its optimum is global, between the grid's points too, and its
Karush-Kuhn-Tucker (KKT) conditions certify it.

Instead of leaving samples out, all can be given a weight [derived]: with masses q_i on the n_i samples of source i
and q_0 on the target,

    min_q  d sum_{i>=0} q_i^2/n_i + q^T A q    subject to    q >= 0, sum_{i>=0} q_i = 1,

with n_i = N_i, or under a budget with n_i to be chosen too, which is still convex.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferops._validate import check_array, describe, fail
from transferops.otqms.budget import Problem, solve_budget
from transferops.otqms.quadratic_program import Program, residual_of, shares, solve
from transferops.otqms.rounding import largest_remainder
from transferops.otqms.semidefinite import debias as without_noise
from transferops.otqms.semidefinite import factor, storage_epsilon
from transferops.otqms.theory import FloatArray, target_only_risk

MODES = ("quantity", "weight", "budget")
_ACCEPTED_RESIDUAL = 1e-6


@dataclass(frozen=True, eq=False)
class Allocation:
    """Samples to take from each of K sources, their weight, and how good that is.

    Attributes:
        mode: "quantity", "weight" or "budget".
        quantities: n, float64 [K], 0 <= n_i <= N_i: the continuous optimum. With mode "weight" N_i, or 0 for a source
            without weight.
        sample_weights: of a sample of source i relative to a target sample, float64 [K]: 0 where n_i = 0; with mode
            "quantity" otherwise 1.
        masses: q_i, float64 [K]: the share of source i in the weighted training set. Its n_i samples have q_i / n_i
            each.
        target_mass: q_0 = 1 - sum q.
        risk: expected risk, in nats (:func:`transferops.otqms.theory.weighted_risk`).
        target_only_risk: d / (2 N0), the risk of taking nothing.
        kkt_residual: dimensionless, see :func:`transferops.otqms.quadratic_program.residual_of`; at most 1e-6, and
            below 1e-8 but for extreme inputs.
        source_samples: N_i, float64 [K].
        costs: of a sample of each source, float64 [K]; 1 unless given.
        budget: what the samples may cost together; infinite but for mode "budget".
    """

    mode: str
    quantities: FloatArray
    sample_weights: FloatArray
    masses: FloatArray
    target_mass: float
    risk: float
    target_only_risk: float
    kkt_residual: float
    source_samples: FloatArray
    costs: FloatArray
    budget: float

    @property
    def total(self) -> float:
        """sum n, the number of samples taken from all sources before rounding."""
        return float(self.quantities.sum())

    @property
    def relative_risk(self) -> float:
        """The risk over that of the target alone, at most 1: the sources are worth N0 / relative_risk - N0 samples."""
        return self.risk / self.target_only_risk

    def rounded(self) -> NDArray[np.int64]:
        """Whole samples, int64 [K]: a separate step after the optimum, by largest remainder.

        Every quantity is rounded down, then single samples go to the sources with the largest fractional parts, the
        first source first in a tie: until the total is the nearest integer to sum n (halves up), or, with mode
        "budget", as long as they can be paid. So every entry is within one of its quantity and 0 <= n_i <=
        floor(N_i). The weights of single samples stay as they are. The optimum being flat, the loss in risk is of
        second order.
        """
        return largest_remainder(self.quantities, self.source_samples, self.costs, self.budget)


def allocate(
    gram: ArrayLike,
    target_samples: float,
    source_samples: ArrayLike,
    dimension: float,
    mode: str = "quantity",
    budget: float | None = None,
    debias: bool = False,
    *,
    costs: ArrayLike | None = None,
) -> Allocation:
    """The samples, or their weights, that minimise the expected risk of the training set.

    The risk of pooled samples is the paper's (Theorem 7) [paper]; that one convex quadratic program gives its global
    minimum, weights, budget and debiasing are [derived]. With weights using all data is never worse than leaving
    some out: the risk of mode "weight" is at most that of "budget", and both, where the budget allows it, at most that
    of "quantity".

    A source that would raise the risk given the others gets 0. Where ``gram`` is singular (identical sources) the
    risk is unique but its minimiser may not be: the split between such sources is then one of the optimal ones, near
    the middle of their set, and not specified further.

    Args:
        gram: A = Theta^T J Theta, shape [K, K], symmetric and positive semidefinite, a tensor or array of
            float32 or float64 (or integers); see :meth:`transferops.fisher.FisherInformation.gram`. Both
            properties are judged on the matrix scaled to unit diagonal, to 1e-8 (float32: K rounding errors
            if that is more); within that tolerance the matrix is symmetrised, and eigenvalues below K float64
            rounding errors, negative ones among them, are raised to those.
        target_samples: N0, at least 1.
        source_samples: N_i, shape [K], not negative.
        dimension: d, the number of trained parameters; positive. It may be fractional (an effective
            dimension, see :mod:`transferops.otqms.dimension`).
        mode: "quantity": how many samples of each source, all with equal weight. "weight": all samples of every
            source, with a weight for each source. "budget": samples that cost at most ``budget``, and their weights,
            chosen together.
        budget: with mode "budget", and only then: not negative; the largest number of source samples, or, if
            ``costs`` are given, their largest total cost.
        debias: subtract from ``gram`` what the errors of the estimated theta add to it, (d/N0) 1 1^T + diag(d/N_i),
            see :func:`transferops.otqms.semidefinite.debias`. Worth it for large d and near sources; for small d it
            can do slight harm.
        costs: with mode "budget": of one sample of each source (seconds, say), shape [K], positive. 1 by default.

    Returns:
        The optimum, see :class:`Allocation`. Its risk is that under the matrix in use, debiased if so asked.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        TypeError: an argument is not numeric.
        ImportError: the solver is not installed.
        RuntimeError: no allocation was found with a KKT residual of at most 1e-6 and a risk of at most that of the
            target alone; not known to happen.

    Example:
        >>> round(allocate([[0.2]], target_samples=10, source_samples=[100], dimension=2).total, 6)
        10.0
        >>> allocate([[0.2]], 10, [100], 2, mode="weight").sample_weights.round(6).tolist()
        [0.090909]
    """
    if mode not in MODES:
        fail("mode", " or ".join(repr(m) for m in MODES), describe(mode))
    root, available, target_samples, dimension = check_problem(gram, target_samples, source_samples, dimension)
    limit, prices = _check_budget(mode, budget, costs, available.size)
    usable = available > 0
    root = root[:, usable]
    if debias and usable.any():
        noise = dimension / available[usable]
        root = factor(without_noise(root.T @ root, dimension / target_samples, noise), 1e-8)
    # Dimensionless: ratios x_i = q_i/q_0 and m_i = n_i/N0, risks relative to d/(2 N0).
    scaled, capacity = root * np.sqrt(target_samples / dimension), available[usable] / target_samples
    ratios, taken, residual = np.zeros_like(available), np.zeros_like(available), 0.0
    if not usable.any() or limit == 0:
        pass
    elif mode == "quantity":
        found = solve(_pooled(scaled, capacity))
        ratios[usable], taken[usable], residual = found.ratios, found.ratios, found.residual
    elif prices[usable] @ available[usable] <= limit:
        found = solve(_weighted(scaled, capacity))
        ratios[usable], residual = found.ratios, found.residual
        taken[usable] = np.where(found.ratios > 0, capacity, 0.0)
    else:
        bought = solve_budget(Problem(scaled, capacity, prices[usable], limit / target_samples))
        ratios[usable], taken[usable], residual = bought.ratios, bought.samples, bought.residual

    if not residual <= _ACCEPTED_RESIDUAL:
        raise RuntimeError(
            f"allocate: expected a KKT residual of at most {_ACCEPTED_RESIDUAL:g}, got {residual:.3g}: "
            "please report the arguments"
        )
    exhausted = usable & (taken >= available / target_samples)
    quantities = np.where(exhausted, available, np.minimum(target_samples * taken, available))
    weights = np.divide(ratios, taken, out=np.zeros_like(ratios), where=taken > 0)
    masses = shares(ratios)
    bias = np.square(root @ masses[:-1][usable]).sum()
    spent = quantities > 0
    variance = masses[-1] ** 2 / target_samples + (masses[:-1][spent] ** 2 / quantities[spent]).sum()
    least, without = float(dimension * variance + bias) / 2, float(target_only_risk(target_samples, dimension))
    if not least <= without * (1 + _ACCEPTED_RESIDUAL):  # taking nothing is always feasible
        raise RuntimeError(
            f"allocate: expected a risk of at most {without:.6g}, that of the target alone, got {least:.6g}: "
            "please report the arguments"
        )
    return Allocation(
        mode=mode,
        quantities=quantities,
        sample_weights=weights,
        masses=masses[:-1],
        target_mass=float(masses[-1]),
        risk=least,
        target_only_risk=without,
        kkt_residual=residual,
        source_samples=available.copy(),
        costs=prices,
        budget=limit,
    )


def kkt_residual(
    quantities: ArrayLike,
    gram: ArrayLike,
    target_samples: float,
    source_samples: ArrayLike,
    dimension: float,
) -> float:
    """How far any given quantities are from the optimum of mode "quantity", as a dimensionless KKT residual [derived].

    The multipliers are formed from the quantities alone, see
    :func:`transferops.otqms.quadratic_program.residual_of`; those of :func:`allocate` are more accurate where sources
    nearly cancel. The residual bounds the excess of the risk over its minimum, relative to the risk.

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
    root, available, target_samples, dimension = check_problem(gram, target_samples, source_samples, dimension)
    quantities = check_array("quantities", quantities)
    if quantities.shape != available.shape:
        fail("quantities", f"shape {list(available.shape)}", f"shape {list(quantities.shape)}")
    program = _pooled(root * np.sqrt(target_samples / dimension), available / target_samples)
    ratios = quantities / target_samples
    return residual_of(program, ratios, 2 * (program.matrix @ shares(ratios)))


def _pooled(scaled: FloatArray, capacity: FloatArray) -> Program:
    """min |R w|^2 + u: the samples of the sources weigh what those of the target weigh."""
    return Program(np.pad(scaled, ((0, 0), (0, 1))), 1.0, capacity)


def _weighted(scaled: FloatArray, capacity: FloatArray) -> Program:
    """min |R q|^2 + sum_i q_i^2/c_i + q_0^2."""
    rows, sources = scaled.shape
    matrix = np.zeros((rows + sources + 1, sources + 1))
    matrix[:rows, :-1] = scaled
    matrix[rows:] = np.diag(np.append(1 / np.sqrt(capacity), 1.0))
    return Program(matrix, 0.0, np.full(sources, np.inf))


def check_problem(
    gram: ArrayLike, target_samples: float, source_samples: ArrayLike, dimension: float
) -> tuple[FloatArray, FloatArray, float, float]:
    """A factor R of gram = R^T R, and the other arguments as numbers."""
    target = check_array("target_samples", target_samples)
    if target.ndim or target < 1:
        fail("target_samples", "a number of at least 1", describe(target_samples))
    dim = check_array("dimension", dimension)
    if dim.ndim or dim <= 0:
        fail("dimension", "a positive number", describe(dimension))
    available = _check_sources("source_samples", source_samples)
    if available.min() < 0:
        i = int(available.argmin())
        fail("source_samples", "no negative numbers", f"{available[i]:g} for source {i}")
    matrix = check_array("gram", gram)
    if matrix.shape != (available.size, available.size):
        expected = f"shape [{available.size}, {available.size}], one row for each of source_samples"
        fail("gram", expected, f"shape {list(matrix.shape)}")
    epsilon = max(1e-8, available.size * storage_epsilon(gram))
    return factor(matrix, epsilon), available, float(target), float(dim)


def _check_budget(mode: str, budget: float | None, costs: ArrayLike | None, sources: int) -> tuple[float, FloatArray]:
    """What may be spent, infinite where nothing limits it, and the cost of a sample of each source."""
    if mode != "budget":
        for argument, value in (("budget", budget), ("costs", costs)):
            if value is not None:
                fail(argument, f"None with mode {mode!r}", describe(value))
        return np.inf, np.ones(sources)
    if budget is None:
        fail("budget", "a number with mode 'budget'", "None")
    limit = check_array("budget", budget)
    if limit.ndim or limit < 0:
        fail("budget", "a number that is not negative", describe(budget))
    prices = np.ones(sources) if costs is None else _check_sources("costs", costs)
    if prices.size != sources:
        fail("costs", f"shape [{sources}], one for each of source_samples", f"shape {list(prices.shape)}")
    if prices.min() <= 0:
        i = int(prices.argmin())
        fail("costs", "positive numbers", f"{prices[i]:g} for source {i}")
    return float(limit), prices.copy()


def _check_sources(argument: str, value: ArrayLike) -> FloatArray:
    array = check_array(argument, value)
    if array.ndim != 1 or array.size == 0:
        fail(argument, "one number for each source, shape [K]", f"shape {list(array.shape)}")
    return array

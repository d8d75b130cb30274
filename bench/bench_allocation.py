"""The allocation against what a user would write instead, and its certificates on adversarial problems.

Peers: the paper's grid over the total with a quadratic program at each of 50 points (Clarabel too), SciPy's SLSQP on
the risk itself with its gradient, and, for weights, quadprog on the equivalent non-negative program.

Floor: the K^3 / 3 operations of one Cholesky factorisation, at this machine's measured float32 matrix-product rate: a
solver of such programs makes 10 to 30 of them, in float64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import quadprog
from harness import compare, sgemm_rate
from numpy.typing import NDArray
from scipy.optimize import minimize

from transferops.otqms.allocation import allocate
from transferops.otqms.paper_grid import paper_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from allocation_problems import Problem, adversarial_problem, budget_of, random_problem

FloatArray = NDArray[np.float64]
INSTANCES = 1000


def many_sources(sources: int) -> Problem:
    """A singular Gram matrix of rank K/2 and from 1 to 100 000 samples."""
    rng = np.random.default_rng(0)
    differences = rng.standard_normal((sources // 2, sources)) / 10
    return Problem(differences.T @ differences, 100, np.round(10 ** rng.uniform(0, 5, sources)), 1000)


def slsqp(problem: Problem) -> float:
    """The relative risk that SciPy finds, over n/N0."""
    gram = problem.gram.astype(float) * problem.target_samples / problem.dimension
    capacity = problem.source_samples / problem.target_samples

    def value(ratios: FloatArray) -> tuple[float, FloatArray]:
        unused = 1 / (1 + ratios.sum())
        image = gram @ ratios
        bias = ratios @ image
        return unused + unused**2 * bias, 2 * unused**2 * image - unused**2 - 2 * unused**3 * bias

    start = np.minimum(capacity, 1.0)
    bounds = [(0, c) for c in capacity]
    options = {"maxiter": 500, "ftol": 1e-12}
    with np.errstate(all="ignore"):
        return float(minimize(value, start, jac=True, bounds=bounds, method="SLSQP", options=options).fun)


def reference_weights(problem: Problem) -> FloatArray:
    hessian = problem.gram * problem.target_samples / problem.dimension
    hessian = hessian + np.diag(problem.target_samples / problem.source_samples)
    sources = len(hessian)
    return np.asarray(quadprog.solve_qp(hessian, np.ones(sources), np.eye(sources), np.zeros(sources))[0])


@pytest.mark.parametrize("sources", [5, 50, 400])
def test_quantities(benchmark: object, sources: int) -> None:
    problem = many_sources(sources)
    solution, grid = allocate(*problem), paper_grid(*problem)
    peers = {"the paper's grid, 50 points": lambda: paper_grid(*problem)}
    if sources <= 50:
        peers["SciPy SLSQP"] = lambda: slsqp(problem)
    compare(
        benchmark,
        lambda: allocate(*problem),
        peers,
        floor=sources**3 / 3 / sgemm_rate(),
        sizes={"K": sources},
        values={
            "KKT residual": solution.kkt_residual,
            "relative risk": solution.relative_risk,
            "of the grid": grid.risk / solution.target_only_risk,
        },
    )


@pytest.mark.parametrize("sources", [50, 400])
def test_weights(benchmark: object, sources: int) -> None:
    problem = many_sources(sources)
    solution, x = allocate(*problem, "weight"), reference_weights(problem)
    compare(
        benchmark,
        lambda: allocate(*problem, "weight"),
        {"quadprog": lambda: reference_weights(problem)},
        floor=sources**3 / 3 / sgemm_rate(),
        sizes={"K": sources},
        values={
            "KKT residual": solution.kkt_residual,
            "risk over quadprog's, less 1": solution.relative_risk * (1 + x.sum()) - 1,
        },
    )


@pytest.mark.parametrize("mode", ["quantity", "weight", "budget"])
def test_two_thousand_sources(benchmark: object, mode: str) -> None:
    problem = many_sources(2000)
    budget = problem.source_samples.sum() / 20 if mode == "budget" else None
    solution = allocate(*problem, mode, budget)
    compare(
        benchmark,
        lambda: allocate(*problem, mode, budget),
        {"eigenvalues of the Gram matrix": lambda: np.linalg.eigh(problem.gram)},
        floor=2000**3 / 3 / sgemm_rate(),
        sizes={"K": 2000},
        values={"KKT residual": solution.kkt_residual, "relative risk": solution.relative_risk},
        slow=2.0,
    )


@pytest.mark.parametrize("mode", ["quantity", "weight", "budget"])
def test_adversarial(benchmark: object, mode: str) -> None:
    """Singular, nearly singular, N_i = 0, K = 1, identical and cancelling sources, N0 t from 1e-6 to 1e6, any units."""
    problems = [make(seed) for seed in range(INSTANCES // 2) for make in (random_problem, adversarial_problem)]
    extras = [budget_of(problem, seed) if mode == "budget" else {} for seed, problem in enumerate(problems)]
    solutions = [allocate(*problem, mode, **extra) for problem, extra in zip(problems, extras)]
    residuals = np.array([solution.kkt_residual for solution in solutions])
    values = {"largest KKT residual": float(residuals.max()), "above 1e-8": int((residuals > 1e-8).sum())}
    if mode == "quantity":
        peers = np.array([slsqp(problem) for problem in problems])
        ours = np.array([solution.relative_risk for solution in solutions])
        values["SLSQP worse by 1e-6"] = int((peers > ours * (1 + 1e-6)).sum())
        grids = np.array([paper_grid(*problem, points=20).risk for problem in problems])
        values["risk over the grid's, at most"] = float((ours * [s.target_only_risk for s in solutions] / grids).max())
    some = list(zip(problems, extras))[:100]
    compare(
        benchmark,
        lambda: [allocate(*problem, mode, **extra) for problem, extra in some],
        {"SciPy SLSQP (quantities)": lambda: [slsqp(problem) for problem, _ in some]},
        floor=sum(problem.source_samples.size**3 for problem, _ in some) / 3 / sgemm_rate(),
        sizes={"problems": len(some), "certified": INSTANCES},
        values=values,
    )

"""The allocation: optimality certified, and against search, the paper's grid and random points."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import quadprog
import torch
from allocation_problems import FloatArray, Problem, adversarial_problem, budget_of, random_problem

from transferops.otqms import allocation, quadratic_program, semidefinite
from transferops.otqms.allocation import Allocation, allocate, kkt_residual
from transferops.otqms.paper_grid import paper_grid
from transferops.otqms.quadratic_program import Solution, entering
from transferops.otqms.rounding import largest_remainder
from transferops.otqms.theory import optimal_quantity, risk, weighted_risk


@pytest.mark.parametrize("mode", ["quantity", "weight", "budget"])
@pytest.mark.parametrize("make", [random_problem, adversarial_problem])
def test_random_problems_are_solved_to_their_certificate(make: Callable[[int], Problem], mode: str) -> None:
    for seed in range(100):
        problem = make(seed)
        extra = budget_of(problem, seed) if mode == "budget" else {}
        solution = allocate(*problem, mode, **extra)
        assert solution.kkt_residual <= 1e-8, seed
        n, q = solution.quantities, solution.masses
        assert np.all((n >= 0) & (n <= problem.source_samples)), seed
        assert np.all(q >= 0), seed
        assert solution.target_mass > 0, seed
        assert q.sum() + solution.target_mass == pytest.approx(1, rel=1e-12)
        np.testing.assert_allclose(
            solution.sample_weights * n * solution.target_mass / problem.target_samples, q, rtol=1e-9
        )
        assert np.all((n > 0) == (q > 0)), seed
        assert solution.risk <= solution.target_only_risk * (1 + 1e-12), seed
        assert (solution.costs * n).sum() <= solution.budget * (1 + 1e-12), seed
        # The terms of the quadratic form may cancel to far below their size: gram has no more digits than this.
        gram = problem.gram.astype(float)
        digits = np.finfo(problem.gram.dtype).eps * len(gram) * (q @ np.abs(gram) @ q)
        expected = weighted_risk(q, gram, problem.target_samples, n, problem.dimension)
        assert abs(solution.risk - expected) <= 4 * digits + 1e-9 * solution.risk, seed
        if mode == "quantity":
            np.testing.assert_allclose(q, n / (problem.target_samples + n.sum()), rtol=1e-12)
            assert abs(solution.risk - risk(n, gram, problem.target_samples, problem.dimension)) <= (
                4 * digits + 1e-9 * solution.risk
            )


def test_bounds_that_rounding_leads_round_in_a_circle() -> None:
    """Twenty sources that cancel, a budget far below what any has: with AVX2 the active-set steps never ended."""
    problem = adversarial_problem(257)
    assert allocate(*problem, "budget", **budget_of(problem, 515)).kkt_residual <= 1e-8


def test_the_source_that_leaves_its_bound() -> None:
    empty, full, seen = np.array([True, True, False]), np.zeros(3, dtype=bool), set[bytes]()
    wrong = np.array([1.0, 2.0, 0.0])
    assert entering(wrong, empty, full, seen) == 1
    assert entering(wrong, empty, full, seen) == 0  # Bland's rule, the state being known
    assert entering(wrong, ~empty, full, seen) == 1


@pytest.mark.parametrize("seed", range(60))
def test_no_feasible_point_is_better(seed: int) -> None:
    problem = random_problem(seed, spread=2)
    solution = allocate(*problem)
    rng = np.random.default_rng(seed)
    fractions = rng.random((500, problem.source_samples.size)) ** rng.choice([1, 4, 20], (500, 1))
    points = np.concatenate([fractions * problem.source_samples, solution.quantities * (1 + 1e-3 * fractions)])
    points = np.minimum(points, problem.source_samples)
    risks = risk(points, problem.gram, problem.target_samples, problem.dimension)
    assert solution.risk <= risks.min() * (1 + 1e-9)


def reference_grid(problem: Problem, totals: FloatArray) -> float:
    """The paper's algorithm: for each s, min alpha^T A alpha, sum alpha = 1, 0 <= alpha_i <= N_i/s."""
    gram, available = problem.gram, problem.source_samples
    sources = available.size
    ridge = 1e-9 * np.trace(gram) + 1e-300  # quadprog needs a definite matrix
    scale = np.trace(gram) / sources
    constraints = np.hstack([np.ones((sources, 1)), np.eye(sources), -np.eye(sources)])
    best = float(risk(np.zeros(sources), gram, problem.target_samples, problem.dimension))
    for total in totals:
        bounds = np.concatenate([[1.0], np.zeros(sources), -available / total])
        alpha = quadprog.solve_qp((gram + ridge * np.eye(sources)) / scale, np.zeros(sources), constraints, bounds, 1)[
            0
        ]
        quantities = np.clip(alpha * total, 0, available)
        best = min(best, float(risk(quantities, gram, problem.target_samples, problem.dimension)))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_never_worse_than_the_papers_grid_and_equal_on_its_point(seed: int) -> None:
    problem = random_problem(seed, spread=1, sources=5)
    problem = problem._replace(source_samples=np.maximum(problem.source_samples, 1))
    solution = allocate(*problem)
    largest = problem.source_samples.sum() * (1 - 1e-9)
    totals = np.geomspace(largest / 1e4, largest, 20)
    grid = paper_grid(*problem, totals=totals)
    assert grid.risk == pytest.approx(reference_grid(problem, totals), rel=1e-6)
    assert solution.risk <= grid.risk * (1 + 1e-9)
    if solution.total > 0:
        at_optimum = paper_grid(*problem, totals=[min(solution.total, largest)])
        assert at_optimum.risk == pytest.approx(solution.risk, rel=1e-6)
        np.testing.assert_allclose(at_optimum.quantities.sum(), at_optimum.totals[-1], rtol=1e-6)


@pytest.mark.parametrize("seed", range(60))
def test_never_worse_than_the_papers_grid_on_adversarial_problems(seed: int) -> None:
    problem = adversarial_problem(seed)
    solution, grid = allocate(*problem), paper_grid(*problem, points=5)
    assert solution.risk <= grid.risk * (1 + 1e-9)
    assert grid.risk == grid.risks.min() <= grid.risks[0] == pytest.approx(solution.target_only_risk, rel=1e-12)


def test_grid_refuses_totals_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"^totals: expected values from 0 to sum N_i = 10, got 1 to 11$"):
        paper_grid(*GOOD, totals=[1, 11])


@pytest.mark.parametrize("scaled_discrepancy", [0, 1e-6, 0.3, 0.5, 0.501, 0.7, 1, 10, 1e3, 1e6])
@pytest.mark.parametrize("source_samples", [1, 40, 10_000])
def test_one_source_is_the_papers_optimum(scaled_discrepancy: float, source_samples: int) -> None:
    target_samples, dimension = 25, 130
    discrepancy = scaled_discrepancy / target_samples
    solution = allocate([[discrepancy * dimension]], target_samples, [source_samples], dimension)
    expected = optimal_quantity(discrepancy, target_samples, source_samples)
    np.testing.assert_allclose(solution.quantities, [expected], rtol=1e-7)
    assert solution.kkt_residual <= 1e-10


def test_nothing_to_take() -> None:
    solution = allocate(np.eye(3), 10, np.zeros(3), 5)
    assert solution.total == 0
    assert solution.risk == solution.target_only_risk == 0.25
    assert solution.kkt_residual == 0


def test_sources_like_the_target_are_taken_whole() -> None:
    solution = allocate(np.zeros((3, 3)), 10, [5, 0, 1e6], 8)
    assert solution.quantities.tolist() == [5, 0, 1e6]
    assert solution.kkt_residual <= 1e-12


def test_opposite_sources_are_balanced() -> None:
    solution = allocate([[1.0, -1.0], [-1.0, 1.0]], 10, [100, 1000], 1)
    assert solution.quantities[0] == 100
    alone = allocate([[1.0]], 10, [100], 1)
    assert solution.risk < alone.risk / 5
    assert solution.quantities[1] > 10 * alone.total


@pytest.mark.parametrize(("mode", "budget"), [("quantity", None), ("weight", None), ("budget", 150)])
@pytest.mark.parametrize("exponent", [6, 12, 18, 24, 40])
@pytest.mark.parametrize("seed", range(4))
def test_far_sources_that_cancel(seed: int, exponent: int, mode: str, budget: float | None) -> None:
    """Of a Gram matrix far below full rank, and at last far beyond the digits to which sources can cancel."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((1 + seed % 2, 5)) * 10 ** rng.uniform(-seed, seed, 5) * 10 ** (exponent / 2)
    solution = allocate(root.T @ root, 10, [1, 50, 1e6, 0, 1e12], 3, mode, budget)
    assert solution.kkt_residual <= 1e-6
    assert solution.relative_risk <= 1 + 1e-12
    if mode == "weight":
        assert solution.risk <= allocate(root.T @ root, 10, [1, 50, 1e6, 0, 1e12], 3).risk * (1 + 1e-9)


def test_identical_sources_count_as_one() -> None:
    one = allocate([[0.3]], 10, [400], 2)
    several = allocate(np.full((4, 4), 0.3), 10, [100] * 4, 2)
    assert several.total == pytest.approx(one.total, rel=1e-7)
    assert several.risk == pytest.approx(one.risk, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_order_of_sources_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences = rng.standard_normal((30, 12)) / 4
    problem = Problem(differences.T @ differences, 7, np.round(10 ** rng.uniform(0, 3, 12)), 11)
    order = rng.permutation(12)
    solution = allocate(*problem)
    permuted = allocate(problem.gram[np.ix_(order, order)], 7, problem.source_samples[order], 11)
    np.testing.assert_allclose(permuted.quantities, solution.quantities[order], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_units_do_not_matter(factor: float) -> None:
    rng = np.random.default_rng(3)
    differences = rng.standard_normal((30, 12)) / 4
    problem = Problem(differences.T @ differences, 50, np.round(10 ** rng.uniform(0, 4, 12)), 11)
    solution = allocate(*problem)
    scaled = allocate(problem.gram * factor, 50, problem.source_samples, 11 * factor)
    np.testing.assert_allclose(scaled.quantities, solution.quantities, rtol=1e-7, atol=1e-9)
    assert scaled.risk == pytest.approx(solution.risk * factor, rel=1e-10)
    larger = allocate(problem.gram / 7, 350, problem.source_samples * 7, 11)
    np.testing.assert_allclose(larger.quantities, solution.quantities * 7, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sources", [200, 680])
@pytest.mark.parametrize(("mode", "budget"), [("quantity", None), ("weight", None), ("budget", 5000)])
def test_many_sources(mode: str, budget: float | None, sources: int) -> None:
    rng = np.random.default_rng(0)
    differences = rng.standard_normal((sources // 2, sources)) / 10
    available = np.round(10 ** rng.uniform(0, 5, sources))
    solution = allocate(differences.T @ differences, 100, available, 1000, mode, budget)
    assert solution.kkt_residual <= 1e-10
    assert 0 < (solution.quantities == 0).sum() < sources


@pytest.mark.parametrize(("mode", "budget"), [("quantity", None), ("weight", None), ("budget", 5000)])
def test_shortcuts_with_many_sources_change_nothing(
    mode: str, budget: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A singular matrix, and more free sources than the shortcuts are for, here from fewer on."""
    rng, sources, many = np.random.default_rng(1), 136, 80
    differences = rng.standard_normal((sources // 2, sources)) / 10
    problem = differences.T @ differences, 100, np.round(10 ** rng.uniform(0, 5, sources)), 1000

    def solve(many: int) -> Allocation:
        for module in (semidefinite, quadratic_program):
            monkeypatch.setattr(module, "MANY", many)
        return allocate(*problem, mode, budget)

    short, long = solve(many), solve(sources + 1)
    assert short.kkt_residual <= 1e-10
    assert short.risk == pytest.approx(long.risk, rel=1e-9)
    np.testing.assert_allclose(short.masses, long.masses, atol=1e-8)
    if mode == "weight":
        assert (short.masses > 0).sum() >= many


@pytest.mark.parametrize(("mode", "budget"), [("quantity", None), ("weight", None), ("budget", 7)])
@pytest.mark.parametrize("units", [1e-300, 1e-150, 1e150, 1e300])
def test_extreme_units(mode: str, budget: float | None, units: float) -> None:
    gram = np.array([[2.0, 1.0], [1.0, 3.0]])
    usual = allocate(gram, 10, [50, 60], 3, mode, budget)
    same = allocate(gram * units, 10, [50, 60], 3 * units, mode, budget)
    np.testing.assert_allclose(same.quantities, usual.quantities, rtol=1e-9)
    np.testing.assert_allclose(same.sample_weights, usual.sample_weights, rtol=1e-9)
    alone = allocate(gram * units, 10, [50, 60], 3, mode, budget)
    assert alone.kkt_residual <= 1e-10
    assert alone.relative_risk <= 1 + 1e-12
    np.testing.assert_allclose(allocate(np.zeros((2, 2)), 1, [1e18, 1e12], 3).quantities, [1e18, 1e12], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_takes_tensors(dtype: torch.dtype) -> None:
    differences = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = (differences.T @ differences).to(dtype).requires_grad_()  # singular, in float32 slightly indefinite
    solution = allocate(gram, 20, torch.arange(8), 5)
    reference = allocate((differences.T @ differences).numpy(), 20, range(8), 5)
    assert solution.risk == pytest.approx(reference.risk, rel=1e-10 if dtype is torch.float64 else 1e-5)


def test_slightly_indefinite_is_projected() -> None:
    gram = np.array([[1.0, 1.0], [1.0, 1.0 - 1e-9]])
    assert np.linalg.eigvalsh(gram)[0] < -1e-10
    assert allocate(gram, 10, [50, 50], 3).kkt_residual <= 1e-9


def test_residual_tells_how_far_from_optimal() -> None:
    problem = random_problem(5, spread=1, sources=6)
    best = allocate(*problem)
    rng = np.random.default_rng(0)
    for fraction in rng.random((200, 6)):
        quantities = fraction * problem.source_samples
        value = float(risk(quantities, problem.gram, problem.target_samples, problem.dimension))
        residual = kkt_residual(quantities, *problem)
        assert residual >= (value - best.risk) / value - 1e-12
        assert residual > 1e-3
    assert max(kkt_residual(best.quantities, *problem), best.kkt_residual) < 1e-14
    assert kkt_residual(problem.source_samples * 2, *problem) > 1e-2
    assert kkt_residual(-best.quantities / 10, *problem) > 1e-2


def test_poor_solution_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "solve", lambda program: Solution(np.zeros(1), np.zeros(1), 0.9))
    message = r"^allocate: expected a KKT residual of at most 1e-06, got 0\.9: "
    with pytest.raises(RuntimeError, match=message):
        allocate([[0.0]], 10, [100], 1)


def test_solver_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clarabel", None)
    with pytest.raises(ImportError, match=r"^allocate: expected the solver Clarabel, got none; run `pip install"):
        allocate([[1.0]], 10, [100], 1)


GOOD = Problem(np.eye(2), 10, np.array([5.0, 5.0]), 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_samples": 0}, ValueError, "target_samples: expected a number of at least 1, got 0"),
        (
            {"target_samples": [3, 4]},
            ValueError,
            "target_samples: expected a number of at least 1, got list",
        ),
        ({"dimension": 0.0}, ValueError, "dimension: expected a positive number, got 0.0"),
        ({"dimension": np.inf}, ValueError, "dimension: expected finite numbers, got inf"),
        (
            {"source_samples": [5, -1]},
            ValueError,
            "source_samples: expected no negative numbers, got -1 for source 1",
        ),
        (
            {"source_samples": [5, np.nan]},
            ValueError,
            "source_samples: expected finite numbers, got nan at index [1]",
        ),
        (
            {"source_samples": 5},
            ValueError,
            "source_samples: expected one number for each source, shape [K], got shape []",
        ),
        (
            {"source_samples": []},
            ValueError,
            "source_samples: expected one number for each source, shape [K], got shape [0]",
        ),
        (
            {"gram": np.eye(3)},
            ValueError,
            "gram: expected shape [2, 2], one row for each of source_samples, got shape [3, 3]",
        ),
        (
            {"gram": [[1.0, np.nan], [0.0, 1.0]]},
            ValueError,
            "gram: expected finite numbers, got nan at index [0, 1]",
        ),
        (
            {"gram": [[1.0, 0.5], [0.2, 1.0]]},
            ValueError,
            "gram: expected a symmetric matrix, got 0.5 at [0, 1] and 0.2 at [1, 0]",
        ),
        (
            {"gram": [[4.0, 10.0], [10.0, 4.0]]},
            ValueError,
            "gram: expected a positive semidefinite matrix, got a smallest eigenvalue of -6 (-1.5 at unit diagonal)",
        ),
        (
            {"gram": torch.eye(2, dtype=torch.bfloat16)},
            ValueError,
            "gram: expected float32 or float64, half precision being too coarse to allocate by, got bfloat16",
        ),
        (
            {"gram": torch.eye(2, dtype=torch.complex64)},
            TypeError,
            "gram: expected real numbers, got a complex64 tensor of shape [2, 2] on cpu",
        ),
        (
            {"gram": "near"},
            TypeError,
            "gram: expected a number or an array of real numbers, got 'near'",
        ),
        (
            {"mode": "weights"},
            ValueError,
            "mode: expected 'quantity' or 'weight' or 'budget', got 'weights'",
        ),
        ({"mode": "budget"}, ValueError, "budget: expected a number with mode 'budget', got None"),
        (
            {"mode": "budget", "budget": -1},
            ValueError,
            "budget: expected a number that is not negative, got -1",
        ),
        ({"mode": "weight", "budget": 3}, ValueError, "budget: expected None with mode 'weight', got 3"),
        ({"costs": [1, 1]}, ValueError, "costs: expected None with mode 'quantity', got list"),
        (
            {"mode": "budget", "budget": 3, "costs": [1, 0]},
            ValueError,
            "costs: expected positive numbers, got 0 for source 1",
        ),
        (
            {"mode": "budget", "budget": 3, "costs": [1]},
            ValueError,
            "costs: expected shape [2], one for each of source_samples, got shape [1]",
        ),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        allocate(**{**GOOD._asdict(), **change})
    assert str(caught.value) == message


def test_residual_refuses_another_number_of_quantities() -> None:
    with pytest.raises(ValueError, match=r"^quantities: expected shape \[2\], got shape \[3\]$"):
        kkt_residual([1, 2, 3], *GOOD)


def test_allocation_is_frozen() -> None:
    solution = allocate(*GOOD)
    with pytest.raises(FrozenInstanceError):
        solution.risk = 0.0


@pytest.mark.parametrize(
    ("quantities", "source_samples", "expected"),
    [
        ([1.5, 1.5], [9, 9], [2, 1]),
        ([0.4, 0.3, 0.3], [9, 9, 9], [1, 0, 0]),
        ([0.2, 0.2], [9, 9], [0, 0]),
        ([2.9999999999, 0.3], [9, 9], [3, 0]),
        ([7.0, 0.0], [7, 9], [7, 0]),
        ([2.5, 0.25], [2.5, 9], [2, 1]),
        ([2.5], [2.5], [2]),
    ],
)
def test_rounding(quantities: list[float], source_samples: list[float], expected: list[int]) -> None:
    ones = np.ones(len(quantities))
    assert largest_remainder(np.array(quantities), np.array(source_samples), ones).tolist() == expected


@pytest.mark.parametrize(
    ("quantities", "costs", "budget", "expected"),
    [
        ([1.5, 1.5], [1, 1], 3, [2, 1]),
        ([1.5, 1.5], [1, 1], 3.5, [2, 1]),
        ([1.9, 1.2], [5, 1], 10.7, [1, 2]),
        ([0.9, 0.5], [2, 1], 2.3, [1, 0]),
        ([2.0, 3.0], [1, 1], 5, [2, 3]),
    ],
)
def test_rounding_under_a_budget(
    quantities: list[float], costs: list[float], budget: float, expected: list[int]
) -> None:
    whole = largest_remainder(np.array(quantities), np.full(2, 9.0), np.array(costs, dtype=float), budget)
    assert whole.tolist() == expected


@pytest.mark.parametrize("seed", range(100))
def test_rounding_keeps_bounds_and_total(seed: int) -> None:
    """In every mode; total or budget, whichever binds."""
    problem = random_problem(seed, spread=2)
    assert allocate(*problem, "weight").rounded().tolist() == allocate(*problem, "weight").quantities.tolist()
    bought = allocate(*problem, "budget", **budget_of(problem, seed))
    whole = bought.rounded()
    assert np.all((whole >= 0) & (whole <= bought.source_samples))
    assert np.all(np.abs(whole - bought.quantities) < 1)
    assert (bought.costs * whole).sum() <= bought.budget * (1 + 1e-11)
    solution = allocate(*random_problem(seed, spread=2))
    rounded = solution.rounded()
    assert rounded.dtype == np.int64
    assert np.all((rounded >= 0) & (rounded <= solution.source_samples))
    assert np.all(np.abs(rounded - solution.quantities) < 1)
    assert abs(rounded.sum() - solution.total) <= 0.5 + 1e-6 * max(1, solution.total)
    problem = random_problem(seed, spread=2)
    loss = risk(rounded, problem.gram, problem.target_samples, problem.dimension) / solution.risk - 1
    assert loss >= -1e-9

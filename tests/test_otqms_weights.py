"""Weights, budgets and debiasing: against a reference solver, other purchases, and simulation."""

from __future__ import annotations

import re

import numpy as np
import pytest
import quadprog
from allocation_problems import budget_of, random_problem

from transferops.otqms.allocation import allocate
from transferops.otqms.semidefinite import debias, pull, shrink
from transferops.otqms.theory import optimal_weight, single_source_weighted_risk


@pytest.mark.parametrize("seed", range(40))
def test_weights_are_the_optimum_of_the_reference(seed: int) -> None:
    """With x = q/q_0: min x^T (B + diag(1/c)) x / 2 - 1^T x over x >= 0, and the relative risk is q_0."""
    problem = random_problem(seed, spread=2, sources=8)
    problem = problem._replace(source_samples=np.maximum(problem.source_samples, 1))
    hessian = problem.gram * problem.target_samples / problem.dimension
    hessian += np.diag(problem.target_samples / problem.source_samples)
    x = quadprog.solve_qp(hessian, np.ones(8), np.eye(8), np.zeros(8))[0]
    solution = allocate(*problem, "weight")
    assert solution.relative_risk == pytest.approx(1 / (1 + x.sum()), rel=1e-9)
    assert solution.target_mass == pytest.approx(solution.relative_risk, rel=1e-9)
    np.testing.assert_allclose(solution.masses / solution.target_mass, x, rtol=1e-6, atol=1e-9 * x.max())


@pytest.mark.parametrize("scaled_discrepancy", [0, 1e-6, 0.3, 1, 10, 1e6])
@pytest.mark.parametrize("source_samples", [1, 40, 10_000])
def test_weight_of_one_source(scaled_discrepancy: float, source_samples: int) -> None:
    target_samples, dimension = 25, 130
    t = scaled_discrepancy / target_samples
    solution = allocate([[t * dimension]], target_samples, [source_samples], dimension, "weight")
    np.testing.assert_allclose(solution.sample_weights, [optimal_weight(source_samples, t)], rtol=1e-9)
    expected = single_source_weighted_risk(source_samples, t, target_samples, dimension)
    assert solution.risk == pytest.approx(float(expected), rel=1e-12)
    budget = allocate([[t * dimension]], target_samples, [source_samples], dimension, "budget", budget=17)
    np.testing.assert_allclose(budget.quantities, [min(17, source_samples)], rtol=1e-12)
    expected = single_source_weighted_risk(min(17, source_samples), t, target_samples, dimension)
    assert budget.risk == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_weights_and_budgets_are_ordered(seed: int) -> None:
    """Weights on everything beat quantities; a larger budget never hurts, all of it is as good as no limit."""
    problem = random_problem(seed, spread=3)
    quantities, weights = allocate(*problem), allocate(*problem, "weight")
    assert weights.risk <= quantities.risk * (1 + 1e-9)
    everything = problem.source_samples.sum()
    risks = [allocate(*problem, "budget", budget=b).risk for b in (0, quantities.total, everything / 2, everything)]
    assert risks[0] == pytest.approx(quantities.target_only_risk, rel=1e-12)
    assert risks[1] <= quantities.risk * (1 + 1e-9)
    assert risks[2] <= risks[0] * (1 + 1e-12)
    assert risks[3] == pytest.approx(weights.risk, rel=1e-9)
    # What is bought is worth what is said: weights on exactly those samples have the same risk.
    bought = allocate(*problem, "budget", budget=everything / 2)
    again = allocate(problem.gram, problem.target_samples, bought.quantities, problem.dimension, "weight")
    assert again.risk == pytest.approx(bought.risk, rel=1e-8)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_purchase_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(seed, spread=1, sources=3)
    extra = budget_of(problem, seed)
    solution = allocate(*problem, "budget", **extra)
    costs = solution.costs
    for _ in range(30):
        n = rng.random(3) * problem.source_samples
        n *= min(1.0, solution.budget / max((costs * n).sum(), 1e-300))
        other = allocate(problem.gram, problem.target_samples, n, problem.dimension, "weight")
        assert solution.risk <= other.risk * (1 + 1e-9)


def test_cheap_sources_are_preferred() -> None:
    problem = (0.05 * np.eye(2), 10, [1000, 1000], 5, "budget")
    even = allocate(*problem, budget=100)
    assert even.quantities[0] == pytest.approx(even.quantities[1], rel=1e-9)
    cheap = allocate(*problem, budget=100, costs=[1, 4])
    assert cheap.quantities[0] > 1.9 * cheap.quantities[1]
    assert (cheap.costs * cheap.quantities).sum() == pytest.approx(100, rel=1e-12)
    same = allocate(*problem, budget=700, costs=[7, 28])
    np.testing.assert_allclose(same.quantities, cheap.quantities, rtol=1e-9)


@pytest.mark.parametrize("mode", ["weight", "budget"])
def test_sources_like_the_target_weigh_the_same(mode: str) -> None:
    solution = allocate(np.zeros((3, 3)), 10, [5, 0, 1000], 8, mode, 50 if mode == "budget" else None)
    np.testing.assert_allclose(solution.sample_weights, [1, 0, 1], rtol=1e-9)
    assert solution.total == pytest.approx(50 if mode == "budget" else 1005, rel=1e-12)


def test_debias_subtracts_the_noise_of_the_estimates() -> None:
    """In the mean over estimates; what remains positive semidefinite is not touched by the projection."""
    rng = np.random.default_rng(0)
    d, target_samples, source_samples = 30, 20, np.array([15.0, 60.0])
    differences = 3 * rng.standard_normal((d, 2))
    target = rng.standard_normal((2000, d, 1)) / np.sqrt(target_samples)
    sources = rng.standard_normal((2000, d, 2)) / np.sqrt(source_samples)
    estimated = differences + sources - target
    grams = np.einsum("rdi,rdj->rij", estimated, estimated)
    cleaned = np.stack([debias(g, d / target_samples, d / source_samples) for g in grams])
    expected = differences.T @ differences
    assert np.all(np.abs(grams.mean(0) - expected)[[0, 1, 0], [0, 1, 1]] > 1)
    assert np.all(np.abs(cleaned.mean(0) - expected) < 5 * cleaned.std(0) / np.sqrt(2000))
    inside = allocate(grams[0], target_samples, source_samples, d, "weight", debias=True)
    outside = allocate(cleaned[0], target_samples, source_samples, d, "weight")
    np.testing.assert_allclose(inside.masses, outside.masses, rtol=1e-9)


def realised_risk(d: int, sources: int, discrepancy: float, unbiased: bool, repetitions: int) -> float:
    """Of the weights by estimated differences, relative to the target alone: identity J, N0 = 10, N_i = 1000."""
    rng = np.random.default_rng(1)
    losses = []
    for _ in range(repetitions):
        differences = rng.standard_normal((d, sources))
        differences *= np.sqrt(discrepancy * d / 10) / np.linalg.norm(differences, axis=0)
        target = rng.standard_normal(d) / np.sqrt(10)
        estimates = differences + rng.standard_normal((d, sources)) / np.sqrt(1000)
        gram = (estimates - target[:, None]).T @ (estimates - target[:, None])
        solution = allocate(gram, 10, np.full(sources, 1000), d, "weight", debias=unbiased)
        error = solution.target_mass * target + estimates @ solution.masses
        losses.append(error @ error * 10 / d)
    return float(np.mean(losses))


def test_debiasing_pays_in_high_dimension_and_not_in_low() -> None:
    """A source like the target: the plug-in gives it half the mass (risk 1/4), debiased nearly all of it."""
    assert realised_risk(200, 1, 0.0, False, 40) == pytest.approx(0.25, abs=0.02)
    assert realised_risk(200, 1, 0.0, True, 40) < 0.04
    assert realised_risk(10, 3, 3.0, True, 200) > realised_risk(10, 3, 3.0, False, 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)), 1, [1, 1]), "gram: expected a square matrix, got shape [2, 3]"),
        ((np.eye(2), 1, [1]), "source_noise: expected shape [2], got shape [1]"),
        ((np.eye(2), -1, [1, 1]), "target_noise: expected no negative values, got -1"),
        ((np.eye(2), 1, [1, -2]), "source_noise: expected no negative values, got -2"),
        ((np.eye(2), [1, 1], [1, 1]), "target_noise: expected a number, got shape [2]"),
    ],
)
def test_debias_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        debias(*arguments)


@pytest.mark.parametrize("variance", [0.0, 0.1, 1e9])
def test_shrunk_matrix_is_that_of_the_shrunken_estimate(variance: float) -> None:
    rng = np.random.default_rng(3)
    differences, samples = rng.standard_normal((7, 4)), np.array([5.0, 0.0, 20.0, 75.0])
    mixture, taken = samples / 100, samples > 0
    gram, towards = differences.T @ differences, differences @ mixture
    apart = (differences - towards[:, None])[:, taken]  # of three sources, in two dimensions
    towards = apart @ np.linalg.pinv(apart) @ towards
    distance = float(np.square(towards).sum())
    kappa = min(1.0, 2 * variance / distance)
    assert pull(gram, samples, variance) == pytest.approx(kappa, rel=1e-12)
    moved = (differences - kappa * towards[:, None])[:, taken]
    expected = moved.T @ moved + (2 - kappa) * kappa * distance  # posterior and plug-in variance
    found = shrink(gram, samples, variance)
    np.testing.assert_allclose(found[np.ix_(taken, taken)], expected, rtol=1e-12, atol=1e-12)
    assert mixture @ found @ mixture == pytest.approx(mixture @ gram @ mixture, rel=1e-12)


def test_noise_beside_the_sources_is_no_reason_to_shrink() -> None:
    """At right angles to what tells the sources apart it makes all distances longer by as much."""
    gram = np.array([[0.1, 0.0], [0.0, 4.0]])
    assert pull(gram + 50, [500, 500], 0.01) == pytest.approx(pull(gram, [500, 500], 0.01), rel=1e-9)


def test_noise_alone_does_not_choose_the_sources() -> None:
    """A target in the middle of its sources, its estimate off by far more than they are apart, in the same directions:
    what is taken by the plug-in matrix is further from the target than all sources together.
    """
    rng, samples, noise = np.random.default_rng(0), np.full(6, 1000), 5.0
    distances: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(100):
        sources = rng.standard_normal((3, 6)) * np.sqrt(1 / 3)
        differences = sources - rng.standard_normal((3, 1)) * np.sqrt(noise / 3)
        gram = differences.T @ differences
        for shrunk, own in distances.items():
            found = allocate(shrink(gram, samples, noise / 3) if shrunk else gram, 10, samples, noise * 10)
            own.append(float(np.square(sources @ found.masses).sum()))
    assert np.mean(distances[True]) < np.mean(distances[False]) / 1.5


def test_a_clear_target_is_left_alone() -> None:
    gram = np.array([[0.1, 0.0], [0.0, 4.0]])
    before, after = (allocate(g, 100, [500, 500], 1) for g in (gram, shrink(gram, [500, 500], 0.01)))
    np.testing.assert_allclose(after.masses, before.masses, atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.eye(3), [1, 1], 1), "gram: expected shape [2, 2], one row per source, got shape [3, 3]"),
        ((np.eye(2), [0, 0], 1), "source_samples: expected shape [K], not all 0, got shape [2], sum 0"),
        ((np.eye(2), [1, 1], [1, 1]), "variance: expected a number, got shape [2]"),
    ],
)
def test_shrink_refuses(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        shrink(*arguments)

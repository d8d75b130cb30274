"""The risk formulas against simulation of the Gaussian model, the optimal quantity against search."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from transferops.otqms.theory import (
    effective_samples,
    optimal_quantity,
    optimal_weight,
    risk,
    single_source_risk,
    single_source_weighted_risk,
    target_only_risk,
    weighted_risk,
)


@pytest.mark.parametrize("quantities", [(0, 0, 0), (12, 0, 0), (5, 9, 30)])
def test_risk_is_the_mean_divergence_of_the_pooled_estimate(quantities: tuple[int, ...]) -> None:
    """Every x ~ N(theta_i, J^-1) is drawn; thetahat is their mean, e its error, KL = e^T J e / 2."""
    rng = np.random.default_rng(0)
    target_samples, dimension, repetitions = 8, 3, 20_000
    mixing = rng.standard_normal((dimension, dimension)) + 2 * np.eye(dimension)
    fisher = np.linalg.inv(mixing @ mixing.T)
    differences = 0.3 * rng.standard_normal((dimension, len(quantities)))

    total = mixing @ rng.standard_normal((repetitions, dimension, target_samples))
    pooled = total.sum(-1)
    for i, quantity in enumerate(quantities):
        samples = differences[:, [i]] + mixing @ rng.standard_normal((repetitions, dimension, quantity))
        pooled += samples.sum(-1)
    error = pooled / (target_samples + sum(quantities))
    divergence = np.einsum("ri,ij,rj->r", error, fisher, error) / 2

    expected = risk(quantities, differences.T @ fisher @ differences, target_samples, dimension)
    assert abs(divergence.mean() - expected) < 5 * divergence.std() / np.sqrt(repetitions)


@pytest.mark.parametrize("masses", [(0, 0, 0), (0.3, 0, 0.1), (0.1, 0.2, 0.7), (0.2, 0.5, 0.05)])
def test_weighted_risk_is_the_mean_divergence_of_the_weighted_estimate(masses: tuple[float, ...]) -> None:
    """Every x ~ N(theta_i, J^-1) is drawn; thetahat is sum_i q_i/n_i sum_j x_ij, e its error, KL = e^T J e / 2."""
    rng = np.random.default_rng(1)
    quantities, target_samples, dimension, repetitions = (4, 9, 2), 8, 3, 20_000
    mixing = rng.standard_normal((dimension, dimension)) + 2 * np.eye(dimension)
    fisher = np.linalg.inv(mixing @ mixing.T)
    differences = 0.3 * rng.standard_normal((dimension, len(quantities)))

    error = (1 - sum(masses)) * (mixing @ rng.standard_normal((repetitions, dimension, target_samples))).mean(-1)
    for i, (mass, quantity) in enumerate(zip(masses, quantities, strict=True)):
        samples = differences[:, [i]] + mixing @ rng.standard_normal((repetitions, dimension, quantity))
        error += mass * samples.mean(-1)
    divergence = np.einsum("ri,ij,rj->r", error, fisher, error) / 2

    gram = differences.T @ fisher @ differences
    expected = weighted_risk(masses, gram, target_samples, quantities, dimension)
    assert abs(divergence.mean() - expected) < 5 * divergence.std() / np.sqrt(repetitions)


def test_weighted_risk_of_equal_weights_is_that_of_the_pooled_samples() -> None:
    rng = np.random.default_rng(2)
    gram = np.cov(rng.standard_normal((4, 9)))
    quantities = rng.integers(0, 50, (6, 4)).astype(float)
    masses = quantities / (12 + quantities.sum(-1, keepdims=True))
    np.testing.assert_allclose(
        weighted_risk(masses, gram, 12, quantities, 5), risk(quantities, gram, 12, 5), rtol=1e-13
    )


@pytest.mark.parametrize("scaled_discrepancy", [0, 0.2, 1, 7, 1e4])
def test_optimal_weight_beats_every_other(scaled_discrepancy: float) -> None:
    target_samples, quantity, dimension = 30, 45, 11
    t = scaled_discrepancy / target_samples
    weight = np.append(optimal_weight(quantity, t), np.linspace(0, 1.5, 301))
    masses = weight * quantity / (target_samples + weight * quantity)
    values = weighted_risk(masses[:, None], [[t * dimension]], target_samples, [quantity], dimension)
    assert values[0] <= values.min() * (1 + 1e-14)
    assert values[0] == pytest.approx(float(single_source_weighted_risk(quantity, t, target_samples, dimension)))
    grid = single_source_weighted_risk(np.arange(500), t, target_samples, dimension)
    assert np.all(np.diff(grid) <= 0)
    assert np.all(grid <= single_source_risk(np.arange(500), t, target_samples, dimension) * (1 + 1e-14))


def test_effective_samples_inverts_the_target_risk() -> None:
    n, d = np.array([[3.0], [70.0]]), np.array([2.0, 9.0, 1000.0])
    np.testing.assert_allclose(effective_samples(target_only_risk(n, d), d), np.broadcast_to(n, (2, 3)), rtol=1e-15)


def test_risk_reduces_to_one_source_and_to_none() -> None:
    quantity = np.linspace(0, 500, 11)
    gram, target_samples, dimension = 0.7, 20, 4
    one = single_source_risk(quantity, gram / dimension, target_samples, dimension)
    np.testing.assert_allclose(risk(quantity[:, None], [[gram]], target_samples, dimension), one, rtol=1e-14)
    assert one[0] == target_only_risk(target_samples, dimension) == dimension / 40


def test_risk_is_the_published_form() -> None:
    rng = np.random.default_rng(1)
    gram = np.cov(rng.standard_normal((4, 9)))
    n, target_samples, d = np.array([3.0, 0.0, 40.0, 7.0]), 12, 5
    s = n.sum()
    t = (n / s) @ gram @ (n / s) / d
    published = d / 2 * (1 / (target_samples + s) + s**2 * t / (target_samples + s) ** 2)
    np.testing.assert_allclose(risk(n, gram, target_samples, d), published, rtol=1e-14)


def test_arguments_broadcast() -> None:
    quantities = np.arange(24.0).reshape(4, 2, 3)
    gram = np.diag([1.0, 2.0, 3.0])
    values = risk(quantities, gram, np.array([[10.0], [20.0], [30.0], [40.0]]), 7)
    assert values.shape == (4, 2)
    assert values[2, 1] == risk(quantities[2, 1], gram, 30, 7)
    assert single_source_risk(np.ones((3, 1)), np.ones(4), 5, 2).shape == (3, 4)
    assert optimal_quantity(np.ones((3, 1)), np.ones(4), 5).shape == (3, 4)


@pytest.mark.parametrize("scaled_discrepancy", [0, 1e-6, 0.25, 0.5, 0.50001, 0.6, 1, 3, 1e3, 1e6])
@pytest.mark.parametrize("source_samples", [0, 1, 50, 100_000])
def test_optimal_quantity_beats_every_integer(scaled_discrepancy: float, source_samples: int) -> None:
    target_samples, dimension = 30, 11
    discrepancy = scaled_discrepancy / target_samples
    best = optimal_quantity(discrepancy, target_samples, source_samples)
    assert 0 <= best <= source_samples
    grid = np.arange(source_samples + 1)
    values = single_source_risk(grid, discrepancy, target_samples, dimension)
    assert single_source_risk(best, discrepancy, target_samples, dimension) <= values.min() * (1 + 1e-14)
    assert abs(grid[values.argmin()] - best) <= max(1, 1e-6 * best)


def test_optimal_quantity_without_a_cap() -> None:
    assert optimal_quantity(0.5 / 10, 10) == np.inf
    assert optimal_quantity(1 / 10, 10) == 10
    assert optimal_quantity(0, 10, 17) == 17


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: target_only_risk(0, 1),
            ValueError,
            "target_samples: expected positive values, got a smallest value of 0",
        ),
        (
            lambda: target_only_risk(1, -2),
            ValueError,
            "dimension: expected positive values, got a smallest value of -2",
        ),
        (
            lambda: single_source_risk([1, -3], 1, 1, 1),
            ValueError,
            "quantity: expected no negative values, got a smallest value of -3",
        ),
        (
            lambda: single_source_risk(1, float("nan"), 1, 1),
            ValueError,
            "discrepancy: expected finite numbers, got nan",
        ),
        (
            lambda: risk(3, [[1]], 1, 1),
            ValueError,
            "quantities: expected an array of shape [..., K], got a single number",
        ),
        (
            lambda: risk([1, 2], [[1]], 1, 1),
            ValueError,
            "gram: expected shape [2, 2], one row per source, got shape [1, 1]",
        ),
        (
            lambda: risk([1], [[np.inf]], 1, 1),
            ValueError,
            "gram: expected finite numbers, got inf at index [0, 0]",
        ),
        (
            lambda: weighted_risk([0.6, 0.6], np.eye(2), 1, [1, 1], 1),
            ValueError,
            "masses: expected a sum of at most 1, got 1.2",
        ),
        (
            lambda: weighted_risk([0.5, 0.1], np.eye(2), 1, [1, 0], 1),
            ValueError,
            "masses: expected no mass on a source of which there are no samples, got some",
        ),
        (
            lambda: weighted_risk([0.5, 0.1], np.eye(2), 1, [1], 1),
            ValueError,
            "masses: expected an array of shape [..., K], one mass for each of quantities, got shapes [2] and [1]",
        ),
        (
            lambda: weighted_risk([0.5], np.eye(2), 1, [1], 1),
            ValueError,
            "gram: expected shape [1, 1], one row per source, got shape [2, 2]",
        ),
        (
            lambda: optimal_weight(-1, 1),
            ValueError,
            "quantity: expected no negative values, got a smallest value of -1",
        ),
        (
            lambda: optimal_quantity("far", 1),
            TypeError,
            "discrepancy: expected a number or an array of real numbers, got 'far'",
        ),
        (
            lambda: optimal_quantity(1, 1, np.nan),
            ValueError,
            "source_samples: expected numbers, got nan",
        ),
    ],
)
def test_refuses(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message

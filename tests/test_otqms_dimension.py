"""The effective dimension by each of its routes, in Gaussian models with more parameters than samples.

Linear regression with unit noise and fixed inputs X [N, D], D > N: J = X^T X / N is known and has rank N at most. The
truth moves from the initialisation, 0, by N(0, tau^2) in every direction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from transferops.otqms.dimension import (
    displacement_damping,
    distance_dimension,
    effective_dimension,
    evidence_damping,
    optimism_dimension,
    prior_damping,
    split_halves,
)
from transferops.otqms.semidefinite import project
from transferops.otqms.theory import target_only_risk

FloatArray = NDArray[np.float64]
SAMPLES, PARAMETERS, REPETITIONS = 30, 120, 4000


class Model(NamedTuple):
    """Everything in the coordinates of the eigenvectors of J that have information, REPETITIONS at once."""

    eigenvalues: FloatArray
    truth: FloatArray
    maximum_likelihood: FloatArray
    tau: float

    def ridge(self, damping: float) -> FloatArray:
        return self.maximum_likelihood * self.eigenvalues / (self.eigenvalues + damping)

    def risk(self, estimate: FloatArray) -> FloatArray:
        return np.asarray((self.eigenvalues * (estimate - self.truth) ** 2).sum(-1) / 2)


@pytest.fixture(scope="module", params=[0.02, 0.3, 5.0])
def model(request: pytest.FixtureRequest) -> Model:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((SAMPLES, PARAMETERS)) * np.geomspace(3, 0.01, PARAMETERS)
    inputs[-4:] = inputs[:4]  # repeated samples: rank 26
    eigenvalues = np.linalg.eigvalsh(inputs @ inputs.T / SAMPLES)[4:]
    truth = request.param * rng.standard_normal((REPETITIONS, len(eigenvalues)))
    noise = rng.standard_normal(truth.shape) / np.sqrt(SAMPLES * eigenvalues)
    return Model(eigenvalues, truth, truth + noise, request.param)


def within(values: FloatArray, expected: float) -> bool:
    """The mean is the expected one, by five standard errors."""
    return bool(abs(values.mean() - expected) <= 5 * values.std() / np.sqrt(len(values)))


def test_from_samples_or_from_parameters_it_is_the_same() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((SAMPLES, PARAMETERS)) / np.sqrt(SAMPLES)
    fisher = rows.T @ rows
    damping = np.array([0.01, 1.0])
    direct = [np.trace(fisher @ np.linalg.inv(fisher + x * np.eye(PARAMETERS))) for x in damping]
    np.testing.assert_allclose(effective_dimension(np.linalg.eigvalsh(rows @ rows.T), damping), direct, rtol=1e-9)
    spectrum = np.linalg.eigvalsh(fisher)  # its zeros are a little negative
    assert spectrum.min() < 0
    np.testing.assert_allclose(effective_dimension(spectrum, damping), direct, rtol=1e-9)


def test_the_risk_of_the_ridge_estimate_is_that_of_its_effective_dimension(model: Model) -> None:
    damping = float(prior_damping(SAMPLES, model.tau**2))
    expected = float(target_only_risk(SAMPLES, effective_dimension(model.eigenvalues, damping)))
    assert within(model.risk(model.ridge(damping)), expected)
    assert expected < target_only_risk(SAMPLES, len(model.eigenvalues))


def test_displacement_finds_the_damping(model: Model) -> None:
    """Exactly from the expected distance, the one thing it is derived from."""
    damping = float(prior_damping(SAMPLES, model.tau**2))
    squared = np.square(model.ridge(damping)).sum(-1)
    expected = model.tau**2 * float(effective_dimension(model.eigenvalues, damping))
    assert within(squared, expected)
    assert displacement_damping(model.eigenvalues, expected, SAMPLES) == pytest.approx(damping, rel=1e-9)


def test_evidence_finds_the_damping(model: Model) -> None:
    """From one model about, from many (the same spectrum repeated) closely."""
    damping = float(prior_damping(SAMPLES, model.tau**2))
    truth = float(effective_dimension(model.eigenvalues, damping))
    found = evidence_damping(np.tile(model.eigenvalues, 400), model.maximum_likelihood[:400].ravel(), SAMPLES)
    assert float(effective_dimension(model.eigenvalues, found)) == pytest.approx(truth, rel=0.1)
    single = [evidence_damping(model.eigenvalues, moved, SAMPLES) for moved in model.maximum_likelihood[:60]]
    dimensions = [0.0 if np.isinf(x) else float(effective_dimension(model.eigenvalues, x)) for x in single]
    assert abs(np.mean(dimensions) - truth) < 0.25 * truth + 1


def test_evidence_of_nothing_but_noise() -> None:
    assert evidence_damping([1.0, 2.0, 0.0], [0.01, 0.0, 5.0], 10) == np.inf


def test_evidence_is_at_its_maximum(model: Model) -> None:
    moved = model.maximum_likelihood[0]

    def minus_log_evidence(damping: float) -> float:
        variance = 1 / (SAMPLES * damping) + 1 / (SAMPLES * model.eigenvalues)
        return float((np.log(variance) + moved**2 / variance).sum())

    found = evidence_damping(model.eigenvalues, moved, SAMPLES)
    grid = [minus_log_evidence(x) for x in np.geomspace(1e-7, 1e7, 400)]
    if np.isfinite(found):
        assert minus_log_evidence(found) <= min(grid) + 1e-9


@pytest.mark.parametrize("damping", [1e-9, 0.03, 2.0])
def test_optimism_measures_it_for_any_ridge(model: Model, damping: float) -> None:
    """Losses on the labels trained on and on new labels at the same inputs, one coordinate for each eigenvector.

    Half the squared residuals: those outside the span of X have the same mean in both and are left out.
    """
    rng = np.random.default_rng(1)
    scale = np.sqrt(SAMPLES * model.eigenvalues)
    fitted = scale * model.ridge(damping)
    labels = scale * model.maximum_likelihood
    fresh = scale * model.truth + rng.standard_normal(fitted.shape)
    training = np.square(labels - fitted).sum(-1) / (2 * SAMPLES)
    validation = np.square(fresh - fitted).sum(-1) / (2 * SAMPLES)
    expected = float(effective_dimension(model.eigenvalues, damping))
    assert within(optimism_dimension(training, validation, SAMPLES), expected)


def test_distance_counts_the_variance(model: Model) -> None:
    """All directions with information at maximum likelihood; mu^2/(mu + lambda)^2 of each for a ridge."""
    rng = np.random.default_rng(2)
    first, second = 30, 12
    errors = [rng.standard_normal(model.truth.shape) / np.sqrt(n * model.eigenvalues) for n in (first, second)]
    squared = (model.eigenvalues * (errors[0] - errors[1]) ** 2).sum(-1)
    assert within(distance_dimension(squared, first, second), len(model.eigenvalues))
    damping = 0.1
    shrunk = model.eigenvalues / (model.eigenvalues + damping)
    squared = (model.eigenvalues * (shrunk * (errors[0] - errors[1])) ** 2).sum(-1)
    assert within(distance_dimension(squared, first, second), float((shrunk**2).sum()))


def test_split_halves_measure_gram_and_noise() -> None:
    """Anisotropic, rank-deficient J, noise that is not maximum likelihood's, estimates relative to any point."""
    rng = np.random.default_rng(3)
    tasks, parameters, repetitions = 3, 20, 4000
    eigenvalues = np.concatenate([np.geomspace(10, 0.01, 8), np.zeros(12)])
    spread = np.array([0.5, 0.1, 0.3])  # standard deviation of one half's estimate, by task
    theta = rng.standard_normal((tasks, parameters))
    halves = theta + spread[:, None] * rng.standard_normal((repetitions, 2, tasks, parameters))
    halves = halves.reshape(repetitions, 2 * tasks, parameters)
    grams = np.einsum("rap,p,rbp->rab", halves, eigenvalues, halves)
    results = [split_halves(gram) for gram in grams]
    differences = theta[1:] - theta[0]
    expected = (differences * eigenvalues) @ differences.T
    measured = np.stack([result.gram for result in results])
    for i, j in ((0, 0), (0, 1), (1, 1)):
        assert within(measured[:, i, j], expected[i, j])
    noise = spread**2 * eigenvalues.sum() / 2
    assert within(np.array([result.target_noise for result in results]), noise[0])
    assert within(np.array([result.source_noise[1] for result in results]), noise[2])
    shifted = halves[0] + rng.standard_normal(parameters)
    moved = split_halves((shifted * eigenvalues) @ shifted.T)
    np.testing.assert_allclose(moved.gram, results[0].gram, rtol=1e-9, atol=1e-9)
    assert np.linalg.eigvalsh(project(results[0].gram))[0] >= -1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: effective_dimension([[1.0]], 1),
            "eigenvalues: expected shape [M] with at least one above zero, got shape [1, 1]",
        ),
        (
            lambda: effective_dimension([0.0], 1),
            "eigenvalues: expected shape [M] with at least one above zero, got shape [1]",
        ),
        (
            lambda: effective_dimension([1.0], 0),
            "damping: expected positive values, got a smallest value of 0",
        ),
        (
            lambda: effective_dimension([1.0, -1.0], 1),
            "eigenvalues: expected no negative values, got a smallest value of -1",
        ),
        (
            lambda: displacement_damping([1.0], 0, 3),
            "squared_displacement: expected positive values, got a smallest value of 0",
        ),
        (
            lambda: displacement_damping([1.0], [1, 2], 3),
            "squared_displacement: expected a number, got shape [2]",
        ),
        (
            lambda: evidence_damping([1.0], [1.0, 2.0], 3),
            "movements: expected shape [1], one for each of eigenvalues, got shape [2]",
        ),
        (
            lambda: optimism_dimension(1.0, np.nan, 3),
            "validation_loss: expected finite numbers, got nan",
        ),
        (
            lambda: distance_dimension(1.0, 0, 3),
            "first_samples: expected positive values, got a smallest value of 0",
        ),
        (
            lambda: split_halves(np.eye(3)),
            "gram: expected shape [2 K + 2, 2 K + 2] with K of at least 1, got shape [3, 3]",
        ),
        (
            lambda: split_halves(np.eye(2)),
            "gram: expected shape [2 K + 2, 2 K + 2] with K of at least 1, got shape [2, 2]",
        ),
    ],
)
def test_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()

"""The H-score of combinations of several sources' features."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from transferops.scores import MultiSourceHScore, ScoreWarning, h_score, multi_source_h_score

CLASSES, DIM, SOURCES = 4, 5, 3


def problem(samples: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sources of different quality, each with a different part of the class structure, and a large mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    means = torch.randn(SOURCES, CLASSES, DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(SOURCES, samples, DIM, generator=generator, dtype=torch.float64)
    strength = torch.tensor([1.0, 0.8, 0.1]).double().reshape(-1, 1, 1)
    return noise + strength * means[:, labels] + 30, labels


def combine(features: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("k,knd->nd", weights.double(), features)


@pytest.mark.parametrize("weights", [[1.0, 0, 0], [0.2, 0.3, 0.5], [-1.0, 2.0, 0.5], [1e6, 1e6, 1.0]])
def test_any_combination_equals_the_score_of_combined_features(weights: list[float]) -> None:
    """Blocks of one Gram against the features added up sample by sample."""
    features, labels = problem()
    score = MultiSourceHScore(SOURCES)
    for rows in (slice(0, 70), slice(70, 200)):
        score.update(features[:, rows], labels[rows])
    w = torch.tensor(weights)
    assert float(score.evaluate(w)) == pytest.approx(h_score(combine(features, w), labels), rel=1e-9)
    other = MultiSourceHScore(SOURCES, objective="trace_ratio").update(list(features), labels)
    combined = combine(features, w)
    combined = combined - combined.mean(0)
    means = torch.stack([combined[labels == c].mean(0) for c in range(CLASSES)])[labels]
    want = means.square().sum() / combined.square().sum()
    assert float(other.evaluate(w)) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize("objective", ["h_score", "trace_ratio"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_gradient_in_the_weights(objective: str, shrinkage: float) -> None:
    features, labels = problem()
    score = MultiSourceHScore(SOURCES, objective=objective, shrinkage=shrinkage).update(features, labels)
    weights = torch.tensor([0.5, 0.3, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(score.evaluate, (weights,))
    # The objective does not change along the weights themselves.
    (gradient,) = torch.autograd.grad(score.evaluate(weights), weights)
    assert float(gradient @ weights.detach()) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("signed", [False, True])
def test_optimum_is_not_beaten_by_a_grid(signed: bool) -> None:
    features, labels = problem()
    score = MultiSourceHScore(SOURCES, signed=signed).update(features, labels)
    weights, value = score.optimum()
    assert float(weights.abs().sum()) == pytest.approx(1, rel=1e-12)
    assert signed or bool((weights >= 0).all())
    assert value == pytest.approx(h_score(combine(features, weights), labels), rel=1e-9)
    grid = torch.linspace(-1 if signed else 0, 1, 7).tolist()
    best = max(float(score.evaluate(torch.tensor(w))) for w in itertools.product(grid, repeat=3) if any(w))
    assert value >= best
    assert score.compute() == pytest.approx(value, rel=1e-12)
    assert multi_source_h_score(features, labels, signed=signed).value == pytest.approx(value, rel=1e-9)


def test_optimum_of_the_trace_ratio_is_a_generalised_eigenvector() -> None:
    """Without a sign constraint: the ratio of w^T B w and w^T T w [closed form]."""
    features, labels = problem()
    centred = features - features.mean(1, keepdim=True)
    means = torch.stack([centred[:, labels == c].mean(1) for c in range(CLASSES)], 1)[:, labels]
    total = torch.einsum("knd,lnd->kl", centred, centred)
    between = torch.einsum("knd,lnd->kl", means, means)
    want = torch.linalg.eigvals(torch.linalg.solve(total, between)).real.max()
    found = multi_source_h_score(features, labels, objective="trace_ratio", signed=True)
    assert found.value == pytest.approx(float(want), rel=1e-8)


def test_the_released_objective_is_another_one() -> None:
    """One loud feature without content ruins the trace ratio of the best source, and nothing of its H-score."""
    features, labels = problem()
    features[0, :, 0] = 100 * torch.randn(200, generator=torch.Generator().manual_seed(1)).double()
    score = MultiSourceHScore(SOURCES).update(features, labels)
    released = multi_source_h_score(features, labels, objective="trace_ratio").weights
    weights, value = score.optimum()
    assert weights.argmax() == 0
    assert released.argmax() == 1
    assert float(score.evaluate(released)) < value - 0.1


def test_one_useful_source_wins() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = problem()
    features[1:] = torch.randn(2, 200, DIM, generator=generator).double() * 1e-3  # noise beside signal
    assert multi_source_h_score(features, labels).value >= h_score(features[0], labels)
    single = MultiSourceHScore(1).update(features[:1], labels)
    assert single.compute() == pytest.approx(h_score(features[0], labels), rel=1e-9)
    assert single.optimum().weights.tolist() == [1]


def test_details_name_weights_and_single_sources() -> None:
    features, labels = problem()
    details = MultiSourceHScore(SOURCES).update(features, labels).details()
    for k in range(SOURCES):
        assert details.parts[f"source_{k}"] == pytest.approx(h_score(features[k], labels), rel=1e-9)
    assert (details.samples, details.classes, details.dimension) == (200, CLASSES, DIM)


def test_shrinkage_serves_fewer_samples_than_features() -> None:
    features, labels = problem(5)
    with pytest.raises(ValueError, match="features: expected combined features of full rank"):
        multi_source_h_score(features[:, :4], labels[:4])
    score = MultiSourceHScore(SOURCES, shrinkage=0.5).update(features, labels)
    x = combine(features, torch.tensor([0.2, 0.3, 0.5]))
    x = x - x.mean(0)
    covariance = x.mT @ x / 5
    means = torch.stack([x[labels == label].mean(0) for label in labels.tolist()])
    shrunk = 0.5 * covariance + 0.5 * covariance.trace() / DIM * torch.eye(DIM).double()
    want = 0.5 * torch.trace(torch.linalg.solve(shrunk, means.mT @ means / 5))
    assert float(score.evaluate(torch.tensor([0.2, 0.3, 0.5]))) == pytest.approx(float(want), rel=1e-6)


def test_one_class_is_zero_with_a_warning() -> None:
    features, labels = problem()
    with pytest.warns(ScoreWarning, match="all samples are of one class"):
        assert MultiSourceHScore(SOURCES).update(features, labels * 0).compute() == 0

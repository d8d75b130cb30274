"""Inputs on which published implementations of transferability scores give a wrong number: one test per trap.

Where a wrong value is known, the test shows that the peers' formula gives it and that ours does not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from transferops.scores import HScore, Knn, ScoreWarning, h_score, leep, log_me, n_leep, nce, trans_rate


def problem(samples: int, dim: int, classes: int, *, signal: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    means = signal * torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return torch.randn(samples, dim, generator=generator, dtype=torch.float64) + means[labels], labels


def quiet(call: Callable[..., float], *arguments: Any, **options: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*arguments, **options)


def peer_h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """tllib's: covariance in the features' dtype, pseudo-inverse with rcond 1e-15."""
    means = np.zeros_like(features)
    for label in np.unique(labels):
        means[labels == label] = features[labels == label].mean(0)
    covariance = np.cov(features, rowvar=False, dtype=features.dtype)
    between = np.cov(means, rowvar=False, dtype=features.dtype)
    return float(np.trace(np.linalg.pinv(covariance, rcond=1e-15) @ between))


# H-score


def test_h_score_of_dependent_float32_features_stays_within_its_bound() -> None:
    """A float32 covariance with rcond=1e-15 keeps rounding as directions: negative values, and values in the thousands
    where 10 directions cannot score more than 10."""
    features, labels = problem(600, 10, 47, signal=2.0)
    mix = torch.randn(10, 60, generator=torch.Generator().manual_seed(1)).double()
    want = reference.projection_h_score(features, labels)
    peers = []
    for offset in (0, 30, 1000):
        wide = (features @ mix + offset).float()
        peers.append(peer_h_score(wide.numpy(), labels.numpy()))
        with pytest.warns(ScoreWarning, match="50 of 60 directions lie below the rounding level"):
            value = h_score(wide, labels)
        assert value == pytest.approx(want, rel=1e-3)
    assert any(not 0 <= peer <= 46 for peer in peers)


def test_h_score_with_mean_a_thousand_times_the_deviation() -> None:
    """One-pass uncentred float32 moments lose it."""
    features, labels = problem(2000, 16, 14, signal=3.0)
    features = (features / features.std(0) + 1000).float()
    x = features
    gram, mean = x.mT @ x / len(x), x.mean(0)
    centred = (gram - torch.outer(mean, mean)).double()
    sums = torch.zeros(14, 16).index_add_(0, labels, x)
    counts = torch.bincount(labels)
    means = (sums / counts.unsqueeze(1) - mean).double()
    peer = float(torch.trace(torch.linalg.pinv(centred) @ (means.mT * counts / len(x)) @ means))
    want = reference.projection_h_score(features, labels)
    assert abs(peer - want) > 0.3 * want
    assert quiet(h_score, features, labels) == pytest.approx(want, rel=1e-6)


def test_h_score_with_fewer_samples_than_features_carries_no_information() -> None:
    features, labels = problem(30, 50, 4)
    noise = torch.randn(30, 50, generator=torch.Generator().manual_seed(2)).double()
    for values in (features, noise):
        with pytest.warns(ScoreWarning, match="says nothing; use regularized=True"):
            assert h_score(values, labels) == pytest.approx(3, rel=1e-9)
    assert quiet(h_score, features, labels, regularized=True) > 2 * quiet(h_score, noise, labels, regularized=True)


def test_h_score_shrunk_all_the_way_says_so() -> None:
    features = torch.tensor([[1.5410, -0.2934], [-2.1788, 0.5684], [-1.0845, -1.3986]])
    score = HScore(regularized=True).update(features / features.std(0), torch.tensor([0, 1, 1]))
    details = score.details()
    assert (details.value, details.shrinkage) == (0, 1)
    assert "the score is 0 for any labels" in details.warnings[0]


def test_chance_level_grows_with_the_dimension() -> None:
    """Wider noise scores higher; corrected for chance it does not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 10
    narrow, wide = (torch.randn(400, dim, generator=generator).double() for dim in (10, 200))
    assert quiet(h_score, wide, labels) > 5 * quiet(h_score, narrow, labels)
    for values in (narrow, wide):
        level = HScore().update(values, labels).details().chance_level
        assert quiet(h_score, values, labels) == pytest.approx(level, rel=0.35)
        assert abs(quiet(h_score, values, labels, chance_corrected=True)) < 0.6


@pytest.mark.parametrize("absent", [True, False])
def test_labels_that_skip_classes(absent: bool) -> None:
    """max(labels) + 1 classes would divide by empty ones."""
    features, labels = problem(90, 6, 3)
    skipping = torch.tensor([2, 7, 1000])[labels] if absent else labels - 5
    for score in (h_score, log_me, trans_rate):
        assert quiet(score, features, skipping) == pytest.approx(quiet(score, features, labels), rel=1e-10)


# LogME


def peer_log_me(features: np.ndarray, labels: np.ndarray) -> float:
    """The released fixed-point iteration: (D - r)/2 ln alpha stays for r < D, 1e-5 is added to squared norms."""
    samples, dim = features.shape
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    square, total = s**2, []
    for label in np.unique(labels):
        y = (labels == label).astype(float)
        x2 = (u.T @ y) ** 2
        rest = (y**2).sum() - x2.sum()
        alpha = beta = 1.0
        for _ in range(11):
            t = alpha / beta
            gamma = (square / (square + t)).sum()
            m2 = (square * x2 / (t + square) ** 2).sum()
            res2 = (x2 / (1 + square / t) ** 2).sum() + rest
            alpha, beta = gamma / (m2 + 1e-5), (samples - gamma) / (res2 + 1e-5)
            if abs(alpha / beta - t) / t <= 1e-3:
                break
        total.append(
            dim / 2 * math.log(alpha)
            + samples / 2 * math.log(beta)
            - 0.5 * np.log(alpha + beta * square).sum()
            - beta / 2 * res2
            - alpha / 2 * m2
            - samples / 2 * math.log(2 * math.pi)
        )
    return float(np.mean(total) / samples)


def test_log_me_with_fewer_samples_than_features() -> None:
    """Features that are zero change nothing in the model. The peers' value grows with their number: they drop
    the determinant of the directions without features, (D - r)/2 ln alpha."""
    features, labels = problem(30, 20, 3, signal=0.3)
    padded = torch.cat([features, torch.zeros(30, 480, dtype=torch.float64)], 1)
    want = quiet(log_me, features, labels)
    assert quiet(log_me, padded, labels) == pytest.approx(want, rel=1e-10)
    array, integers = padded.numpy(), labels.numpy()
    assert peer_log_me(features.numpy(), integers) == pytest.approx(want, rel=1e-2)
    assert abs(peer_log_me(array, integers) - want) > 5


def test_log_me_of_small_features() -> None:
    """1e-5 beside squared norms makes the peers' value depend on the scale of the features."""
    features, labels = problem(100, 8, 3)
    want = quiet(log_me, features, labels)
    assert peer_log_me(features.numpy(), labels.numpy()) == pytest.approx(want, rel=1e-3)
    assert quiet(log_me, features * 1e4, labels) == pytest.approx(want, rel=1e-10)
    assert peer_log_me(features.numpy() * 1e4, labels.numpy()) != pytest.approx(want, rel=1e-3)


def test_log_me_does_not_depend_on_the_order_of_classes() -> None:
    """Precisions carried over from class to class, as in transformer-ranker, would make it so."""
    features, labels = problem(60, 50, 4, signal=0.5)
    renamed = torch.tensor([2, 0, 3, 1])[labels]
    assert quiet(log_me, features, renamed) == pytest.approx(quiet(log_me, features, labels), rel=1e-12)


# TransRate


def test_trans_rate_weights_classes_by_size() -> None:
    """tllib averages the classes' rates; the definition is the conditional rate, weighted by their frequency."""
    features, labels = problem(200, 5, 2)
    features[labels == 1] *= 0.05
    labels[:180:2][:80] = 1  # 20 against 180
    centred = features - features.mean(0)
    eps = 1e-4 * float(centred.square().mean())

    def rate(rows: Tensor) -> float:
        return 0.5 * float(torch.logdet(torch.eye(5).double() + rows.mT @ rows / (len(rows) * eps)))

    parts = [centred[labels == c] for c in (0, 1)]
    want = rate(centred) - sum(len(rows) / 200 * rate(rows) for rows in parts)
    peer = rate(centred) - sum(rate(rows) for rows in parts) / 2
    assert quiet(trans_rate, features, labels) == pytest.approx(want, rel=1e-9)
    assert abs(peer - want) > 0.1 * abs(want)


def test_trans_rate_of_scaled_features() -> None:
    """eps = 1e-4 whatever the scale: small features lose their rate to it."""
    features, labels = problem(100, 5, 3)
    assert quiet(trans_rate, features * 1e-4, labels) == pytest.approx(quiet(trans_rate, features, labels), rel=1e-9)
    published = quiet(trans_rate, features * 1e-4, labels, relative=False)
    assert published < 1e-2 * quiet(trans_rate, features, labels, relative=False)


def test_knn_of_samples_in_one_place() -> None:
    """Nothing is nearer than anything else; the value then only says how the samples lie in the array."""
    assert "in one place" in Knn().update(torch.ones(6, 3), torch.arange(6) % 2).details().warnings[0]


# LEEP and kin


def test_leep_with_a_source_class_of_no_mass() -> None:
    """0 / 0 in the conditional: NaN in the plain formula."""
    theta = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0])
    joint = torch.stack([theta[labels == c].sum(0) for c in (0, 1)])
    assert bool(((joint / joint.sum(0)) @ theta.mT).isnan().any())
    assert quiet(leep, theta, labels) == pytest.approx(quiet(leep, theta[:, :2], labels), rel=1e-12)


def test_leep_takes_the_logarithm() -> None:
    """SFDA's comparison averages the expected prediction itself: in [0, 1], and not LEEP."""
    theta = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1])
    joint = torch.stack([theta[labels == c].sum(0) for c in (0, 1)])
    expected = ((joint / joint.sum(0))[labels] * theta).sum(1)
    assert quiet(leep, theta, labels) == pytest.approx(float(expected.log().mean()), rel=1e-12)
    assert float(expected.mean()) > 0 > quiet(leep, theta, labels)
    pytest.importorskip("sklearn")
    features, classes = problem(80, 4, 2)
    assert n_leep(features, classes, components_per_class=2) < 0


def test_leep_counts_float32_rows_by_the_million() -> None:
    """One class of many rows: a float32 running sum of its mass would stop growing."""
    theta = torch.full((100_000, 2), 0.5)
    theta[0] = torch.tensor([1.0, 0.0])
    labels = torch.zeros(100_000, dtype=torch.long)
    labels[::2] = 1
    want = float(theta.double().log()[1, 0])  # both classes equally likely given either source class, but for a row
    assert quiet(leep, theta, labels) == pytest.approx(want, rel=1e-5)


def test_nce_of_identical_labels_is_zero_and_of_independent_ones_the_entropy() -> None:
    labels = torch.arange(120) % 4
    assert quiet(nce, labels * 7, labels) == 0
    assert quiet(nce, torch.arange(120) // 4 % 5, labels) == pytest.approx(-math.log(4), rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 2.0**20, 2.0**40])
def test_trans_rate_of_large_features_of_low_rank(scale: float) -> None:
    """1 + lambda / (N eps) with an identity below the rounding of the Gram matrix; singular values know better."""
    torch.manual_seed(0)
    whole = torch.randint(1, 9, (9, 1)) * torch.randint(1, 9, (1, 4))  # of rank 1 exactly, in any precision
    features, labels = whole.float() * scale, torch.arange(9) % 3
    centred = features.double() - features.double().mean(0)

    def rate(rows: torch.Tensor) -> torch.Tensor:
        return (torch.linalg.svdvals(rows)[:1].square() / (len(rows) * 1e-4)).log1p().sum() / 2

    within = sum(rate(centred[labels == c]) / 3 for c in range(3))
    found = quiet(trans_rate, features, labels, relative=False)
    assert found == pytest.approx(float(rate(centred) - within), rel=1e-6, abs=1e-5)

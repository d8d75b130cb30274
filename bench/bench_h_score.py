"""H-score and its regularised form against what a user would pick instead.

Peers: the published formula in NumPy as anyone would write it (pseudo-inverse of the covariance, covariance of the
class means repeated per sample, as in the papers' reference code and in tllib), its regularised form with
scikit-learn's Ledoit-Wolf covariance, and transformer-ranker 0.2.0, whose HScore is the regularised score.

Floor: the N D^2 operations of the symmetric product and the D^3 / 3 of a Cholesky factorisation (N and D exchanged for
N < D), at this machine's measured float32 matrix-product rate.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import compare, sgemm_rate
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from transformer_ranker.estimators import HScore as TransformerRankerHScore

from transferops.scores import h_score


def numpy_h_score(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    covariance = np.cov(features, rowvar=False)
    means = np.zeros_like(features)
    for label in np.unique(labels):
        means[labels == label] = features[labels == label].mean(axis=0)
    between = np.cov(means, rowvar=False)
    return float(np.trace(np.linalg.pinv(covariance, rcond=1e-15) @ between))


def numpy_regularized_h_score(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    features = features.astype(np.float64)
    features = features - features.mean(axis=0, keepdims=True)
    covariance, alpha = ledoit_wolf(features, assume_centered=True)
    means = np.zeros_like(features)
    for label in np.unique(labels):
        means[labels == label] = features[labels == label].mean(axis=0)
    between = np.cov(means, rowvar=False)
    return float(np.trace(np.linalg.pinv(covariance, rcond=1e-15) @ ((1 - alpha) * between)))


def problem(samples: int, dim: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=generator)
    means = torch.randn(classes, dim, generator=generator)
    return torch.randn(samples, dim, generator=generator) + 0.3 * means[labels], labels


@pytest.mark.parametrize("regularized", [False, True], ids=["plain", "regularized"])
def test_h_score(benchmark: object, regularized: bool) -> None:
    samples, dim, classes = 10_000, 1024, 100
    features, labels = problem(samples, dim, classes)
    array, integers = features.numpy(), labels.numpy()
    peers = {"transformer-ranker 0.2.0": lambda: TransformerRankerHScore().fit(features, labels)}
    if regularized:
        peers["NumPy + scikit-learn"] = lambda: numpy_regularized_h_score(array, integers)
        reference = numpy_regularized_h_score(array, integers)
    else:
        peers["NumPy"] = lambda: numpy_h_score(array, integers)
        reference = numpy_h_score(array.astype(np.float64), integers)
    value = h_score(features, labels, regularized)
    compare(
        benchmark,
        lambda: h_score(features, labels, regularized),
        peers,
        floor=(samples * dim**2 + dim**3 / 3) / sgemm_rate(),
        sizes={"N": samples, "D": dim, "C": classes},
        values={"score": value, "relative error to float64": abs(value / reference - 1)},
    )


def test_regularized_h_score_with_fewer_samples_than_features(benchmark: object) -> None:
    samples, dim, classes = 500, 4096, 50
    features, labels = problem(samples, dim, classes)
    value, theirs = h_score(features, labels, True), TransformerRankerHScore().fit(features, labels)
    compare(
        benchmark,
        lambda: h_score(features, labels, True),
        {"transformer-ranker 0.2.0": lambda: TransformerRankerHScore().fit(features, labels)},
        floor=(samples**2 * dim + samples**3 / 3) / sgemm_rate(),
        sizes={"N": samples, "D": dim, "C": classes},
        values={"score": value, "relative difference to transformer-ranker": abs(value / theirs - 1)},
    )

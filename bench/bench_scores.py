"""LogME, TransRate, LEEP and kNN against what a user would pick instead, and the moment scores together.

Peers: the published algorithms in NumPy as their papers and tllib state them (LogME by fixed-point iteration on a
truncated SVD, TransRate by a determinant per class, LEEP by products with one-hot labels), transformer-ranker 0.2.0 and
scikit-learn. TransRate is weighted by class sizes, as in its definition, which tllib's is not.

Floors: the operations that must be done at this machine's measured float32 matrix-product rate (LogME: N D^2 of the
Gram matrix and 9 D^3 of the eigendecomposition; TransRate: N D^2, D^3/3 and n_c^2 D of each class; kNN: half of
2 N^2 D), or for LEEP two reads of the probabilities at the measured rate of a sum.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from harness import compare, interleaved_minimum, sgemm_rate
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.neighbors import NearestNeighbors
from transformer_ranker.estimators import LogME as TransformerRankerLogME
from transformer_ranker.estimators import NearestNeighbors as TransformerRankerKnn

from transferops.scores import HScore, LogMe, TransRate, knn, leep, log_me, score_all, trans_rate

SAMPLES, DIM, CLASSES, SOURCE_CLASSES = 10_000, 1024, 100, 1000


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    means = torch.randn(CLASSES, DIM, generator=generator)
    return torch.randn(SAMPLES, DIM, generator=generator) + 0.3 * means[labels], labels


def numpy_log_me(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Alternating updates of alpha and beta per class, from the SVD by way of F^T F, as in the authors' code."""
    f = features.astype(np.float64)
    samples, dim = f.shape
    _, square, vh = np.linalg.svd(f.T @ f)
    u = f @ vh.T / np.sqrt(square)
    evidence = []
    for label in np.unique(labels):
        y = (labels == label).astype(np.float64)
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
        evidence.append(
            dim / 2 * math.log(alpha)
            + samples / 2 * math.log(beta)
            - 0.5 * np.log(alpha + beta * square).sum()
            - beta / 2 * res2
            - alpha / 2 * m2
            - samples / 2 * math.log(2 * math.pi)
        )
    return float(np.mean(evidence) / samples)


def exact_log_me(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The maximum of the evidence over ln(alpha / beta) by Brent's method, in float64."""
    u, s, _ = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    square, samples = s**2, len(labels)
    values = []
    for label in np.unique(labels):
        y = (labels == label).astype(np.float64)
        x2 = (u.T @ y) ** 2
        rest = y.sum() - x2.sum()

        def loss(log_ratio: float, x2: NDArray[np.float64] = x2, rest: float = rest) -> float:
            shrink = 1 / (1 + square / math.exp(log_ratio))
            q = rest + (x2 * shrink).sum()
            return -0.5 * math.log(samples / q) - np.log(shrink).sum() / (2 * samples)

        best = minimize_scalar(loss, bracket=(0.0, 8.0), tol=1e-12).fun
        values.append(-best - 0.5 - 0.5 * math.log(2 * math.pi))
    return float(np.mean(values))


def numpy_trans_rate(features: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    z = features - features.mean(0, keepdims=True)
    eps = 1e-4 * float((z**2).mean())

    def rate(rows: NDArray[np.floating]) -> float:
        identity = np.eye(rows.shape[1], dtype=rows.dtype)
        return 0.5 * float(np.linalg.slogdet(identity + rows.T @ rows / (len(rows) * eps))[1])

    return rate(z) - sum(np.mean(labels == c) * rate(z[labels == c]) for c in np.unique(labels))


def numpy_leep(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    joint = np.zeros((labels.max() + 1, probabilities.shape[1]), probabilities.dtype)
    for label in range(len(joint)):
        joint[label] = probabilities[labels == label].sum(0) / len(labels)
    conditional = (joint / joint.sum(0)).T
    expected = probabilities @ conditional
    return float(np.log(expected[np.arange(len(labels)), labels]).mean())


def scikit_learn_knn(features: NDArray[np.float32], labels: NDArray[np.int64], neighbors: int) -> float:
    index = NearestNeighbors(n_neighbors=neighbors, algorithm="brute").fit(features)
    votes = labels[index.kneighbors(return_distance=False)]
    winner = [max(dict.fromkeys(row), key=row.count) for row in votes.tolist()]
    return float(np.mean(np.array(winner) == labels))


def test_log_me(benchmark: object) -> None:
    features, labels = problem()
    array, integers = features.numpy(), labels.numpy()
    value, exact = log_me(features, labels), exact_log_me(array, integers)
    compare(
        benchmark,
        lambda: log_me(features, labels),
        {
            "NumPy, published algorithm": lambda: numpy_log_me(array, integers),
            "transformer-ranker 0.2.0": lambda: TransformerRankerLogME().fit(features, labels),
        },
        floor=(SAMPLES * DIM**2 + 9 * DIM**3) / sgemm_rate(),
        sizes={"N": SAMPLES, "D": DIM, "C": CLASSES},
        values={
            "score": value,
            "relative error to float64": abs(value / exact - 1),
            "NumPy's relative error": abs(numpy_log_me(array, integers) / exact - 1),
        },
    )


def test_trans_rate(benchmark: object) -> None:
    features, labels = problem()
    array, integers = features.numpy(), labels.numpy()
    value, exact = trans_rate(features, labels), numpy_trans_rate(array.astype(np.float64), integers)
    sizes = torch.bincount(labels).double()
    compare(
        benchmark,
        lambda: trans_rate(features, labels),
        {"NumPy formula": lambda: numpy_trans_rate(array, integers)},
        floor=(SAMPLES * DIM**2 + DIM**3 / 3 + float(sizes.square().sum()) * DIM) / sgemm_rate(),
        sizes={"N": SAMPLES, "D": DIM, "C": CLASSES},
        values={"score": value, "relative error to float64": abs(value / exact - 1)},
    )


def test_leep(benchmark: object) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(SAMPLES, SOURCE_CLASSES, generator=generator)).softmax(1)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    array, integers = probabilities.numpy(), labels.numpy()
    value, exact = leep(probabilities, labels), numpy_leep(array.astype(np.float64), integers)
    compare(
        benchmark,
        lambda: leep(probabilities, labels),
        {"NumPy formula": lambda: numpy_leep(array, integers)},
        floor=(probabilities.sum, 2),
        sizes={"N": SAMPLES, "C_s": SOURCE_CLASSES, "C": CLASSES},
        values={"score": value, "relative error to float64": abs(value / exact - 1)},
    )


@pytest.mark.parametrize("neighbors", [1, 3])
def test_knn(benchmark: object, neighbors: int) -> None:
    features, labels = problem()
    array, integers = features.numpy(), labels.numpy()
    value = knn(features, labels, neighbors=neighbors, metric="euclidean")
    exact = knn(features.double(), labels, neighbors=neighbors, metric="euclidean")
    compare(
        benchmark,
        lambda: knn(features, labels, neighbors=neighbors, metric="euclidean"),
        {
            "transformer-ranker 0.2.0": lambda: TransformerRankerKnn(k=neighbors).fit(features, labels),
            "scikit-learn": lambda: scikit_learn_knn(array, integers, neighbors),
        },
        floor=SAMPLES**2 * DIM / sgemm_rate(),
        sizes={"N": SAMPLES, "D": DIM, "C": CLASSES, "k": neighbors},
        values={
            "score": value,
            "difference to float64": abs(value - exact),
            "scikit-learn": scikit_learn_knn(array, integers, neighbors),
        },
    )


def test_moment_scores_together(benchmark: object) -> None:
    features, labels = problem()
    scores = {
        "h_score": HScore(),
        "regularized h_score": HScore(regularized=True),
        "log_me": LogMe(),
        "trans_rate": TransRate(),
    }
    alone = {name: lambda name=name: score_all(features, labels, {name: scores[name]}) for name in scores}
    seconds = interleaved_minimum({"together": lambda: score_all(features, labels, scores), **alone})
    slowest = max(scores, key=lambda name: seconds[name])
    together = score_all(features, labels, scores)
    compare(
        benchmark,
        lambda: score_all(features, labels, scores),
        {"one after the other": lambda: [call() for call in alone.values()]},
        floor=(SAMPLES * DIM**2 + 9 * DIM**3) / sgemm_rate(),
        sizes={"N": SAMPLES, "D": DIM, "C": CLASSES},
        values={f"times the slowest alone ({slowest})": seconds["together"] / seconds[slowest], **together},
    )

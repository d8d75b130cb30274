"""LogME, TransRate, LEEP, NCE and kNN against float64 references written from the published formulas."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from transferops.scores import (
    Knn,
    Leep,
    LogMe,
    Nce,
    ScoreWarning,
    TransRate,
    knn,
    leep,
    log_me,
    nce,
    trans_rate,
)

CLASSES = 5


def problem(
    samples: int, dim: int, *, dtype: torch.dtype = torch.float64, signal: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    means = signal * torch.randn(CLASSES, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    return (noise + means[labels] + 0.5).to(dtype), labels


def quiet(call: Callable[..., float], *arguments: Any, **options: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*arguments, **options)


# LogME


def evidence(features: np.ndarray, target: np.ndarray, log_alpha: float, log_beta: float) -> float:
    """The evidence of You et al. (2021), with dense D x D algebra."""
    samples, dim = features.shape
    alpha, beta = math.exp(log_alpha), math.exp(log_beta)
    precision = alpha * np.eye(dim) + beta * features.T @ features
    mean = beta * np.linalg.solve(precision, features.T @ target)
    return float(
        dim / 2 * log_alpha
        + samples / 2 * log_beta
        - 0.5 * np.linalg.slogdet(precision).logabsdet
        - beta / 2 * np.square(features @ mean - target).sum()
        - alpha / 2 * np.square(mean).sum()
        - samples / 2 * math.log(2 * math.pi)
    )


def maximum_evidence(features: Tensor, target: Tensor) -> float:
    """By a general optimiser over (ln alpha, ln beta), from several starting points."""
    x, y = features.double().numpy(), target.double().numpy()
    best = -math.inf
    for start in (-6.0, -2.0, 2.0, 6.0):
        result = optimize.minimize(
            lambda p: -evidence(x, y, p[0], min(p[1], 20.0)),  # beyond, an exact fit leaves rounding only
            [start, 1.0],
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-10, "maxiter": 4000},
        )
        best = max(best, -result.fun)
    return best / len(x)


@pytest.mark.parametrize(("samples", "dim"), [(60, 8), (40, 39), (25, 40), (30, 30)])
def test_log_me_is_the_maximum_of_the_evidence(samples: int, dim: int) -> None:
    """N < D included, where the published code leaves (D - N)/2 ln alpha in."""
    features, labels = problem(samples, dim, signal=0.4)
    targets = torch.nn.functional.one_hot(labels, CLASSES).double()
    want = np.mean([maximum_evidence(features, targets[:, c]) for c in range(CLASSES)])
    assert quiet(log_me, features, labels) == pytest.approx(want, rel=1e-7)


def test_log_me_regression() -> None:
    for samples, dim in ((50, 6), (20, 30)):
        features, _ = problem(samples, dim)
        targets = features[:, :2] @ torch.tensor([[1.0, 0.2], [-2.0, 0.1]]).double()
        targets += torch.randn(samples, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        want = np.mean([maximum_evidence(features, targets[:, m]) for m in range(2)])
        assert quiet(log_me, features, targets) == pytest.approx(want, rel=1e-7)
        assert quiet(log_me, features, targets[:, 0]) == pytest.approx(
            maximum_evidence(features, targets[:, 0]), rel=1e-7
        )


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e6, 1e20])
@pytest.mark.parametrize(("samples", "dim"), [(60, 8), (25, 40)])
def test_log_me_does_not_depend_on_the_scale(samples: int, dim: int, scale: float) -> None:
    features, labels = problem(samples, dim)
    assert quiet(log_me, features * scale, labels) == pytest.approx(quiet(log_me, features, labels), rel=1e-10)


def test_log_me_without_signal_is_that_of_no_features() -> None:
    """Features that tell nothing: the best prior precision is infinite, the evidence that of the noise alone."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    features = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    features -= torch.stack([features[labels == c].mean(0) for c in (0, 1)])[labels]  # exactly no class signal
    want = -0.5 * math.log(2 * math.pi * 0.5) - 0.5  # |y|^2 / N = 1/2
    assert quiet(log_me, features, labels) == pytest.approx(want, rel=1e-9)


def test_log_me_orders_features_by_signal() -> None:
    values = [log_me(*problem(300, 20, signal=signal)) for signal in (0.0, 0.2, 0.5, 1.0, 2.0)]
    assert values == sorted(values)


def test_log_me_ignores_duplicated_features_up_to_scale() -> None:
    """Two copies of every feature are one set with twice the prior variance: the same maximum."""
    features, labels = problem(80, 10)
    assert log_me(torch.cat([features, features], 1), labels) == pytest.approx(log_me(features, labels), rel=1e-10)


def test_log_me_special_cases_warn() -> None:
    features, labels = problem(50, 4)
    with pytest.warns(ScoreWarning, match="log_me: all samples are of one class"):
        log_me(features, labels * 0)
    with pytest.warns(ScoreWarning, match="log_me: every feature is zero"):
        assert math.isfinite(log_me(features * 0, labels))


def test_log_me_of_an_exact_fit_warns() -> None:
    """The noise precision goes to infinity: the number is finite, and says so."""
    features, labels = problem(50, 4)
    exact = torch.cat([features, torch.nn.functional.one_hot(labels, CLASSES).double()], 1)
    with pytest.warns(ScoreWarning, match="log_me: the features fit 5 of 5 outputs exactly"):
        assert math.isfinite(log_me(exact, labels))
    noise = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert quiet(log_me, exact + 1e-4 * noise, labels) > 0


# TransRate


def coding_rate(features: Tensor, eps: float) -> float:
    samples, dim = features.shape
    identity = torch.eye(dim, dtype=torch.float64)
    return 0.5 * float(torch.linalg.slogdet(identity + features.mT @ features / (samples * eps)).logabsdet)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("samples", "dim"), [(100, 7), (40, 20), (12, 30)])
@pytest.mark.parametrize("relative", [False, True])
def test_trans_rate_equals_its_definition(samples: int, dim: int, relative: bool, dtype: torch.dtype) -> None:
    """Classes larger and smaller than D, and of different sizes."""
    features, labels = problem(samples, dim, dtype=dtype)
    labels[labels == 4] = 3
    centred = features.double() - features.double().mean(0)
    eps = 1e-4 * (float(centred.square().mean()) if relative else 1)
    want = coding_rate(centred, eps) - sum(
        float((labels == c).sum()) / samples * coding_rate(centred[labels == c], eps) for c in range(4)
    )
    assert quiet(trans_rate, features, labels, relative=relative) == pytest.approx(want, rel=1e-9)


def test_trans_rate_relative_form_is_scale_free() -> None:
    features, labels = problem(100, 7)
    assert trans_rate(features * 1e5, labels) == pytest.approx(trans_rate(features, labels), rel=1e-10)
    assert trans_rate(features * 1e-3, labels, relative=False) != pytest.approx(
        trans_rate(features, labels, relative=False), rel=1e-3
    )


def test_trans_rate_special_cases_are_zero_with_a_warning() -> None:
    features, labels = problem(30, 3)
    with pytest.warns(ScoreWarning, match="trans_rate: all samples are of one class"):
        assert trans_rate(features, labels * 0) == 0
    with pytest.warns(ScoreWarning, match="trans_rate: every feature is constant"):
        assert trans_rate(torch.ones(30, 3), labels) == 0


# LEEP and NCE


def probabilities(samples: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(samples, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        .softmax(1)
        .to(dtype)
    )


def leep_by_definition(theta: Tensor, labels: Tensor) -> float:
    joint = torch.stack([theta[labels == c].sum(0) for c in range(int(labels.max()) + 1)]) / len(labels)
    conditional = (joint / joint.sum(0)).nan_to_num()
    return float(torch.stack([(conditional[y] @ row).log() for row, y in zip(theta, labels)]).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 7, 300_000])
def test_leep_equals_its_definition(width: int, dtype: torch.dtype) -> None:
    theta, labels = probabilities(13, width, dtype), torch.arange(13) % 3
    error = 1e-6 if dtype == torch.float32 else 1e-9
    assert leep(theta, labels) == pytest.approx(leep_by_definition(theta.double(), labels), rel=error)


def test_leep_of_batches_of_different_dtypes() -> None:
    """Rows of bfloat16 sum to 1 within bfloat16, also beside rows of float32."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 300, generator=generator).softmax(1)
    labels = torch.randint(3, (40,), generator=generator)
    narrow = wide[:20].bfloat16()
    assert (narrow.float().sum(1) - 1).abs().max() > 3e-4
    score = Leep().update(narrow, labels[:20]).update(wide[20:], labels[20:])
    both = torch.cat([narrow.double(), wide[20:].double()])
    joint = torch.stack([both[labels == c].sum(0) for c in range(3)])
    want = float(((joint / joint.sum(0))[labels] * both).sum(1).log().mean())
    assert score.compute() == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match=r"^source_probabilities: expected rows that sum to 1, got a sum of"):
        leep(narrow.float(), labels[:20])


def test_leep_source_class_without_mass() -> None:
    theta = torch.cat([probabilities(20, 4), torch.zeros(20, 2, dtype=torch.float64)], 1)
    labels = torch.arange(20) % 3
    assert leep(theta, labels) == pytest.approx(leep(theta[:, :4], labels), rel=1e-12)


def test_leep_of_one_hot_rows_is_nce() -> None:
    source = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0])
    labels = torch.tensor([5, 5, 5, -1, -1, 5, 7, 7])
    assert leep(torch.nn.functional.one_hot(source).double(), labels) == pytest.approx(nce(source, labels), rel=1e-12)


def test_nce_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(4, (200,), generator=generator), torch.randint(3, (200,), generator=generator)
    joint = np.zeros((4, 3))
    np.add.at(joint, (source.numpy(), target.numpy()), 1 / 200)
    want = float((joint * np.log(joint / joint.sum(1, keepdims=True))).sum())
    assert nce(source, target) == pytest.approx(want, rel=1e-12)
    assert nce(source, source * 3 - 7) == 0


# kNN


def knn_by_definition(features: Tensor, labels: Tensor, neighbors: int, metric: str) -> float:
    correct = 0
    for i in range(len(features)):
        if metric == "cosine":
            distance = -torch.nn.functional.cosine_similarity(features, features[i : i + 1])
        else:
            distance = (features - features[i]).norm(dim=1)
        distance[i] = torch.inf
        nearest = [int(labels[j]) for j in distance.argsort()[:neighbors]]
        winner = max(dict.fromkeys(nearest), key=nearest.count)  # the first among equals is the nearest
        correct += winner == int(labels[i])
    return correct / len(features)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("neighbors", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_knn_equals_its_definition(neighbors: int, metric: str, dtype: torch.dtype) -> None:
    features, labels = problem(120, 6, dtype=dtype, signal=0.5)
    want = knn_by_definition(features.double(), labels, neighbors, metric)
    assert knn(features, labels, neighbors=neighbors, metric=metric) == want


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("neighbors", [1, 3, 40])
def test_knn_in_blocks(neighbors: int, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks, a last one of 24 samples, and groups of columns that are searched first."""
    module = importlib.import_module("transferops.scores.knn")  # which the function of this name hides
    monkeypatch.setattr(module, "_BLOCK", 32)
    monkeypatch.setattr(module, "_GROUP", 8)
    features, labels = problem(120, 6, dtype=torch.float64, signal=0.5)
    assert knn(features, labels, neighbors=neighbors, metric=metric) == knn_by_definition(
        features, labels, neighbors, metric
    )


def test_knn_euclidean_with_a_large_offset() -> None:
    features, labels = problem(100, 4, dtype=torch.float32, signal=1.0)
    moved = (features.double() + 1000).float()
    want = knn_by_definition(moved.double(), labels, 1, "euclidean")
    assert knn(moved, labels, metric="euclidean") == want


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("exponent", [-126, -70, 64, 120])
def test_knn_at_any_scale(exponent: int, metric: str) -> None:
    """Where squares are beyond the range of float32, on either side."""
    features, labels = problem(120, 6, dtype=torch.float32, signal=0.5)
    assert knn(features * 2.0**exponent, labels, metric=metric) == knn(features, labels, metric=metric)


# What all share


SCORES = {
    "log_me": (LogMe, log_me, lambda n: problem(n, 6)),
    "trans_rate": (TransRate, trans_rate, lambda n: problem(n, 6)),
    "leep": (Leep, leep, lambda n: (probabilities(n, 4), torch.arange(n) % 3)),
    "nce": (Nce, nce, lambda n: (torch.arange(n) % 4, torch.arange(n) // 3 % 3)),
    "knn": (Knn, knn, lambda n: problem(n, 6)),
}


@pytest.mark.parametrize("name", SCORES)
def test_streaming_and_merging_equal_one_pass(name: str) -> None:
    cls, function, make = SCORES[name]
    values, labels = make(70)
    want = function(values, labels)
    chunks = [(values[a:b], labels[a:b]) for a, b in ((0, 1), (1, 3), (3, 40), (40, 70))]
    streamed = cls()
    for chunk in chunks:
        streamed.update(*chunk)
    assert streamed.samples == 70
    assert streamed.compute() == pytest.approx(want, rel=1e-10)
    merged = cls().merge(cls().update(*chunks[3]).update(*chunks[0])).merge(cls().update(*chunks[2]))
    merged.merge(cls().update(*chunks[1]))
    assert merged.compute() == pytest.approx(want, rel=1e-10)
    streamed.reset()
    assert streamed.samples == 0
    assert cls.higher_is_better


@pytest.mark.parametrize("name", SCORES)
def test_labels_are_any_integers_and_arrays_are_taken(name: str) -> None:
    _, function, make = SCORES[name]
    values, labels = make(70)
    want = function(values, labels)
    renamed = torch.tensor([10**12, -4, 77, 0, 5])[labels]
    assert function(values, renamed) == pytest.approx(want, rel=1e-10)
    assert function(values.numpy(), labels.numpy().astype(np.int16)) == pytest.approx(want, rel=1e-10)


X = torch.arange(12.0).reshape(4, 3) ** 0.5
Y = torch.tensor([0, 1, 0, 1])
NAN = X.clone()
NAN[2, 1] = math.nan
P = torch.full((4, 2), 0.5)
BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "log_me nan, N > D": (
        lambda: log_me(NAN, Y),
        ValueError,
        "features: expected finite values, got nan at position [2, 1]",
    ),
    "log_me nan, N < D": (
        lambda: log_me(NAN.mT, Y[:3]),
        ValueError,
        "features: expected finite values, got nan at position [1, 2]",
    ),
    "log_me nan target": (
        lambda: log_me(X, torch.tensor([0.0, math.nan, 1.0, 2.0])),
        ValueError,
        "labels: expected finite values, got nan at position [1, 0]",
    ),
    "log_me 3-d target": (
        lambda: log_me(X, torch.zeros(4, 1, 1)),
        ValueError,
        "labels: expected shape [N] or [N, M], got a float32 tensor of shape [4, 1, 1] on cpu",
    ),
    "log_me no samples": (
        lambda: LogMe().compute(),
        ValueError,
        "features: expected at least one sample before the score is computed, got none",
    ),
    "log_me merge": (
        lambda: LogMe().merge(Knn()),
        ValueError,
        "other: expected a LogMe with regression=False, got Knn",
    ),
    "trans_rate eps": (lambda: trans_rate(X, Y, eps=0), ValueError, "eps: expected a positive number, got 0"),
    "trans_rate nan": (
        lambda: trans_rate(NAN, Y),
        ValueError,
        "features: expected finite values, got nan at position [2, 1]",
    ),
    "trans_rate merge": (
        lambda: TransRate().merge(TransRate(eps=1.0)),
        ValueError,
        "other: expected a TransRate with eps=0.0001, got eps=1.0",
    ),
    "leep integers": (
        lambda: leep(P.int(), Y),
        TypeError,
        "source_probabilities: expected floating point, got a int32 tensor of shape [4, 2] on cpu",
    ),
    "leep 1-d": (
        lambda: leep(P[0], Y),
        ValueError,
        "source_probabilities: expected shape [N, C_s] with C_s >= 1, got a float32 tensor of shape [2] on cpu",
    ),
    "leep sums": (
        lambda: leep(P * 1.1, Y),
        ValueError,
        "source_probabilities: expected rows that sum to 1, got a sum of 1.1 in row 0",
    ),
    "leep nan": (
        lambda: leep(torch.tensor([[0.5, 0.5], [math.nan, 1.0]]), Y[:2]),
        ValueError,
        "source_probabilities: expected rows that sum to 1, got a sum of nan in row 1",
    ),
    "leep negative": (
        lambda: leep(torch.tensor([[0.5, 0.5], [-0.5, 1.5]]), Y[:2]),
        ValueError,
        "source_probabilities: expected no negative value, got -0.5 at position [1, 0]",
    ),
    "leep lengths": (
        lambda: leep(P, Y[:3]),
        ValueError,
        "labels: expected one label for each of the 4 rows of source_probabilities, got 3",
    ),
    "nce floats": (
        lambda: nce(X[:, 0], Y),
        TypeError,
        "source_labels: expected integers, got a float32 tensor of shape [4] on cpu",
    ),
    "nce empty": (
        lambda: nce(Y[:0], Y[:0]),
        ValueError,
        "source_labels: expected at least one sample before the score is computed, got none",
    ),
    "knn neighbors": (
        lambda: knn(X, Y, neighbors=0),
        ValueError,
        "neighbors: expected an integer of at least 1, got 0",
    ),
    "knn metric": (lambda: knn(X, Y, metric="l1"), ValueError, "metric: expected 'cosine' or 'euclidean', got 'l1'"),
    "knn too few": (
        lambda: knn(X, Y, neighbors=4),
        ValueError,
        "features: expected more than 4 samples for 4 neighbors, got 4",
    ),
    "knn other width": (
        lambda: Knn().update(X, Y).update(X[:, :2], Y),
        ValueError,
        "values: expected rows of shape [3] as before, got [2]",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_malformed_call_is_refused_with_its_message(name: str) -> None:
    call, error, message = BAD_INPUT[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message

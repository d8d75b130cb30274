"""The adapters for other libraries' names: against those libraries where they can be installed, else their formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
import torch

from transferops import scores
from transferops.compat import logme, tllib, transformer_ranker

SAMPLES, DIMENSION, CLASSES = 157, 9, 4


@pytest.fixture
def data(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose classes differ in mean."""
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    centres = torch.randn(CLASSES, DIMENSION, generator=generator, dtype=torch.float64)
    noise = torch.randn(SAMPLES, DIMENSION, generator=generator, dtype=torch.float64)
    return centres[labels] + 2 * noise, labels


def maximum_evidence(features: np.ndarray, targets: np.ndarray) -> float:
    """The largest log density of y under N(0, I/beta + F F^T/alpha) per sample, by a simplex search."""
    optimize, stats = pytest.importorskip("scipy.optimize"), pytest.importorskip("scipy.stats")
    samples = len(targets)

    def loss(precisions: np.ndarray) -> float:
        alpha, beta = np.exp(precisions)
        covariance = np.eye(samples) / beta + features @ features.T / alpha
        return -float(stats.multivariate_normal(cov=covariance).logpdf(targets)) / samples

    start = [0.0, -math.log(targets.var())]
    return -float(optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).fun)


class TestTllib:
    @pytest.mark.parametrize("arrays", [False, True], ids=["tensors", "arrays"])
    def test_h_scores_are_the_published_formulas(self, data: tuple[torch.Tensor, torch.Tensor], arrays: bool) -> None:
        given: Any = tuple(part.numpy() for part in data) if arrays else data
        plain, regularized = tllib.h_score(*given), tllib.regularized_h_score(*given)
        assert isinstance(plain, float)
        assert plain == pytest.approx(reference.projection_h_score(*data), rel=1e-10)
        assert regularized == pytest.approx(reference.published_regularized_h_score(*data), rel=1e-10)

    def test_log_maximum_evidence_is_the_maximum(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        features, labels = (part[:60].numpy() for part in data)
        wanted = [maximum_evidence(features, (labels == c).astype(float)) for c in range(CLASSES)]
        assert tllib.log_maximum_evidence(features, labels) == pytest.approx(np.mean(wanted), abs=1e-8)
        # Integers are numbers if regression is asked for.
        wanted = maximum_evidence(features, labels.astype(float))
        assert tllib.log_maximum_evidence(features, labels, True) == pytest.approx(wanted, abs=1e-8)

    @pytest.mark.parametrize("samples", [60, 7], ids=["N > D", "N < D"])
    def test_weights_are_the_posterior_mean_at_the_maximum(
        self, data: tuple[torch.Tensor, torch.Tensor], samples: int
    ) -> None:
        """m = (F^T F + lambda I)^-1 F^T y, with lambda where the evidence has no slope."""
        features, labels = (part[:samples].numpy() for part in data)
        labels = labels * 2  # classes 1, 3 and 5 have no samples
        value, weights = tllib.log_maximum_evidence(features, labels, return_weights=True)
        assert value == tllib.log_maximum_evidence(features, labels)
        assert weights.shape == (labels.max() + 1, DIMENSION)
        assert not weights[1::2].any()
        penalties = dict(zip(np.unique(labels), scores.LogMe().fit(features, labels).details().penalties, strict=True))
        for label, penalty in penalties.items():
            y = (labels == label).astype(float)
            mean = np.linalg.solve(features.T @ features + penalty * np.eye(DIMENSION), features.T @ y)
            np.testing.assert_allclose(weights[label], mean, rtol=1e-6, atol=1e-9)
            if samples > DIMENSION:  # the paper's fixed point: alpha = gamma / |m|^2, beta = (N - gamma) / |F m - y|^2
                s = np.linalg.eigvalsh(features.T @ features)
                gamma = (s / (s + penalty)).sum()
                fixed = gamma / (mean @ mean) * ((features @ mean - y) ** 2).sum() / (samples - gamma)
                assert penalty == pytest.approx(fixed, rel=1e-5)
        targets = features[:, :1] * 2 + 1
        _, weights = tllib.log_maximum_evidence(features[:, 1:], targets, regression=True, return_weights=True)
        assert weights.shape == (1, DIMENSION - 1)

    def test_weights_need_classes_from_0(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        with pytest.raises(ValueError, match=r"^labels: expected classes from 0, got -1"):
            tllib.log_maximum_evidence(data[0], data[1] - 1, return_weights=True)

    def test_against_the_library_itself(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        """It is not on PyPI: pip install git+https://github.com/thuml/Transfer-Learning-Library."""
        peer = pytest.importorskip("tllib.ranking", reason="tllib is not installed", exc_type=ImportError)
        features, labels = (part.numpy() for part in data)
        assert tllib.h_score(features, labels) == pytest.approx(peer.h_score(features, labels), rel=1e-9)
        sizes = np.bincount(labels).min()
        even = np.concatenate([np.flatnonzero(labels == c)[:sizes] for c in range(CLASSES)])
        assert tllib.transrate(features[even], labels[even]) == pytest.approx(
            peer.transrate(features[even], labels[even]), rel=1e-9
        )
        predictions = np.exp(features) / np.exp(features).sum(1, keepdims=True)
        theirs = peer.log_expected_empirical_prediction(predictions, labels)
        assert tllib.leep(predictions, labels) == pytest.approx(theirs, rel=1e-9)
        source = predictions.argmax(1)
        assert tllib.nce(source, labels) == pytest.approx(peer.negative_conditional_entropy(source, labels), rel=1e-9)
        ours, weights = tllib.log_maximum_evidence(features, labels, return_weights=True)
        # Its iteration stops near the maximum, not at it.
        theirs, means = peer.log_maximum_evidence(features, labels, False, True)
        assert theirs <= ours + 1e-9
        assert ours == pytest.approx(theirs, abs=1e-4)
        np.testing.assert_allclose(weights, means, rtol=0.05, atol=1e-3)

    def test_transrate_is_the_definition_in_the_features_own_units(
        self, data: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        features, labels = (part.numpy() for part in data)
        centred = features - features.mean(0)

        def rate(rows: np.ndarray, eps: float) -> float:
            _, value = np.linalg.slogdet(np.eye(DIMENSION) + rows.T @ rows / (len(rows) * eps))
            return float(value) / 2

        for eps in (1e-4, 0.3):
            within = sum((labels == c).mean() * rate(centred[labels == c], eps) for c in range(CLASSES))
            assert tllib.transrate(features, labels, eps) == pytest.approx(rate(centred, eps) - within, rel=1e-10)

    def test_transrate_of_classes_of_one_size_is_the_plain_average(self, generator: torch.Generator) -> None:
        """Where tllib's average of the classes is the definition, its value is ours."""
        labels = np.repeat(np.arange(3), 20)
        features = torch.randn(60, 5, generator=generator, dtype=torch.float64).numpy() + labels[:, None]
        centred = features - features.mean(0)
        rates = [
            np.linalg.slogdet(np.eye(5) + rows.T @ rows / (len(rows) * 1e-4))[1] / 2
            for rows in (centred, *(centred[labels == c] for c in range(3)))
        ]
        assert tllib.transrate(features, labels) == pytest.approx(rates[0] - np.mean(rates[1:]), rel=1e-10)

    def test_leep_and_nce_are_their_definitions(
        self, data: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator
    ) -> None:
        labels = data[1].numpy()
        logits = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
        logits[:, 5] = -torch.inf  # never predicted: NaN in the peer, no part here
        predictions = logits.softmax(1).numpy()
        joint = np.stack([predictions[labels == c].sum(0) for c in range(CLASSES)])
        mass = joint.sum(0)
        conditional = np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0)
        wanted = np.log((conditional[labels] * predictions).sum(1)).mean()
        assert tllib.leep(predictions, labels) == pytest.approx(wanted, rel=1e-10)
        assert tllib.log_expected_empirical_prediction(predictions, labels) == tllib.leep(predictions, labels)

        source = predictions.argmax(1)
        counts = np.stack([np.bincount(source[labels == c], minlength=6) for c in range(CLASSES)])
        present = counts > 0
        shares = counts / counts.sum(0).clip(1)
        wanted = (counts[present] * np.log(shares[present])).sum() / SAMPLES
        assert tllib.negative_conditional_entropy(source, labels) == pytest.approx(wanted, rel=1e-10)
        assert tllib.nce is tllib.negative_conditional_entropy

    def test_floating_point_labels_are_not_taken_for_classes(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        with pytest.raises(TypeError, match=r"^labels: expected integers, or regression=True, got a float64 tensor"):
            tllib.log_maximum_evidence(data[0], data[1].double())
        with pytest.raises(TypeError, match=r"^labels: expected real numbers, got a complex64 tensor"):
            tllib.log_maximum_evidence(data[0], data[1] + 0j, regression=True)


class TestLogMe:
    def test_fit_returns_the_score(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        features, labels = data
        model = logme.LogME()
        assert model.fit(features.numpy(), labels.numpy()) == pytest.approx(scores.log_me(*data), rel=1e-12)
        model.fit(features[:30], labels[:30])
        assert model.fit(features, labels) == pytest.approx(scores.log_me(*data), rel=1e-12)  # starts afresh

    def test_regression(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        features, labels = data
        targets = torch.stack([labels.double(), features[:, 0]], 1)
        model = logme.LogME(regression=True)
        got = model.fit(features[:, 1:], targets)
        assert got == pytest.approx(scores.log_me(features[:, 1:], targets), rel=1e-12)
        exact = logme.LogME(regression=True)
        exact.fit(features, features[:, :2] @ torch.tensor([[1.0, 2.0], [0.0, 3.0]]).double() + 1e-3)
        assert exact.predict(features[:5]).shape == (5, 2)
        np.testing.assert_allclose(exact.predict(features)[:, 0], features[:, 0] + 1e-3, atol=2e-2)

    def test_predictions(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        features, labels = data
        model = logme.LogME()
        with pytest.raises(RuntimeError, match=r"^LogME: expected fit before its weights are used"):
            model.predict(features)
        model.fit(features, labels)
        _, weights = tllib.log_maximum_evidence(features, labels, return_weights=True)
        np.testing.assert_array_equal(model.predict(features), (features.numpy() @ weights.T).argmax(1))
        assert (model.predict(features.numpy()) == labels.numpy()).mean() > 1.5 / CLASSES
        with pytest.raises(ValueError, match=r"^f: expected shape \[N, 9\], got .* of shape \[157, 8\]"):
            model.predict(features[:, 1:])
        model.fit(features[:2], torch.tensor([0, 2**40]))
        with pytest.raises(ValueError, match=r"^labels: expected classes below 1000000, .* got 1099511627776$"):
            _ = model.ms

    def test_against_the_class_itself(self, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        """One file of a repository, github.com/thuml/LogME, to be put on the path."""
        peer = pytest.importorskip("LogME", reason="the LogME repository is not on the path", exc_type=ImportError)
        features, labels = (part.numpy() for part in data)
        ours, theirs = logme.LogME(), peer.LogME()
        assert ours.fit(features, labels) == pytest.approx(theirs.fit(features, labels), abs=1e-4)
        np.testing.assert_allclose(ours.ms, theirs.ms, rtol=0.05, atol=1e-3)
        assert (ours.predict(features) == theirs.predict(features)).mean() > 0.95


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
class TestTransformerRanker:
    """Against the library itself."""

    @pytest.fixture
    def peer(self) -> Any:
        return pytest.importorskip("transformer_ranker.estimators", exc_type=ImportError)

    def test_h_score(self, peer: Any, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        ours = transformer_ranker.HScore()
        assert ours.score is None
        # The peer takes the square roots of class sizes in float32.
        assert ours.fit(*data) == pytest.approx(peer.HScore().fit(*data), rel=1e-6)
        assert ours.score == ours.fit(embeddings=data[0], labels=data[1])

    def test_log_me(self, peer: Any, data: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Same evidence, but for the 1e-5 in the peer's sums and its early stop: below the maximum, and near it."""
        for labels, regression in ((data[1], False), (data[0][:, 0].clone(), True)):
            features = data[0][:, 1:]
            ours = transformer_ranker.LogME(regression).fit(features, labels, max_iter=11, tol=1e-3)
            theirs = peer.LogME(regression).fit(features, labels)
            assert theirs <= ours + 1e-9
            assert ours == pytest.approx(theirs, abs=1e-4)

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_nearest_neighbors(self, peer: Any, data: tuple[torch.Tensor, torch.Tensor], metric: str) -> None:
        """One neighbour, where no tie can be resolved differently; micro-F1 over several classes is the accuracy."""
        theirs = peer.NearestNeighbors(k=1).fit(*data, distance_metric=metric)
        ours = transformer_ranker.NearestNeighbors(k=1).fit(*data, distance_metric=metric, batch_size=64)
        assert ours == pytest.approx(theirs, abs=1e-7)

    def test_the_peers_value_for_two_classes_is_no_accuracy(
        self, peer: Any, data: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        features, labels = data[0], (data[1] > 0).long()
        distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
        accuracy = float((labels[distances.argmin(1)] == labels).double().mean())
        assert transformer_ranker.NearestNeighbors(k=1).fit(features, labels) == pytest.approx(accuracy)
        assert abs(peer.NearestNeighbors(k=1).fit(features, labels) - accuracy) > 0.05

    def test_regression_is_refused_where_there_is_none(self) -> None:
        for estimator in (transformer_ranker.HScore, transformer_ranker.NearestNeighbors):
            with pytest.raises(ValueError, match=rf"^regression: expected False for {estimator.__name__}, got True"):
                estimator(regression=True)

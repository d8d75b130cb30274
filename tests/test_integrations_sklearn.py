"""The scikit-learn estimators: scikit-learn's own checks, its ridge, and the solver they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

sklearn = pytest.importorskip("sklearn", minversion="1.6")

from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from transferops.adapt import HeadSolver
from transferops.integrations.sklearn import HeadClassifier, HeadRegressor

Data = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def data() -> Data:
    """Three named classes of unequal size."""
    random = np.random.default_rng(0)
    index = random.choice(3, 80, p=[0.5, 0.3, 0.2])
    features = random.normal(size=(80, 6)) + random.normal(size=(3, 6))[index]
    return features, np.array(["ant", "bee", "cat"])[index]


@pytest.mark.filterwarnings("ignore:Estimator's parameters changed:UserWarning")
@pytest.mark.parametrize("estimator", [HeadClassifier(), HeadRegressor(), HeadClassifier(lam=1.0)], ids=repr)
def test_check_estimator(estimator: Any) -> None:
    check_estimator(estimator, on_skip=None)


class TestRegressor:
    def test_without_a_prior_it_is_ridge(self, data: Data) -> None:
        features, targets = data[0][:, :4], data[0][:, 4:]
        for lam in (0.0, 0.7, 40.0):
            for y in (targets, targets[:, 0]):
                ours, peer = HeadRegressor(lam=lam).fit(features, y), Ridge(alpha=lam).fit(features, y)
                assert ours.coef_.shape == peer.coef_.shape
                np.testing.assert_allclose(ours.coef_, peer.coef_, rtol=1e-8)
                np.testing.assert_allclose(ours.predict(features), peer.predict(features), rtol=1e-8)

    def test_its_penalty_is_that_of_least_exact_leave_one_out_loss(self, data: Data) -> None:
        features, targets = data[0][:, :4], data[0][:, 4]
        ours = HeadRegressor().fit(features, targets)
        solver = HeadSolver(keep_rows=None).update(features, targets[:, None])
        grid = solver.path().lams
        finite = grid[grid.isfinite()].numpy()
        peer = RidgeCV(finite, scoring="neg_mean_squared_error").fit(features, targets)
        assert ours.lam_ == pytest.approx(peer.alpha_)

    def test_a_prior_is_what_remains_under_an_infinite_penalty(self, data: Data) -> None:
        features, targets = data[0][:, :4], data[0][:, 4]
        prior, bias = [1.0, -2.0, 0.5, 3.0], 0.25
        model = HeadRegressor(prior, bias, lam=float("inf")).fit(features, targets)
        np.testing.assert_allclose(model.predict(features), features @ prior + bias, rtol=1e-12)
        near, far = (HeadRegressor(prior, bias, lam=lam).fit(features, targets) for lam in (1e3, 1e-3))
        assert np.linalg.norm(near.coef_ - prior) < np.linalg.norm(far.coef_ - prior)


class TestClassifier:
    def test_it_is_the_head_solver(self, data: Data) -> None:
        features, labels = data
        prior = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)
        model = HeadClassifier(prior).fit(features, labels)
        names, index = np.unique(labels, return_inverse=True)
        weight, bias = HeadSolver(prior, classes=3, keep_rows=None).update(features, index).solve()
        np.testing.assert_array_equal(model.coef_, weight.numpy())
        np.testing.assert_array_equal(model.classes_, names)
        outputs = features @ weight.numpy().T + bias.numpy()
        np.testing.assert_allclose(model.decision_function(features), outputs, rtol=1e-12)
        np.testing.assert_array_equal(model.predict(features), names[outputs.argmax(1)])

    def test_classes_name_the_rows_of_the_prior(self, data: Data) -> None:
        """A class of the prior may be missing from the few samples there are, and the order is the prior's."""
        features, labels = data
        prior = np.random.default_rng(1).normal(size=(4, 6))
        some = labels != "cat"
        model = HeadClassifier(prior, lam=float("inf"), classes=["dog", "cat", "bee", "ant"])
        model.fit(features[some], labels[some])
        np.testing.assert_allclose(model.coef_, prior)
        assert model.decision_function(features).shape == (80, 4)
        with pytest.raises(ValueError, match=r"^y: expected labels among \['bee', 'ant'\], got 'cat'"):
            HeadClassifier(classes=["bee", "ant"]).fit(features, labels)
        with pytest.raises(
            ValueError, match=r"^classes: expected labels that differ, got \['ant', 'bee', 'cat', 'bee'\]"
        ):
            HeadClassifier(classes=["ant", "bee", "cat", "bee"]).fit(features, labels)
        with pytest.raises(ValueError, match=r"^classes: expected the 4 rows of prior_weight, got 3"):
            HeadClassifier(prior).fit(features, labels)

    def test_an_unknown_penalty_is_refused(self, data: Data) -> None:
        with pytest.raises(ValueError, match=r"^lam: expected 'loo' or a number of at least 0, got 'best'"):
            HeadClassifier(lam="best").fit(*data)

    def test_in_a_pipeline_under_cross_validation(self, data: Data) -> None:
        pipeline = make_pipeline(StandardScaler(), HeadClassifier())
        assert cross_val_score(pipeline, *data, cv=4).mean() > 0.6  # the largest class has half of the samples

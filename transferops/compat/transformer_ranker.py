"""The estimators of ``transformer_ranker.estimators``: ``fit(embeddings, labels) -> float``, then ``.score``.

Assign them to ``ranker.transferability_metrics["hscore"]`` and kin to rank with them. Where values differ from that
library's (0.2.0):

* ``LogME``: as said in :mod:`transferops.compat.logme`; besides, the iteration for a class starts there from the
  precisions of the class before, so that the value depends on the order of the classes.
* ``NearestNeighbors``: with two classes the value there is the F1 of class 1, here the accuracy, which is what micro-F1
  is for more. A tie goes there to the smallest label, here to the nearest neighbour among the tied. Regression is not
  offered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from transferops import scores
from transferops._validate import fail
from transferops.compat.tllib import log_maximum_evidence, regularized_h_score


class Estimator(ABC):
    """What the estimators share.

    Args:
        regression: whether labels are numbers to be regressed on.

    Attributes:
        score: of the last ``fit``; None before.
    """

    def __init__(self, regression: bool = False) -> None:
        self.regression = regression
        self.score: float | None = None

    @abstractmethod
    def _value(self, embeddings: Tensor | Any, labels: Tensor | Any, options: dict[str, Any]) -> float:
        """The score."""

    def fit(self, embeddings: Tensor | Any, labels: Tensor | Any, **kwargs: Any) -> float:
        """Score embeddings for labels.

        Args:
            embeddings: [N, D] floating point, tensor or array.
            labels: [N] integers; numbers for regression.
            kwargs: options of the peer's ``fit``. Only ``distance_metric`` of :class:`NearestNeighbors` has a meaning
                here; those of iterations and batches have none.

        Returns:
            The score, which is also in ``score``.

        Raises:
            TypeError, ValueError: as the function in :mod:`transferops.scores`.
        """
        self.score = self._value(embeddings, labels, kwargs)
        return self.score


class HScore(Estimator):
    """Regularised H-score.

    Args:
        regression: False.

    Raises:
        ValueError: ``regression`` is true.
    """

    def __init__(self, regression: bool = False) -> None:
        if regression:
            fail("regression", "False for HScore", "True")
        super().__init__(regression)

    def _value(self, embeddings: Tensor | Any, labels: Tensor | Any, options: dict[str, Any]) -> float:
        return regularized_h_score(embeddings, labels)


class LogME(Estimator):
    """Logarithm of maximum evidence."""

    def _value(self, embeddings: Tensor | Any, labels: Tensor | Any, options: dict[str, Any]) -> float:
        return log_maximum_evidence(embeddings, labels, regression=self.regression)


class NearestNeighbors(Estimator):
    """Leave-one-out accuracy of the nearest neighbours.

    Args:
        regression: False.
        k: how many neighbours vote.

    Raises:
        ValueError: ``regression`` is true.
    """

    def __init__(self, regression: bool = False, k: int = 3) -> None:
        if regression:
            fail("regression", "False for NearestNeighbors", "True")
        super().__init__(regression)
        self.k = k

    def _value(self, embeddings: Tensor | Any, labels: Tensor | Any, options: dict[str, Any]) -> float:
        metric = options.get("distance_metric", "euclidean")
        return scores.knn(embeddings, labels, neighbors=self.k, metric=metric)

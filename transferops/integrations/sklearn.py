"""Linear heads near a pretrained one, as scikit-learn estimators (scikit-learn >= 1.6).

They are :class:`transferops.adapt.HeadSolver` behind ``fit`` and ``predict``, and go into pipelines, grid searches and
cross-validation. The penalty is on the distance to the prior head; without a prior it is ordinary ridge regression.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from transferops._validate import fail
from transferops.adapt import HeadSolver

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"transferops.integrations.sklearn needs scikit-learn >= 1.6 ({error}): pip install 'scikit-learn>=1.6'"
    ) from error

__all__ = ["HeadClassifier", "HeadRegressor"]


class _Head(BaseEstimator):  # type: ignore[misc]
    """What both heads share: the solution, and the outputs of a fitted head."""

    coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]
    lam_: float
    n_features_in_: int

    def __init__(
        self,
        prior_weight: ArrayLike | torch.Tensor | None = None,
        prior_bias: ArrayLike | torch.Tensor | None = None,
        *,
        lam: float | str = "loo",
    ) -> None:
        self.prior_weight = prior_weight
        self.prior_bias = prior_bias
        self.lam = lam

    def _checked(self, X: Any, y: Any, **options: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        samples = 2 if isinstance(self.lam, str) else 1  # leave-one-out needs one to leave
        dtypes = [np.float64, np.float32]
        pair: tuple[NDArray[Any], NDArray[Any]]
        pair = validate_data(self, X, y, dtype=dtypes, ensure_min_samples=samples, **options)
        return pair

    def _solve(self, X: NDArray[Any], targets: NDArray[Any], **options: Any) -> None:
        weight, bias = _array(self.prior_weight, 2), _array(self.prior_bias, 1)
        solver = HeadSolver(weight, bias, keep_rows=None, **options).update(X, targets)
        if isinstance(self.lam, str):
            if self.lam != "loo":
                fail("lam", "'loo' or a number of at least 0", repr(self.lam))
            self.lam_ = float(solver.path().best())
        else:
            self.lam_ = float(self.lam)
        self.coef_, self.intercept_ = (part.numpy() for part in solver.solve(self.lam_))

    def _outputs(self, X: Any) -> NDArray[np.float64]:
        """X W^T + b, [N, c]."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        outputs: NDArray[np.float64] = X @ self.coef_.T + self.intercept_
        return outputs


def _array(part: ArrayLike | torch.Tensor | None, dimensions: int) -> NDArray[np.float64] | None:
    """A part of the prior head as an array of at least so many dimensions; rows are outputs."""
    if part is None:
        return None
    values = part.detach().cpu().numpy() if isinstance(part, torch.Tensor) else part
    return np.array(values, dtype=np.float64, ndmin=dimensions)


class HeadClassifier(ClassifierMixin, _Head):  # type: ignore[misc]
    """A linear classifier by least squares on class indicators, kept near a pretrained head.

    Args:
        prior_weight: [c, p], the pretrained head; None for ordinary ridge regression.
        prior_bias: [c], its bias.
        lam: the penalty, at least 0, inf for the prior as it is; or "loo": that of least exact leave-one-out loss, as
            in :meth:`transferops.adapt.HeadSolver.solve`.
        target_scale: of the indicators, see :class:`transferops.adapt.HeadSolver`.
        classes: [c], the labels that the rows of the prior stand for. None: the labels that occur, sorted, of which
            there must then be c.

    Attributes:
        classes_: [c] labels, one for each output.
        coef_, intercept_: [c, p] and [c] float64; one row for each class, for two classes too.
        lam_: the penalty used.
        n_features_in_: p.

    ``fit`` raises ValueError if a label is not one of ``classes``, two of these are the same, features are not finite,
    or shapes disagree.
    """

    classes_: NDArray[Any]

    def __init__(
        self,
        prior_weight: ArrayLike | torch.Tensor | None = None,
        prior_bias: ArrayLike | torch.Tensor | None = None,
        *,
        lam: float | str = "loo",
        target_scale: float | str = "auto",
        classes: ArrayLike | None = None,
    ) -> None:
        super().__init__(prior_weight, prior_bias, lam=lam)
        self.target_scale = target_scale
        self.classes = classes

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the head.

        Args:
            X: [N, p] finite numbers.
            y: [N] labels of any kind.

        Raises:
            ValueError: see the class.
        """
        X, y = self._checked(X, y)
        check_classification_targets(y)
        present, index = np.unique(y, return_inverse=True)
        self.classes_ = present
        if self.classes is not None:
            self.classes_ = np.asarray(self.classes)
            position = {label: row for row, label in enumerate(self.classes_.tolist())}
            if len(position) < len(self.classes_):
                fail("classes", "labels that differ", repr(self.classes_.tolist()))
            unknown = [label for label in present.tolist() if label not in position]
            if unknown:
                fail("y", f"labels among {self.classes_.tolist()}", repr(unknown[0]))
            index = np.array([position[label] for label in present.tolist()])[index]
        self._solve(X, index.astype(np.int64), classes=len(self.classes_), target_scale=self.target_scale)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Outputs [N, c]; with two classes [N], that of the second less that of the first.

        Args:
            X: [N, p].

        Raises:
            ValueError: X has another number of columns than in ``fit``, or is not finite.
        """
        outputs = self._outputs(X)
        return outputs[:, 1] - outputs[:, 0] if len(self.classes_) == 2 else outputs

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The label of the largest output, [N].

        Args:
            X: [N, p].

        Raises:
            ValueError: as :meth:`decision_function`.
        """
        largest = self._outputs(X).argmax(1)
        labels: NDArray[Any] = self.classes_[largest]
        return labels


class HeadRegressor(RegressorMixin, _Head):  # type: ignore[misc]
    """Linear least squares, kept near a pretrained head.

    Args:
        prior_weight: [c, p], or [p] for a single output; None for ordinary ridge regression.
        prior_bias: [c], or a number for a single output.
        lam: as for :class:`HeadClassifier`.

    Attributes:
        coef_, intercept_: [c, p] and [c] float64, or [p] and a number if y is [N].
        lam_: the penalty used.
        n_features_in_: p.

    ``fit`` raises ValueError if features or targets are not finite, or shapes disagree.
    """

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn may expect: several outputs too."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the head.

        Args:
            X: [N, p] finite numbers.
            y: [N] or [N, c] finite numbers.

        Raises:
            ValueError: see the class.
        """
        X, y = self._checked(X, y, multi_output=True, y_numeric=True)
        self._solve(X, y.reshape(len(y), -1).astype(np.float64))
        if y.ndim == 1:
            self.coef_, self.intercept_ = self.coef_[0], self.intercept_[0]
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Predicted targets, of the shape that y had.

        Args:
            X: [N, p].

        Raises:
            ValueError: X has another number of columns than in ``fit``, or is not finite.
        """
        return self._outputs(X)

"""The class of the LogME repository (``from LogME import LogME``).

Where values differ from that class's: it adds 1e-5 to squared norms, which makes the value depend on the scale of the
features; it stops its iteration at a change of 0.1 %; and for N < D it keeps a term (D - r)/2 ln alpha of directions
without features. Here the evidence is that of the paper, at its maximum, and the weights are those there; the peer's
are of the penalty before its last step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from transferops._validate import check_array, describe, fail
from transferops.compat._evidence import posterior_mean
from transferops.compat.tllib import log_maximum_evidence


class LogME:
    """Logarithm of maximum evidence.

    Args:
        regression: whether targets are numbers to be regressed on.

    """

    def __init__(self, regression: bool = False) -> None:
        self.regression = regression
        self._given: tuple[Any, Any] | None = None
        self._weights: NDArray[np.float64] | None = None

    def fit(self, f: Tensor | Any, y: Tensor | Any) -> float:
        """LogME of features for targets; a second call starts afresh.

        Args:
            f: [N, D] floating point, tensor or array.
            y: [N] integers, or with ``regression`` numbers [N] or [N, M].

        Returns:
            The evidence per sample in nats, averaged over classes or outputs.

        Raises:
            TypeError, ValueError: as :func:`transferops.scores.log_me`.
        """
        value = log_maximum_evidence(f, y, self.regression)
        self._given, self._weights = (f, y), None
        return value

    @property
    def ms(self) -> NDArray[np.float64]:
        """Weights of the linear model: float64 [C, D] for the classes 0 .. max, or [M, D].

        Found when they are first asked for, from the arrays that ``fit`` was given.

        Raises:
            RuntimeError: there was no ``fit``.
            ValueError: a label is negative or a million or more.
        """
        if self._weights is None:
            if self._given is None:
                raise RuntimeError("LogME: expected fit before its weights are used, got no fit")
            self._weights = posterior_mean(*self._given, self.regression)
        return self._weights

    def predict(self, f: Tensor | Any) -> NDArray[Any]:
        """What the fitted linear model says of features.

        Args:
            f: [N, D] numbers.

        Returns:
            Classes int64 [N], or with ``regression`` values float64 [N, M].

        Raises:
            RuntimeError: there was no ``fit``.
            ValueError: ``f`` has another number of columns or is not finite, or a label was negative.
        """
        features = check_array("f", f)
        dimension = self.ms.shape[1]
        if features.ndim != 2 or features.shape[1] != dimension:
            fail("f", f"shape [N, {dimension}]", f"{describe(f)} of shape {list(features.shape)}")
        outputs: NDArray[np.float64] = features @ self.ms.T
        return outputs if self.regression else outputs.argmax(1)

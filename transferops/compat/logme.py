"""The class of the LogME repository (``from LogME import LogME``).

Where values differ from that class's: it adds 1e-5 to squared norms, which makes the value depend on the scale of the
features; it stops its iteration at a change of 0.1 %; and for N < D it keeps a term (D - r)/2 ln alpha of directions
without features. Here the evidence is that of the paper, at its maximum. ``predict`` is not offered: the head that goes
with a penalty is :class:`transferops.adapt.HeadSolver`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transferops.compat.tllib import log_maximum_evidence


class LogME:
    """Logarithm of maximum evidence.

    Args:
        regression: whether targets are numbers to be regressed on.
    """

    def __init__(self, regression: bool = False) -> None:
        self.regression = regression

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
        return log_maximum_evidence(f, y, regression=self.regression)

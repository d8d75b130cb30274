"""OTCE: how far source and target lie apart, and how well source labels tell target labels once they are matched.

[paper: Tan, Li and Huang, CVPR 2021, "OTCE: A Transferability Metric for Cross-Domain Cross-Task Representations"]:
the optimal coupling pi of source and target features under the squared Euclidean cost, with entropic regularisation,
gives the domain difference W_D = sum_ij pi_ij |x_i - x_j|^2 and, through P(y_s, y_t) = sum of pi over the pairs with
those labels, the task difference W_T = H(Y_t | Y_s). OTCE = l1 W_D + l2 W_T + b needs coefficients learned on tasks
with known accuracy; without them the score is -W_T, which the paper calls OT-based NCE.

The transport is solved by the POT package, which must be installed.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from transferops._validate import check_positive, describe, fail
from transferops.scores._extras import collected_warnings, load
from transferops.scores.base import Collection, ScoreDetails
from transferops.scores.features import FeatureScore, check_features
from transferops.scores.rows import Rows


class Otce(FeatureScore):
    """Streaming :func:`otce`: the source is given at the start, the target in batches. Keeps the features.

    Args:
        source_features, source_labels, regularization, coefficients: as for :func:`otce`.
    """

    name = "otce"
    takes = "features"
    keeps_rows = True
    requires = "POT"

    def __init__(
        self,
        source_features: Tensor | Any,
        source_labels: Tensor | Any,
        *,
        regularization: float | None = 0.1,
        coefficients: tuple[float, float, float] | None = None,
    ) -> None:
        self._source = Rows(check_features)
        self._source.update(source_features, source_labels)
        if self._source.samples == 0:
            fail("source_features", "at least one sample", "none")
        features, labels = self._source.all()
        content = hashlib.sha256(features.double().cpu().numpy().tobytes())
        content.update(labels.cpu().numpy().tobytes())
        self._digest = content.hexdigest()[:16]  # only scores against the same source can be merged
        self.regularization = None if regularization is None else check_positive("regularization", regularization)
        if coefficients is not None and len(coefficients) != 3:
            fail("coefficients", "three numbers: of W_D, of W_T, and a constant", describe(coefficients))
        self.coefficients = None if coefficients is None else tuple(float(value) for value in coefficients)
        super().__init__()

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "source": self._digest}

    def _collection(self) -> Collection:
        return Rows(self._check)

    def _check(self, features: Any, labels: Any) -> tuple[Tensor, Tensor]:
        features, labels = check_features(features, labels)
        source, _ = self._source.all()
        if features.shape[1] != source.shape[1]:
            fail("features", f"{source.shape[1]} features, as in the source", f"{features.shape[1]}")
        return features, labels

    def _evaluate(self, data: Any) -> ScoreDetails:
        transport = load("ot", "POT", "otce")
        source, source_labels = self._source.all()
        source, target = source.double().cpu(), data.features.double().cpu()
        offset = source.mean(0)
        cost = torch.cdist(source - offset, target - offset).square()
        weights = [torch.full((len(rows),), 1 / len(rows), dtype=torch.float64).numpy() for rows in (source, target)]
        with collected_warnings() as messages:
            if self.regularization is None:
                coupling = transport.emd(*weights, cost.numpy(), numItermax=1_000_000)
            else:
                coupling = transport.sinkhorn(*weights, cost.numpy(), self.regularization, method="sinkhorn_log")
        plan = torch.from_numpy(coupling)
        domain = float((plan * cost).sum())
        names, from_index = torch.unique(source_labels.cpu(), return_inverse=True)
        by_source = plan.new_zeros(len(names), len(target)).index_add_(0, from_index, plan)
        joint = plan.new_zeros(len(names), data.classes).index_add_(1, data.index.cpu(), by_source)
        joint = joint / joint.sum()
        task = float(torch.special.entr(joint).sum() - torch.special.entr(joint.sum(1)).sum())
        value = -task
        if data.classes == 1:
            messages.append("all samples are of one class, so there is nothing to tell apart")
        if self.coefficients is not None:
            value = self.coefficients[0] * domain + self.coefficients[1] * task + self.coefficients[2]
        return ScoreDetails(
            value,
            data.samples,
            data.classes,
            data.dimension,
            warnings=tuple(f"otce: {message}" for message in messages),
            parts={"domain_difference": domain, "task_difference": task},
        )


def otce(
    source_features: Tensor | Any,
    source_labels: Tensor | Any,
    features: Tensor | Any,
    labels: Tensor | Any,
    *,
    regularization: float | None = 0.1,
    coefficients: tuple[float, float, float] | None = None,
) -> float:
    """Optimal-transport conditional entropy between a source and a target; higher means more transferable.

    Args:
        source_features: [M, D] floating point, of the source's samples, by the source model.
        source_labels: [M] integers of any values.
        features: [N, D], of the target's samples, by the same model.
        labels: [N] integers of any values.
        regularization: entropic, in units of the cost; None for the exact coupling.
        coefficients: (l1, l2, b) for l1 W_D + l2 W_T + b; by default the score is -W_T.

    Returns:
        The score. Memory is that of M x N numbers; computed on the CPU.

    Raises:
        ImportError: POT is not installed.
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a feature is NaN or infinite, an option is out of range.

    Warns:
        ScoreWarning: a single class; a transport that did not converge.
    """
    score = Otce(source_features, source_labels, regularization=regularization, coefficients=coefficients)
    return score._once(features, labels)

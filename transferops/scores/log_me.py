"""LogME: the evidence of a Bayesian linear model from features to labels, maximised over its two precisions.

[paper: You et al., ICML 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning"]. For one
output y in R^N (an indicator of a class, or a regression target), features F [N, D], prior precision alpha on the
weights and noise precision beta,

    log p(y | F) = D/2 ln alpha + N/2 ln beta - 1/2 ln det(alpha I + beta F^T F) - beta/2 |F m - y|^2 - alpha/2 |m|^2
                   - N/2 ln 2 pi,        m the posterior mean;

LogME is its maximum over alpha and beta, divided by N and averaged over the outputs.

Here the maximum is found over lambda = alpha / beta alone [derived]: with s_k the nonzero squared singular values of F
(k = 1..r) and x_k the coefficients of y along its left singular vectors, beta has the closed form N / Q and

    log p / N = 1/2 ln(N / Q) - 1/2 - 1/2 ln 2 pi + 1/(2N) sum_k ln(lambda / (lambda + s_k)),
    Q(lambda) = |y|^2 - sum_k x_k^2 + sum_k x_k^2 lambda / (lambda + s_k).

The D - r directions without features have cancelled, so N < D is right (the published code keeps (D - r)/2 ln alpha
there); nothing depends on the scale of the features; and a grid over lambda followed by Newton steps finds the global
maximum where the published fixed-point iteration stops near a local one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import as_tensor, describe, fail
from transferops.scores._warnings import warn
from transferops.scores.moments import FeatureMoments, MomentsAccumulator, check_batch, check_finite

_GRID = 128  # values of lambda, from far below the smallest eigenvalue to far above the largest
_NEWTON_STEPS = 12


def log_me(features: Tensor | Any, labels: Tensor | Any) -> float:
    """LogME of features for class labels or regression targets; higher means more transferable.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16, not centred (the model has no intercept, as published).
        labels: [N] integers of any values for classification (one indicator per class that occurs), or [N] or [N, M]
            floating-point targets for regression.

    Returns:
        The evidence per sample in nats, averaged over the classes or the M targets.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a value is NaN or infinite.

    Warns:
        ScoreWarning: a single class, or constant features.
    """
    targets = as_tensor("labels", labels)
    if targets.is_floating_point():
        return _regression(*_check_regression(features, targets))
    features, targets = check_batch(features, targets)
    if len(features) > features.shape[1]:
        return _from_moments(FeatureMoments.of(features, targets))
    return _from_samples(features, targets)


class LogMe:
    """Streaming :func:`log_me` for class labels, over batches in any order.

    Example:
        >>> score = LogMe()
        >>> for features, labels in batches:
        ...     score.update(features, labels)
        >>> score.compute()
    """

    higher_is_better = True

    def __init__(self) -> None:
        self._accumulator = MomentsAccumulator()

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return self._accumulator.samples

    def update(self, features: Tensor | Any, labels: Tensor | Any) -> LogMe:
        """Add a batch: features [N, D], labels [N] integers (an empty batch changes nothing)."""
        self._accumulator.update(features, labels)
        return self

    def merge(self, other: LogMe) -> LogMe:
        """Add all that ``other`` has seen, which is left as it is."""
        if not isinstance(other, LogMe):
            fail("other", "a LogMe", describe(other), TypeError)
        self._accumulator.merge(other._accumulator)
        return self

    def compute(self) -> float:
        """The score of all samples seen so far."""
        if self.samples == 0:
            fail("features", "at least one sample before the score is computed", "none")
        rows = self._accumulator.as_samples()
        return _from_samples(*rows) if rows is not None else _from_moments(self._accumulator.as_moments())

    def reset(self) -> None:
        """Forget all samples."""
        self._accumulator = MomentsAccumulator()


def _from_moments(moments: FeatureMoments) -> float:
    """N > D: everything from F^T F and F^T Y, which the centred moments and the means give."""
    samples = moments.samples
    counts = moments.counts.double()
    gram = moments.gram + samples * torch.outer(moments.mean, moments.mean)
    cross = moments.sums + counts.unsqueeze(1) * moments.mean  # [C, D]: sums of features by class
    values, vectors = torch.linalg.eigh(gram)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    values = values[kept]
    coefficients = (cross @ vectors[:, kept]).square() / values
    return _mean_evidence(values, coefficients, counts, samples, len(moments.classes))


def _from_samples(features: Tensor, labels: Tensor) -> float:
    """N <= D: everything from F F^T."""
    classes, index = torch.unique(labels, return_inverse=True)
    indicator = torch.nn.functional.one_hot(index, len(classes)).double()
    return _spectral(features, indicator, len(classes))


def _spectral(features: Tensor, targets: Tensor, classes: int | None) -> float:
    """From the eigenvectors of F F^T and targets [N, M]."""
    check_finite(features)
    if len(features) == 0:
        fail("features", "at least one sample before the score is computed", "none")
    centred, mean = ops.sample_gram(features)
    along = features.double() @ mean - mean.dot(mean)  # y_n . mean, for y = f - mean
    gram = centred + along + along.unsqueeze(1) + mean.dot(mean)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    coefficients = (vectors[:, kept].mT @ targets).square().mT
    return _mean_evidence(values[kept], coefficients, targets.square().sum(0), len(features), classes)


def _regression(features: Tensor, targets: Tensor) -> float:
    if len(features) <= features.shape[1]:
        return _spectral(features, targets, None)
    check_finite(features)
    wide = features.double()
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    coefficients = (targets.mT @ wide @ vectors[:, kept]).square() / values[kept]
    return _mean_evidence(values[kept], coefficients, targets.square().sum(0), len(features), None)


def _check_regression(features: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    features, _ = check_batch(features, torch.zeros(len(targets), dtype=torch.long, device=targets.device))
    if targets.dim() not in (1, 2) or targets.numel() == 0:
        fail("labels", "shape [N] or [N, M]", describe(targets))
    targets = targets.detach().double().reshape(len(targets), -1)
    if not bool(torch.isfinite(targets).all()):
        position = (~torch.isfinite(targets)).nonzero()[0].tolist()
        fail("labels", "finite values", f"{targets[tuple(position)].item()} at position {position}")
    return features, targets


def _mean_evidence(values: Tensor, coefficients: Tensor, squares: Tensor, samples: int, classes: int | None) -> float:
    """LogME from s_k [r], x_k^2 [M, r] and |y|^2 [M]."""
    if classes == 1:
        warn("log_me: all samples are of one class, so there is nothing to tell apart")
    if len(values) == 0:
        warn("log_me: every feature is zero, so the evidence is that of no features")
    squares = squares.clamp(min=1e-300)
    # Scale y to |y|^2 = N and s to a largest of 1: then all that follows is dimensionless.
    coefficients = coefficients * (samples / squares).unsqueeze(1)
    # What the features cannot reach: nothing if they span the sample space.
    outside = (samples - coefficients.sum(1)).clamp(min=0) * (len(values) < samples)
    constant = 0.5 * torch.log(samples / squares) - 0.5 - 0.5 * math.log(2 * math.pi)
    if len(values) == 0:
        return float(constant.mean())
    values = values / values[-1]
    evidence = _maximum_over_lambda(values, coefficients, outside, samples)
    return float((constant + evidence).mean())


def _maximum_over_lambda(values: Tensor, coefficients: Tensor, outside: Tensor, samples: int) -> Tensor:
    """max over lambda of 1/2 ln(N/Q) + 1/(2N) sum ln(lambda/(lambda+s)), for each of the M outputs."""
    # Fewer directions than samples and an exact fit: the evidence grows without bound, and Q is held at rounding level.
    floor = 1e-14 * samples if len(values) < samples else 1e-300

    def terms(log_lambda: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Objective, first and second derivative in ln lambda; log_lambda [M, 1]."""
        shrink = torch.sigmoid(log_lambda - values.log())  # lambda / (lambda + s), [M, r]
        slope = shrink * (1 - shrink)
        q = (outside + (coefficients * shrink).sum(1)).clamp(min=floor)
        q1 = (coefficients * slope).sum(1)
        q2 = (coefficients * slope * (1 - 2 * shrink)).sum(1)
        objective = 0.5 * torch.log(samples / q) + shrink.log().sum(1) / (2 * samples)
        first = -0.5 * q1 / q + (1 - shrink).sum(1) / (2 * samples)
        second = -0.5 * (q2 / q - (q1 / q).square()) - slope.sum(1) / (2 * samples)
        return objective, first, second

    low, high = float(values[0].log()) - 40.0, 40.0
    grid = torch.linspace(low, high, _GRID, dtype=values.dtype, device=values.device)
    # One product for the whole grid: Q is linear in the coefficients.
    shrink = torch.sigmoid(grid.unsqueeze(1) - values.log())
    q = (outside.unsqueeze(1) + coefficients @ shrink.mT).clamp(min=floor)
    table = 0.5 * torch.log(samples / q) + shrink.log().sum(1) / (2 * samples)
    best = table.argmax(1)
    step = float(grid[1] - grid[0])
    lower, upper = grid[best] - step, grid[best] + step
    point = grid[best]
    result = table.max(1).values
    for _ in range(_NEWTON_STEPS):
        objective, first, second = terms(point.unsqueeze(1))
        result = torch.maximum(result, objective)
        lower, upper = torch.where(first > 0, point, lower), torch.where(first > 0, upper, point)
        newton = point - first / torch.where(second < 0, second, -torch.inf)
        inside = (newton > lower) & (newton < upper) & (second < 0)
        point = torch.where(inside, newton, (lower + upper) / 2)
    objective, _, _ = terms(point.unsqueeze(1))
    return torch.maximum(result, objective)

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transferops._validate import as_tensor
from transferops.scores.base import ScoreDetails
from transferops.scores.features import FeatureSet, TargetScore
from transferops.scores.spectrum import Spectrum, spectrum_of_features, spectrum_of_moments, spectrum_of_samples

_GRID = 128  # values of lambda, from far below the smallest eigenvalue to far above the largest
_NEWTON_STEPS = 12  # at most; bisection steps included
_EXACT = 1e-12  # share of |y|^2 below which what a fit leaves is rounding
_NEWTON_TOLERANCE = 1e-7  # in ln lambda: the value, flat at its maximum, is then right to rounding


@dataclass(frozen=True)
class LogMeDetails(ScoreDetails):
    """:class:`transferops.scores.ScoreDetails`, and where the maximum is.

    Attributes:
        penalties: lambda = alpha / beta at the maximum, for every class or output; inf without features.
    """

    penalties: tuple[float, ...] = ()


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
        ScoreWarning: a single class; features that are all zero; outputs that the features fit exactly, for which the
            evidence has no maximum.
    """
    targets = as_tensor("labels", labels)
    return LogMe(regression=targets.is_floating_point())._once(features, targets)


class LogMe(TargetScore):
    """Streaming :func:`log_me`, over batches in any order; ``details()`` returns :class:`LogMeDetails`.

    Args:
        regression: the labels are floating-point targets [N] or [N, M]; the rows are then kept.

    Example:
        >>> score = LogMe()
        >>> for features, labels in batches:
        ...     score.update(features, labels)
        >>> score.compute()
    """

    name = "log_me"

    def __init__(self, *, regression: bool = False) -> None:
        self.regression = bool(regression)
        super().__init__()

    def _evaluate(self, data: Any) -> LogMeDetails:
        if self.regression:
            features, targets = data
            spectrum = spectrum_of_features(features, targets)
            return _details(spectrum, features.shape, targets.square().sum(0), 0)
        counts = data.counts.double()
        return _details(_spectrum(data), (data.samples, data.dimension), counts, data.classes)


def _spectrum(data: FeatureSet) -> Spectrum:
    if data.few:
        indicator = torch.nn.functional.one_hot(data.index, data.classes).double()
        return spectrum_of_samples(data.features, data.sample_gram, indicator)
    return spectrum_of_moments(data.moments)


def _details(spectrum: Spectrum, shape: tuple[int, ...], squares: Tensor, classes: int) -> LogMeDetails:
    """LogME from the spectrum and |y|^2 [M]."""
    values, coefficients = spectrum
    samples, dimension = shape
    warnings = []
    if classes == 1:
        warnings.append("log_me: all samples are of one class, so there is nothing to tell apart")
    if len(values) == 0:
        warnings.append("log_me: every feature is zero, so the evidence is that of no features")
    # What the features cannot reach of each output: nothing if they span the sample space.
    missed = (squares - coefficients.sum(1)).clamp(min=0) / squares.clamp(min=1e-300) * (len(values) < samples)
    exact = int((missed < _EXACT).sum())
    if classes != 1 and 0 < len(values) < samples and exact:
        warnings.append(
            f"log_me: the features fit {exact} of {len(squares)} outputs exactly up to rounding; the evidence of these "
            "grows without bound and is held at the level of rounding"
        )
    value, penalties = _mean_evidence(values, coefficients, squares, missed, samples)
    return LogMeDetails(
        value,
        samples,
        classes,
        dimension,
        rank=len(values),
        warnings=tuple(warnings),
        penalties=tuple(penalties.tolist()),
    )


def _mean_evidence(
    values: Tensor, coefficients: Tensor, squares: Tensor, missed: Tensor, samples: int
) -> tuple[float, Tensor]:
    """LogME, and lambda [M] at the maxima."""
    squares = squares.clamp(min=1e-300)
    # Scale y to |y|^2 = N and s to a largest of 1: then all that follows is dimensionless.
    coefficients = coefficients * (samples / squares).unsqueeze(1)
    constant = 0.5 * torch.log(samples / squares) - 0.5 - 0.5 * math.log(2 * math.pi)
    if len(values) == 0:
        return float(constant.mean()), torch.full_like(constant, torch.inf)
    evidence, log_lambda = _maximum_over_lambda(values / values[-1], coefficients, missed * samples, samples)
    return float((constant + evidence).mean()), log_lambda.exp() * values[-1]


def _maximum_over_lambda(values: Tensor, coefficients: Tensor, outside: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """max over lambda of 1/2 ln(N/Q) + 1/(2N) sum ln(lambda/(lambda+s)) for each of the M outputs, and ln lambda."""
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
    point = place = grid[best]
    result = table.max(1).values
    for _ in range(_NEWTON_STEPS):
        objective, first, second = terms(point.unsqueeze(1))
        place = torch.where(objective >= result, point, place)
        result = torch.maximum(result, objective)
        lower, upper = torch.where(first > 0, point, lower), torch.where(first > 0, upper, point)
        newton = point - first / torch.where(second < 0, second, -torch.inf)
        inside = (newton > lower) & (newton < upper) & (second < 0)
        moved = torch.where(inside, newton, (lower + upper) / 2)
        done = float((moved - point).abs().max()) < _NEWTON_TOLERANCE
        point = moved
        if done:
            return result, place
    objective, _, _ = terms(point.unsqueeze(1))
    return torch.maximum(result, objective), torch.where(objective >= result, point, place)

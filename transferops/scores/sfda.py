"""SFDA: how well a Fisher discriminant tells classes apart after its confident samples were made harder.

[paper: Shao et al., ECCV 2022, "Not All Models Are Equal: Predicting Model Transferability in a Self-challenging Fisher
Space"]: a regularised discriminant gives each sample the probability p_n of its class; Conf-Mix moves it to
p_n x_n + (1 - p_n) m_n, m_n the mean of the other classes' means; a second discriminant with the same shrinkage is then
scored by ln p(y_n | x_n), averaged over the samples.

As in the released code, p_n is softened by a second softmax over the classes' probabilities. That code averages p in
place of ln p in the end; ``log=False`` does, and ``details().parts`` has both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transferops._validate import check_positive
from transferops.scores.base import ScoreDetails
from transferops.scores.discriminant import Discriminant
from transferops.scores.features import FeatureScore, FeatureSet
from transferops.scores.moments import FeatureMoments


class Sfda(FeatureScore):
    """Streaming :func:`sfda`. Keeps the features: each is moved by itself.

    Args:
        log, strength: as for :func:`sfda`.
    """

    name = "sfda"
    keeps_rows = True

    def __init__(self, *, log: bool = True, strength: float = 5.0) -> None:
        self.log = bool(log)
        self.strength = check_positive("strength", strength)
        super().__init__()

    def _evaluate(self, data: FeatureSet) -> ScoreDetails:
        samples, dimension, classes = data.samples, data.dimension, data.classes
        if classes == 1:
            caveat = "sfda: all samples are of one class, so there is nothing to tell apart"
            value = 0.0 if self.log else 1.0
            return ScoreDetails(value, samples, 1, dimension, warnings=(caveat,))
        first = Discriminant(data.moments, self.strength)
        own = data.index.unsqueeze(1)
        confidence = first.log_posterior(data.features).exp().softmax(1).gather(1, own)
        means = data.class_means
        others = (means.sum(0) - means) / (classes - 1)
        mixed = torch.lerp(others[data.index], data.features.double(), confidence)
        second = Discriminant(FeatureMoments.of(mixed, data.index), self.strength, first.shrinkage)
        likelihood = second.log_posterior(mixed).gather(1, own)
        parts = {"log_likelihood": float(likelihood.mean()), "probability": float(likelihood.exp().mean())}
        caveat = f"sfda: {first.caveat}" if first.caveat else ""
        return ScoreDetails(
            parts["log_likelihood" if self.log else "probability"],
            samples,
            classes,
            dimension,
            shrinkage=first.shrinkage,
            warnings=(caveat,) if caveat else (),
            parts=parts,
        )


def sfda(features: Tensor | Any, labels: Tensor | Any, *, log: bool = True, strength: float = 5.0) -> float:
    """Self-challenging Fisher discriminant analysis; higher means more transferable.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16.
        labels: [N] integers of any values.
        log: the mean log-probability of the true class, as published; False for the mean probability, as released.
        strength: the shrinkage is exp(-strength sigma), sigma the largest eigenvalue of the within-class covariance.
            So the score depends on the scale of the features, as published.

    Returns:
        The score, at most 0 (at most 1 for ``log=False``). All arithmetic in float64.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a feature is NaN or infinite, strength is not positive.

    Warns:
        ScoreWarning: a single class; constant features; classes without variance.
    """
    return Sfda(log=log, strength=strength)._once(features, labels)

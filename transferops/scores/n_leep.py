"""N-LEEP: LEEP with the clusters of a Gaussian mixture in the place of the source model's classes.

[paper: Li et al., CVPR 2021, "Ranking Neural Checkpoints"]: principal components that carry 80 % of the features'
variance, a Gaussian mixture with 5 components per target class, and LEEP of its posterior probabilities. (Code released
later averages the expected prediction without its logarithm; this is the published score.)

The mixture is scikit-learn's, which must be installed. It starts from a seed: other seeds give other local optima.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import check_positive_int, describe, fail
from transferops.scores._extras import collected_warnings, load
from transferops.scores.base import ScoreDetails
from transferops.scores.features import FeatureScore, FeatureSet
from transferops.scores.leep import mean_log


class NLeep(FeatureScore):
    """Streaming :func:`n_leep`. Keeps the features.

    Args:
        components_per_class, variance, seed: as for :func:`n_leep`.
    """

    name = "n_leep"
    keeps_rows = True
    requires = "scikit-learn"

    def __init__(self, *, components_per_class: int = 5, variance: float = 0.8, seed: int = 0) -> None:
        self.components_per_class = check_positive_int("components_per_class", components_per_class)
        if not isinstance(variance, float) or not 0 < variance < 1:
            fail("variance", "a share between 0 and 1", describe(variance))
        self.variance = variance
        self.seed = check_positive_int("seed", seed, minimum=0)
        super().__init__()

    def _evaluate(self, data: FeatureSet) -> ScoreDetails:
        mixture = load("sklearn.mixture", "scikit-learn", "n_leep")
        clusters = self.components_per_class * data.classes
        if data.samples < max(clusters, 2):
            expected = f"at least {max(clusters, 2)} samples for a mixture of {clusters} components"
            fail("features", expected, f"{data.samples}")
        points = data.principal_components(self.variance)
        warnings = []
        if points.shape[1] == 0:
            warnings.append("n_leep: every feature is constant")
            points = points.new_zeros(len(points), 1)
        elif data.classes == 1:
            warnings.append("n_leep: all samples are of one class, so there is nothing to tell apart")
        # The scale of the features must not meet the absolute regularisation of the mixture.
        points = points / points.square().mean().sqrt().clamp(min=1e-300)
        model = mixture.GaussianMixture(n_components=clusters, random_state=self.seed)
        with collected_warnings() as messages:
            posterior = model.fit(points.cpu().numpy()).predict_proba(points.cpu().numpy())
        warnings.extend(f"n_leep: {message}" for message in messages)
        probabilities = torch.from_numpy(posterior).to(points.device)
        value, kept = mean_log(ops.empirical_prediction(probabilities, data.index, data.classes))
        return ScoreDetails(
            value,
            data.samples,
            data.classes,
            data.dimension,
            rank=points.shape[1],
            warnings=tuple(warnings),
            parts={"clusters": float(kept), "iterations": float(model.n_iter_)},
        )


def n_leep(
    features: Tensor | Any,
    labels: Tensor | Any,
    *,
    components_per_class: int = 5,
    variance: float = 0.8,
    seed: int = 0,
) -> float:
    """LEEP over the clusters of a Gaussian mixture; higher means more transferable.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16; two samples or more, and at
            least components_per_class * C.
        labels: [N] integers of any values.
        components_per_class: of the mixture, per target class.
        variance: share of the variance that the principal components carry, below 1.
        seed: of the mixture's start.

    Returns:
        The score in nats, at most 0. The features' scale does not matter.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, too few samples, a feature is NaN or infinite, or an option is out of
            range.

    Warns:
        ScoreWarning: a single class, constant features, or a mixture that did not converge.
    """
    score = NLeep(components_per_class=components_per_class, variance=variance, seed=seed)
    return score._once(features, labels)

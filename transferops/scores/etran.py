"""ETran: an energy score plus how well a discriminant, or a least-squares fit, explains the labels.

[paper: Gholami et al., ICCV 2023, "ETran: Energy-Based Transferability Estimation", arXiv 2308.02027]. Three parts:

- energy: mean of ln sum_d exp(x_nd), the features in the place of logits;
- classification: mean probability of the true class under linear discriminant analysis with shrunk covariance;
- regression: -|Y - F F^+ Y|^2 / (N M), the error of the least-squares fit through the singular vectors of F.

The score is energy + classification, or energy + regression. The parts have different scales: to rank models as the
paper does, bring each part (``details().parts``) to [0, 1] over the models first, which :func:`etran_ranking` does.

The released classification takes ``eigh`` of an unsymmetric matrix, so its classifier is the nearest class mean
whatever the covariance; here it is the discriminant of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transferops._validate import as_tensor, check_positive, describe, fail
from transferops.scores.base import ScoreDetails
from transferops.scores.discriminant import Discriminant
from transferops.scores.energy import negative_energies
from transferops.scores.features import TargetScore
from transferops.scores.spectrum import spectrum_of_features


class Etran(TargetScore):
    """Streaming :func:`etran`. Keeps the features.

    Args:
        regression: the labels are floating-point targets [N] or [N, M].
        strength: as for :func:`etran`.
    """

    name = "etran"
    keeps_rows = True

    def __init__(self, *, regression: bool = False, strength: float = 5.0) -> None:
        self.regression = bool(regression)
        self.strength = check_positive("strength", strength)
        super().__init__()

    def _evaluate(self, data: Any) -> ScoreDetails:
        features = data[0] if self.regression else data.features
        samples, dimension = features.shape
        energy = float(negative_energies(features).mean())
        if self.regression:
            values, coefficients = spectrum_of_features(features, data[1])
            left = (data[1].square().sum(0) - coefficients.sum(1)).clamp(min=0)
            fit = -float(left.sum()) / data[1].numel()
            parts = {"energy": energy, "regression": fit}
            return ScoreDetails(energy + fit, samples, 0, dimension, rank=len(values), parts=parts)
        discriminant = Discriminant(data.moments, self.strength)
        posterior = discriminant.log_posterior(features).gather(1, data.index.unsqueeze(1))
        fit = float(posterior.exp().mean())
        caveat = f"etran: {discriminant.caveat}" if discriminant.caveat else ""
        if data.classes == 1:
            caveat = "etran: all samples are of one class, so there is nothing to tell apart"
        return ScoreDetails(
            energy + fit,
            samples,
            data.classes,
            dimension,
            shrinkage=discriminant.shrinkage,
            warnings=(caveat,) if caveat else (),
            parts={"energy": energy, "classification": fit},
        )


def etran(features: Tensor | Any, labels: Tensor | Any, *, strength: float = 5.0) -> float:
    """ETran's parts added up; higher means more transferable.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16.
        labels: [N] integers of any values for classification, or [N] or [N, M] floating-point targets for regression.
        strength: of the shrinkage, as for :func:`~transferops.scores.sfda`.

    Returns:
        energy + classification, or energy + regression, in float64.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a value is NaN or infinite, strength is not positive.

    Warns:
        ScoreWarning: a single class; constant features; classes without variance.
    """
    targets = as_tensor("labels", labels)
    return Etran(regression=targets.is_floating_point(), strength=strength)._once(features, targets)


def etran_ranking(details: Mapping[str, ScoreDetails]) -> dict[str, float]:
    """The scores by which ETran ranks models: each part brought to [0, 1] over the models, then added.

    Args:
        details: ``Etran().details()`` of every model, on the same target, by the model's name.

    Returns:
        A score per model, between 0 and the number of parts. A part that is the same for all models adds 0.

    Raises:
        ValueError: no models, or models with different parts.
    """
    names = {tuple(sorted(item.parts or ())) for item in details.values()}
    if len(names) != 1 or not (names - {()}):
        fail("details", "Etran details of the same kind for at least one model", describe(details))
    total = torch.zeros(len(details), dtype=torch.float64)
    for part in names.pop():
        values = torch.tensor([item.parts[part] for item in details.values() if item.parts], dtype=torch.float64)
        spread = values.max() - values.min()
        if spread > 0:
            total += (values - values.min()) / spread
    return dict(zip(details, total.tolist()))

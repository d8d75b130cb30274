"""The energy score: how much of the target looks like what the source model knows, without labels.

[paper: Liu et al., NeurIPS 2020, "Energy-based Out-of-distribution Detection"]: the free energy of a sample with logits
z is -T ln sum_c exp(z_c / T); the score is its negative, averaged over the samples. ETran (Gholami et al., ICCV 2023)
takes the features as logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from transferops._validate import as_tensor, check_positive, describe, fail
from transferops.scores.base import Collection, Score, ScoreDetails
from transferops.scores.moments import check_finite
from transferops.scores.rows import Rows


class Energy(Score):
    """Streaming :func:`energy`. Keeps one number per sample.

    Args:
        temperature: as for :func:`energy`.
    """

    name = "energy"
    takes = "logits"

    def __init__(self, *, temperature: float = 1.0) -> None:
        self.temperature = check_positive("temperature", temperature)
        super().__init__()

    def update(self, values: Tensor | Any, labels: Tensor | Any = None) -> Self:
        """Add a batch of logits [N, C]. Labels are taken for the sake of the common interface, and not looked at."""
        return super().update(values, labels)

    def _collection(self) -> Collection:
        return Rows(self._negative_energies)

    def _negative_energies(self, values: Any, labels: Any) -> tuple[Tensor, Tensor]:
        logits = as_tensor("logits", values).detach()
        if not logits.is_floating_point():
            fail("logits", "floating point", describe(logits), TypeError)
        if logits.dim() != 2 or logits.shape[1] == 0:
            fail("logits", "shape [N, C] with C >= 1", describe(logits))
        check_finite(logits, "logits")
        energies = negative_energies(logits, self.temperature)
        return energies, torch.zeros(len(logits), dtype=torch.bool, device=logits.device)

    def _evaluate(self, data: Any) -> ScoreDetails:
        energies, _ = data.all()
        deviation = float(energies.std()) if len(energies) > 1 else 0.0
        return ScoreDetails(float(energies.mean()), len(energies), 0, 0, parts={"standard_deviation": deviation})


def negative_energies(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T ln sum_c exp(z_c / T) of each row, [N] float64."""
    return temperature * (logits.double() / temperature).logsumexp(1)


def energy(logits: Tensor | Any, labels: Tensor | Any = None, *, temperature: float = 1.0) -> float:
    """Mean negative free energy of the target's samples under the source model; higher means more transferable.

    Args:
        logits: [N, C] floating point, of the source model; or features, as ETran takes them.
        labels: not looked at; taken so that all scores are called alike.
        temperature: T, positive.

    Returns:
        The mean of T ln sum_c exp(z_c / T). It does not compare models with different numbers or scales of logits.

    Raises:
        TypeError: logits is no array or not floating point.
        ValueError: logits is not [N, C], has no rows, or holds NaN or Inf; temperature is not positive.
    """
    return Energy(temperature=temperature)._once(logits, labels)

"""Means of models in weight space: over the steps of a training, and of two models.

Parameters are averaged. Buffers, such as the statistics of a normalisation layer, are those of the latest model: a
mean of variances is not the variance of the mean model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """Exponential mean of a model's parameters over optimiser steps.

    The k-th step enters with the weight 1 - min(decay, (k - 1)/k): the plain mean of the first 1/(1 - decay) steps,
    exponential from there on, so that the parameters before the first step have no part in it.

    Args:
        model: Its parameters are followed.
        decay: In [0, 1); the mean reaches back about 1/(1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._steps = 0
        self._mean = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take note of a step."""
        self._steps += 1
        weight = 1 - min(self._decay, (self._steps - 1) / self._steps)
        torch._foreach_lerp_(self._mean, [parameter.detach() for parameter in model.parameters()], weight)

    def applied(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` with the mean parameters."""
        return _with_parameters(model, self._mean)

    def state_dict(self) -> dict[str, Any]:
        """For :meth:`load_state_dict`."""
        return {"steps": self._steps, "mean": list(self._mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._steps = state["steps"]
        for own, value in zip(self._mean, state["mean"], strict=True):
            own.copy_(value)


def midpoint(first: nn.Module, latest: nn.Module) -> nn.Module:
    """A copy of ``latest`` whose parameters are the mean of both models'."""
    pairs = zip(first.parameters(), latest.parameters(), strict=True)
    return _with_parameters(latest, [torch.lerp(p.detach(), q.detach(), 0.5) for p, q in pairs])


@torch.no_grad()
def _with_parameters(model: nn.Module, values: list[torch.Tensor]) -> nn.Module:
    changed = copy.deepcopy(model)
    for parameter, value in zip(changed.parameters(), values, strict=True):
        parameter.copy_(value)
    return changed

"""How to train: one set of numbers for every strategy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from transferops._validate import check_positive_int, describe, fail

Dimension = int | Literal["auto", "parameters"]


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; the same for every strategy, so that they differ in their samples only.

    Args:
        epochs: At most so many.
        patience: Stop after so many epochs without a validation accuracy as good as the best.
        lr: Learning rate.
        batch_size: Largest batch.
        min_steps: Fewest optimiser steps in an epoch; the samples are passed over repeatedly to reach it.
        source_steps: Fewest optimiser steps of each source model, in whole passes over the source.
        dimension: The d of the risk formulas: "auto", "parameters" or a number, see
            :func:`resolve_dimension`.
        optimizer: Called as ``optimizer(parameters, lr=lr)``.
        device: Where to train.

    Raises:
        ValueError: If a number is out of range or the device does not work here.
    """

    epochs: int = 40
    patience: int = 15
    lr: float = 2e-3
    batch_size: int = 32
    min_steps: int = 20
    source_steps: int = 400
    dimension: Dimension = "auto"
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size", "min_steps", "source_steps"):
            check_positive_int(name, getattr(self, name))
        if not (self.lr > 0 and math.isfinite(self.lr)):
            fail("lr", "a positive number", describe(self.lr))
        if self.dimension not in ("auto", "parameters"):
            if isinstance(self.dimension, str):
                fail("dimension", "'auto', 'parameters' or an integer of at least 1", describe(self.dimension))
            check_positive_int("dimension", self.dimension)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # torch raises either, by device
            raise ValueError(f"device: expected one that works here, got {self.device!r}") from error

    def as_dict(self) -> dict[str, Any]:
        """The options by name, fit for JSON."""
        return {**vars(self), "optimizer": getattr(self.optimizer, "__name__", repr(self.optimizer))}


def resolve_dimension(dimension: Dimension, parameters: int, target_samples: int, classes: int) -> int:
    """The d of the risk formulas.

    "parameters" is the number of trained parameters [paper]. "auto" is the largest possible rank of the exact
    Fisher information on the target sample [derived]: each sample contributes a matrix of rank at most C - 1,
    so d is min(parameters, N0 (C - 1)). Any more would count directions that the target sample says nothing
    about; with all parameters of a network the rule degenerates to taking everything.

    Args:
        dimension: "auto", "parameters", or the number itself.
        parameters: Number of trained parameters.
        target_samples: N0.
        classes: C.
    """
    if dimension == "parameters":
        return parameters
    if dimension == "auto":
        return min(parameters, target_samples * (classes - 1))
    return dimension

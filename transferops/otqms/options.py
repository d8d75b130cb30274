"""How to train: one set of numbers for every strategy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from transferops._validate import check_positive_int, describe, fail
from transferops.fisher.directions import Selection

Dimension = int | Literal["auto", "parameters"]
BuiltInSchedule = Literal["constant", "cosine", "plateau"]
Schedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of every sample, ``[N]``."""
    return F.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; the same for every strategy, so that they differ in their samples only.

    Args:
        epochs: At most so many; of every phase of a strategy that has no number of its own.
        early_stopping: Whether validation samples choose the epoch to keep. If not, they are trained on like the rest
            of the target's samples, by every strategy, and the last epoch is kept: with few shots the samples are
            worth more than the choice. "folds" has both, at the cost of a training for each fold: cross-validation
            finds how long to train, then all samples are trained on, see
            :class:`transferops.otqms.cross_validation.CrossValidation`.
        patience: With early stopping, stop after so many epochs without a validation accuracy as good as the best;
            of no account with "folds".
        guard: Whether to make sure by cross-validation, before anything is trained on all samples, that the strategy
            is not worse than "target-only" and "all-sources" beyond chance, and otherwise to train the better of
            these two in its place. Costs a training for each fold and each of the three.
        folds: Parts that cross-validation cuts the target's samples into; no more than the rarest class has samples.
        screen: Whether strategies that survey leave out sources whose labels are arbitrary as far as the target's
            go, see :func:`transferops.otqms.screening.screen`.
        lr: Learning rate.
        batch_size: Largest batch, over all processes.
        min_steps: Fewest optimiser steps in an epoch; the samples are passed over repeatedly to reach it.
        source_steps: Fewest optimiser steps of each source model, in whole passes over the source.
        dimension: The d of the risk formulas: "auto", "parameters" or a number, see
            :func:`resolve_dimension`.
        optimizer: Called as ``optimizer(parameters, lr=lr)``.
        device: Where to train.
        schedule: "constant"; "cosine", from the learning rate to 0 over the epochs of a phase; "plateau", constant
            for 60 % of them, then linearly to 5 %; all three after a linear rise over the first 2 %. Or called as
            ``schedule(optimizer)``, a scheduler that is stepped after every epoch.
        loss: ``(logits, labels)`` to the loss of each sample, ``[N]``.
        accumulate: A step's batch is passed through the model in so many pieces.
        autocast: ``torch.bfloat16`` or ``torch.float16`` (with loss scaling) for the forward passes of the
            training; ``None``: the model's own precision.
        compile: Train through ``torch.compile``.
        channels_last: Lay images out with their channels last in memory, which convolutions on the CPU are much
            faster with, where the model accepts it.
        fisher: "exact", or "empirical", which vanishes with the training loss.
        directions: "models": differences to source models; "gradients": without any, one damped Newton step
            for each source, see :func:`transferops.otqms.discrepancy.newton_directions`.
        parameters: Which trainable parameters the discrepancies and d are over: "all", "head" (those of the
            last linear layer), a predicate on names, or names.
        resolve_every: Epochs from one decision to the next, where a strategy decides anew.
        budget: Samples of all sources in an epoch, for the strategies "budget" and "uniform", and draws in all for
            "recommended", "quantities" and "shares"; ``None``: half of what there is, and for "uniform" as many as
            "quantities-dynamic" takes.
        budget_seconds: Seconds of an epoch's steps, in the place of ``budget``, for the same strategies. What a sample
            of each source costs is measured (:func:`transferops.otqms.costs.measure`), so that runs differ by
            the noise of the clock unless they share a checkpoint.
        source_dtype: What source models are kept in, for example ``torch.bfloat16``; ``None``: their own.
        offload: Keep the source models in host memory and bring them to the device parameter by parameter.
        checkpoint_steps: Optimiser steps from one checkpoint to the next within an epoch.
        sharded: With several processes, keep gradients and the optimiser's state in shards, a part in each, see
            :mod:`transferops.otqms.sharding`, instead of whole in each (DistributedDataParallel).
        workers: Processes that read data sets ahead; none for tensors.
        cuda_graphs: On a GPU, replay the exact Fisher information of batches of one size from CUDA graphs, see
            :class:`transferops.fisher.FisherInformation`.

    Raises:
        ValueError: If a number is out of range or the device does not work here.
    """

    epochs: int = 16
    early_stopping: bool | Literal["folds"] = False
    patience: int = 15
    guard: bool = False
    folds: int = 5
    screen: bool = True
    lr: float = 8e-3
    batch_size: int = 64
    min_steps: int = 20
    source_steps: int = 400
    dimension: Dimension = "auto"
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    device: str = "cpu"
    schedule: Schedule | BuiltInSchedule = "cosine"
    loss: Loss = cross_entropy
    accumulate: int = 1
    autocast: torch.dtype | None = None
    compile: bool = False
    channels_last: bool = True
    fisher: Literal["exact", "empirical"] = "exact"
    directions: Literal["models", "gradients"] = "models"
    parameters: Selection | Literal["all", "head"] = "all"
    resolve_every: int = 1
    budget: int | None = None
    budget_seconds: float | None = None
    source_dtype: torch.dtype | None = None
    offload: bool = False
    checkpoint_steps: int = 200
    sharded: bool = False
    workers: int = 0
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        counts = ("epochs", "patience", "batch_size", "min_steps", "source_steps", "accumulate", "resolve_every")
        for name in (*counts, "checkpoint_steps"):
            check_positive_int(name, getattr(self, name))
        check_positive_int("workers", self.workers, minimum=0)
        check_positive_int("folds", self.folds, minimum=2)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "folds":
            fail("early_stopping", "True, False or 'folds'", describe(self.early_stopping))
        if self.guard and self.early_stopping is True:
            fail("guard", "early_stopping False or 'folds', which leave no sample out of the folds", "True")
        if self.budget is not None:
            check_positive_int("budget", self.budget)
        if self.budget_seconds is not None:
            if self.budget is not None:
                fail("budget_seconds", "None with a budget of samples", describe(self.budget_seconds))
            if not (self.budget_seconds > 0 and math.isfinite(self.budget_seconds)):
                fail("budget_seconds", "a positive number", describe(self.budget_seconds))
        if not (self.lr > 0 and math.isfinite(self.lr)):
            fail("lr", "a positive number", describe(self.lr))
        if self.dimension not in ("auto", "parameters"):
            if isinstance(self.dimension, str):
                fail("dimension", "'auto', 'parameters' or an integer of at least 1", describe(self.dimension))
            check_positive_int("dimension", self.dimension)
        for name, accepted in (("fisher", ("exact", "empirical")), ("directions", ("models", "gradients"))):
            if getattr(self, name) not in accepted:
                fail(name, " or ".join(repr(value) for value in accepted), describe(getattr(self, name)))
        if isinstance(self.schedule, str) and self.schedule not in get_args(BuiltInSchedule):
            fail("schedule", "'constant', 'cosine', 'plateau' or a function", describe(self.schedule))
        if isinstance(self.parameters, str) and self.parameters not in ("all", "head"):
            fail("parameters", "'all', 'head', a predicate or names", describe(self.parameters))
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            fail("autocast", "None, torch.bfloat16 or torch.float16", str(self.autocast))
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # torch raises either, by device
            raise ValueError(f"device: expected one that works here, got {self.device!r}") from error

    def as_dict(self) -> dict[str, Any]:
        """The options by name, fit for JSON."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def selection(self, model: nn.Module) -> Selection:
        """``parameters`` as a selection of ``model``'s names; ``None`` for all."""
        if not isinstance(self.parameters, str):
            return self.parameters
        return None if self.parameters == "all" else _head_parameters(model)


def head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The last linear layer of a model in the order of its modules, and its name.

    Raises:
        ValueError: There is none.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        fail("model", "a linear layer as its head", "none")
    return layers[-1]


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


def _head_parameters(model: nn.Module) -> list[str]:
    name, layer = head(model)
    prefix = f"{name}." if name else ""
    return [prefix + part for part, parameter in layer.named_parameters() if parameter.requires_grad]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    return getattr(value, "__name__", None) or str(value)

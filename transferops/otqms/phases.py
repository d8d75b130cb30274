"""What a strategy is made of: phases of training, each with a decision about the samples of its epochs.

A :class:`Phase` says what an epoch trains on, what the phase starts from, and how long it lasts; everything
else (drawing, training, validation, checkpoints, records) is the same for every phase of every strategy. What
is not trained at all but put together from the source models is a :class:`Construction`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import nn

from transferops.otqms.options import BuiltInSchedule

if TYPE_CHECKING:
    from transferops.otqms.pool import Pool
    from transferops.otqms.survey import Survey


Anchor = Literal["under", "exact", "over"]
"""How far a model is trained on the target alone: one epoch, until early stopping, or all epochs."""


@dataclass(frozen=True, eq=False)
class Situation:
    """What a strategy may look at before an epoch.

    Attributes:
        epoch: Counted from 1, in its phase.
        target_samples: N0, the target samples that are trained on.
        source_samples: N_i, the samples that each source has.
        dimension: The d of the risk formulas.
        parameters: How many are trained.
        gram: Computes A = Theta^T J Theta, float64 ``[K, K]``, at the current model; costly, so not called
            for you.
        anchor_gram: The same at a model trained on the target only, of the given :data:`Anchor`; computed once.
        released_gram: The matrix that the paper's released code uses instead of A.
        costs: Seconds that a sample of the target and of each source takes, ``K + 1`` numbers, measured.
        budget: Samples to take from all sources at most, where a budget is given.
        budget_seconds: Seconds that the steps of an epoch may take, where that is given.
        previous: The decision for the epoch before; ``None`` in the first.
        survey: What a look at all tasks from a common start has told, see :class:`transferops.otqms.survey.Survey`.
        samples: The samples: part 0 is the target, part i source i.
        model: The current model; not to be changed.
    """

    epoch: int
    target_samples: int
    source_samples: tuple[int, ...]
    dimension: float
    parameters: int
    gram: Callable[[], torch.Tensor]
    anchor_gram: Callable[[Anchor], torch.Tensor]
    released_gram: Callable[[], torch.Tensor]
    survey: Callable[[], Survey]
    costs: Callable[[], tuple[float, ...]]
    budget: int | None
    budget_seconds: float | None
    previous: Decision | None
    samples: Pool
    model: nn.Module


@dataclass(frozen=True)
class Decision:
    """What an epoch trains on.

    Attributes:
        quantities: Samples to draw from each source. More than a source has come in several rounds.
        predicted_risk: Expected risk in nats, where there is a prediction.
        target: Target samples to draw; ``None``: each once.
        weights: Loss weight of a sample of the target and of each source, ``K + 1`` numbers, or for each of
            them a number per class; only ratios matter. ``None``: all equal.
    """

    quantities: tuple[int, ...]
    predicted_risk: float | None = None
    target: int | None = None
    weights: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None


Decide = Callable[[Situation], Decision]


@dataclass(frozen=True)
class Phase:
    """A part of a training with one rule for its samples.

    Attributes:
        decide: What an epoch trains on.
        start: The model it starts from: the common initialisation, the kept model of the phase before, the
            source model of least loss on the target's labelled samples, or the common start of the survey.
        lr_factor: On the learning rate of the options.
        epochs: At most so many; ``None``: as in the options.
        steps: Fewest optimiser steps in an epoch; ``None``: as in the options.
        patience: As in the options; ``None``: those.
        batch_size: As in the options; ``None``: that.
        schedule: As in the options; ``None``: that.
        averaging: Decay per step of the exponential mean of the weights that is kept instead of the last ones, see
            :class:`transferops.otqms.averaging.WeightAverage`; ``None``: no mean.
        translation: Images are moved at random by up to this part of their sides, each time they come, see
            :func:`transferops.otqms.augmentation.draw_offsets`; 0: not at all. Anything but images is left as it is.
        halfway: Whether the mean of the model it starts from and the trained one is kept, in weight space.
        early_stopping: Whether the epoch is chosen on validation samples where the options say so; if not, the last
            is kept.
        decide_once: Whether the first decision is kept, whatever the options say.
        may_stay: Whether the model it starts from may be the one that is kept.
        name: For the records.
    """

    decide: Decide
    start: Literal["initial", "previous", "best-source", "survey"] = "initial"
    lr_factor: float = 1.0
    epochs: int | None = None
    steps: int | None = None
    patience: int | None = None
    batch_size: int | None = None
    schedule: BuiltInSchedule | None = None
    averaging: float | None = None
    translation: float = 0.0
    halfway: bool = False
    early_stopping: bool = True
    decide_once: bool = False
    may_stay: bool = False
    name: str = "train"


class Materials(Protocol):
    """What a construction is made from."""

    @property
    def samples(self) -> Pool: ...

    def source_models(self) -> list[nn.Module]: ...


Construction = Callable[[Materials], nn.Module]
"""Puts a model together from the source models and the target's samples, without training it."""


def everything(situation: Situation) -> Decision:
    """Every sample of every source."""
    return Decision(situation.source_samples)


def target_alone(situation: Situation) -> Decision:
    """Nothing from any source."""
    return Decision((0,) * len(situation.source_samples))


def shares(decision: Decision, target_samples: int) -> tuple[float, ...]:
    """The share of the loss that the target and each source have, ``K + 1`` numbers that sum to one.

    Weights that depend on the class are averaged over the classes.
    """
    counts = torch.tensor([target_samples if decision.target is None else decision.target, *decision.quantities])
    mass = counts.double()
    if decision.weights is not None:
        weights = torch.tensor(decision.weights, dtype=torch.float64)
        mass = mass * (weights if weights.dim() == 1 else weights.mean(1))
    return tuple((mass / mass.sum()).tolist())

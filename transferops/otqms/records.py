"""What the trainer notes down."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: Counted from 1, over all phases.
        quantities: Samples drawn from each source, by name.
        samples: Training samples: of the target and of all sources.
        train_loss: Mean (weighted) loss, cross-entropy in nats by default, measured while training.
        validation_loss: Mean cross-entropy in nats on the validation samples, or those watched; ``None`` without.
        validation_accuracy: Share of right answers on them; ``None`` without.
        predicted_risk: Expected risk of the decision in nats; ``None`` where the strategy predicts none.
        seconds: Wall time of the epoch in all, the training of source models apart.
        allocation_seconds: The part of ``seconds`` that went into the decision: Fisher information and
            allocation.
        phase: The name of its phase.
        shares: The share of the loss that each source has, by name; the target has the rest.
    """

    epoch: int
    quantities: dict[str, int]
    samples: int
    train_loss: float
    validation_loss: float | None
    validation_accuracy: float | None
    predicted_risk: float | None
    seconds: float
    allocation_seconds: float
    phase: str = "train"
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """One strategy trained with one seed.

    Attributes:
        strategy: Its name.
        epochs: Every epoch that was trained, the ones after the kept epoch included.
        kept_epoch: The epoch that ``model`` is from, counted from 1.
        source_model_seconds: Wall time of training the source models (and the model trained on the target
            only, as far as it is needed) if the strategy used them, else 0. The models are shared: each
            strategy that uses them reports the whole.
        model: The trained model in evaluation mode.
        gram: A = Theta^T J Theta, float64 ``[K, K]``, as it was last computed; ``None`` if never.
        replaced_by: The strategy that the guard had trained in the place of this one; ``None``: it did not.
        verdicts: What the guard found and decided, in sentences; empty without it.
        screening: What was found about sources that are not admitted at once, rejected ones among them, in sentences.
        cross_validation_seconds: Wall time of trainings with samples held out, for the guard and early stopping by
            folds; trainings that several strategies need are counted with the first.
    """

    strategy: str
    epochs: tuple[EpochRecord, ...]
    kept_epoch: int
    source_model_seconds: float
    model: nn.Module = field(repr=False)
    gram: torch.Tensor | None = field(default=None, repr=False)
    replaced_by: str | None = None
    verdicts: tuple[str, ...] = ()
    screening: tuple[str, ...] = ()
    cross_validation_seconds: float = 0.0

    @property
    def kept(self) -> EpochRecord:
        """The record of the kept epoch."""
        return self.epochs[self.kept_epoch - 1]

    @property
    def allocated(self) -> EpochRecord:
        """The last record up to the kept one of a phase with samples of a source; the kept one if none has.

        Where the last phase trains on the target alone, this is what the phase before it took.
        """
        before = self.epochs[: self.kept_epoch]
        phases = {record.phase for record in before if any(record.quantities.values())}
        return [record for record in before if record.phase in phases or not phases][-1]

    @property
    def samples_per_epoch(self) -> float:
        """Mean number of training samples per epoch."""
        return sum(record.samples for record in self.epochs) / len(self.epochs)

    @property
    def seconds(self) -> float:
        """Wall time of all epochs, validation and allocation included, the source models not."""
        return sum(record.seconds for record in self.epochs)

    @property
    def allocation_seconds(self) -> float:
        """Wall time of the decisions, a part of ``seconds``."""
        return sum(record.allocation_seconds for record in self.epochs)

"""A look at all tasks from a common start: how far apart they are, and how much the target's samples determine.

Differences between parameters mean something between models of the same basin, trained alike. So all models of
the survey start from one network that has seen the sources only, for two epochs: it is in a sensible place and
has not memorised the target. From there one model per source, one for the target and one for each half of the
target's labelled samples take the same schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transferops.otqms.phases import Decision, Phase, Situation
from transferops.otqms.pool import Pool, TensorSamples
from transferops.otqms.sampling import draw

WARM_UP_EPOCHS = 2
SOURCE_STEPS = 300
TARGET_STEPS = 100
_LR_FACTOR = 1.0
_WARM_UP_LR_FACTOR = 2.0


@dataclass(frozen=True, eq=False)
class Survey:
    """What the models of a survey say.

    Attributes:
        gram: A = Theta^T J Theta at the target's model, float64 ``[K, K]``.
        dimension: d as the distance of the halves' models measures it,
            :func:`transferops.otqms.dimension.distance_dimension`.
        seconds: Wall time of the trainings.
    """

    gram: torch.Tensor
    dimension: float
    seconds: float


def warm_up() -> Phase:
    """All sources, without the target."""

    def decide(situation: Situation) -> Decision:
        return Decision(situation.source_samples, target=0)

    return Phase(
        decide,
        epochs=WARM_UP_EPOCHS,
        lr_factor=_WARM_UP_LR_FACTOR,
        schedule="cosine",
        early_stopping=False,
        name="warm-up",
    )


def probe(source: int | None, steps: int, batch_size: int) -> Phase:
    """A source alone, or the target alone, for so many steps of full batches."""

    def decide(situation: Situation) -> Decision:
        wanted = steps * batch_size
        taken = tuple(wanted if i == source else 0 for i in range(len(situation.source_samples)))
        return Decision(taken, target=wanted if source is None else 0)

    return Phase(
        decide,
        epochs=1,
        steps=1,
        lr_factor=_LR_FACTOR,
        schedule="cosine",
        early_stopping=False,
        name="survey",
    )


def halves(samples: Pool, generator: torch.Generator) -> tuple[TensorSamples, TensorSamples]:
    """The target, part 0, cut into two stratified halves at random."""
    inputs, labels = zip(*samples.batches(samples.positions(0)), strict=True)
    whole = TensorSamples(torch.cat(inputs), torch.cat(labels))
    order = draw(samples.part_labels(0), len(whole), generator)
    by_class = order[samples.part_labels(0)[order].argsort(stable=True)]
    first, second = by_class[0::2], by_class[1::2]
    return (
        TensorSamples(whole.inputs[first], whole.labels[first]),
        TensorSamples(whole.inputs[second], whole.labels[second]),
    )

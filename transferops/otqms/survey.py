"""A look at all tasks from a common start: how far apart they are, and how much the target's samples determine.

Differences between parameters mean something between models of the same basin, trained alike. So all models of
the survey start from one network that has seen the sources only, for two epochs: it is in a sensible place and
has not memorised the target. From there go one model per source and one for each half of the target's labelled
samples. The mean of the halves' models in weight space is theta_0, the target's model: its Fisher information measures
all distances, that between the halves included, so that A and the noise of theta_0 are on one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transferops._validate import fail
from transferops.otqms.dimension import distance_dimension
from transferops.otqms.phases import Decide, Decision, Phase, Situation, target_alone
from transferops.otqms.pool import Pool, TensorSamples
from transferops.otqms.sampling import draw
from transferops.otqms.screening import Screening
from transferops.otqms.semidefinite import pull, shrink

WARM_UP_EPOCHS = 2
SOURCE_STEPS = 80
HALF_STEPS = 50
_LR_FACTOR = 0.25
_WARM_UP_LR_FACTOR = 0.5
_HALF_BATCH = 32
_LEAST_DIMENSION = 1e-6  # halves that agree exactly leave no noise to average out


@dataclass(frozen=True, eq=False)
class Survey:
    """What the models of a survey say.

    Attributes:
        gram: A = Theta^T J Theta at theta_0, float64 ``[K, K]``.
        dimension: d as the distance of the halves' models measures it, see :func:`measured_dimension`; d/N0 is the
            noise of theta_0.
        seconds: Wall time of the trainings.
        screening: Which sources the common start has seen and which are to be trained on.
    """

    gram: torch.Tensor
    dimension: float
    seconds: float
    screening: Screening

    def available(self, source_samples: Sequence[int]) -> tuple[int, ...]:
        """N_i, and 0 for sources that are rejected."""
        return tuple(samples if i in self.screening.kept else 0 for i, samples in enumerate(source_samples))

    def shrunk(self, target_samples: int, source_samples: Sequence[int]) -> torch.Tensor:
        """A as quantities are found by it, see :func:`transferops.otqms.semidefinite.shrink`."""
        available = self.available(source_samples)
        if not any(available):
            return self.gram
        return torch.from_numpy(shrink(self.gram, available, 1 / target_samples))

    def explain(self, target_samples: int, source_samples: Sequence[int]) -> list[str]:
        """How far A is shrunk and what that means, in a sentence; none without a source to train on."""
        available = self.available(source_samples)
        if not any(available):
            return []
        moved = pull(self.gram, available, 1 / target_samples)
        return [
            f"target: its estimate is moved {moved:.0%} of the way to the mean of the sources before they are compared "
            "(0%: they are told apart as measured; 100%: the noise of the estimate is all there is, and they are all "
            "taken alike)"
        ]


def measured_dimension(squared_distance: float, first_samples: int, second_samples: int) -> float:
    """:func:`transferops.otqms.dimension.distance_dimension` of the halves' models, made positive."""
    found = float(distance_dimension(max(squared_distance, 0.0), first_samples, second_samples))
    return max(found, _LEAST_DIMENSION)


def warm_up(sources: Sequence[int]) -> Phase:
    """All of these sources, without the target."""

    def decide(situation: Situation) -> Decision:
        sizes = situation.source_samples
        return Decision(tuple(size if i in sources else 0 for i, size in enumerate(sizes)), target=0)

    return Phase(
        decide,
        epochs=WARM_UP_EPOCHS,
        lr_factor=_WARM_UP_LR_FACTOR,
        schedule="constant",
        early_stopping=False,
        name="warm-up",
    )


def source_probe(source: int, batch_size: int) -> Phase:
    """A source alone, for so many steps of full batches, however many samples it has."""

    def decide(situation: Situation) -> Decision:
        sizes = situation.source_samples
        return Decision(tuple(SOURCE_STEPS * batch_size if i == source else 0 for i in range(len(sizes))), target=0)

    return _probe(decide, 1, None)


def half_probe() -> Phase:
    """Half of the target alone, in whole passes."""
    return _probe(target_alone, HALF_STEPS, _HALF_BATCH)


def _probe(decide: Decide, steps: int, batch_size: int | None) -> Phase:
    return Phase(
        decide,
        epochs=1,
        steps=steps,
        batch_size=batch_size,
        lr_factor=_LR_FACTOR,
        schedule="cosine",
        early_stopping=False,
        name="survey",
    )


def halves(samples: Pool, generator: torch.Generator) -> tuple[TensorSamples, TensorSamples]:
    """The target, part 0, cut into two stratified halves at random.

    Raises:
        ValueError: It has a single sample.
    """
    if samples.sizes[0] < 2:
        fail("target", "at least 2 samples for a survey, which compares models of two halves", "1")
    inputs, labels = zip(*samples.batches(samples.positions(0)), strict=True)
    whole = TensorSamples(torch.cat(inputs), torch.cat(labels))
    order = draw(samples.part_labels(0), len(whole), generator)
    by_class = order[samples.part_labels(0)[order].argsort(stable=True)]
    first, second = by_class[0::2], by_class[1::2]
    return (
        TensorSamples(whole.inputs[first], whole.labels[first]),
        TensorSamples(whole.inputs[second], whole.labels[second]),
    )

"""Sources as candidates: a model trained on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from transferops.otqms import OTQMS, TrainingOptions
from transferops.otqms.pool import Source
from transferops.rank.candidates import Candidate


def source_candidates(
    model: Callable[[], nn.Module],
    target: Source,
    sources: Mapping[str, Source],
    *,
    options: TrainingOptions | None = None,
    seed: int = 0,
) -> dict[str, Candidate]:
    """One model per source, trained as OTQMS trains its source models: from one initialisation, equally long.

    Args:
        model: Makes the network, a module from inputs to logits.
        target: Samples of the target; looked at for their classes only.
        sources: Samples of each source, by name.
        options: How to train.
        seed: Of the initialisation and the order of samples.

    Returns:
        Candidates by the name of their source.
    """
    trainer = OTQMS(model, target, sources, options=options, seed=seed)
    return {name: Candidate(name, trained) for name, trained in zip(sources, trainer.source_models(), strict=True)}

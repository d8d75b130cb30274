"""Scores that compare the data of a source with those of the target, not features of one with labels of the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from transferops._validate import check_positive_int, fail
from transferops.scores import PrincipalGradientExpectation

_TARGET = "\0target"  # no source's name


class LabelledTensors(Protocol):
    """Anything with ``inputs`` ``[N, ...]`` and ``labels`` int64 ``[N]``, such as a domain."""

    @property
    def inputs(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


def gradient_relations(
    model: Callable[[], nn.Module],
    target: LabelledTensors,
    sources: Mapping[str, LabelledTensors],
    *,
    restarts: int = 8,
    samples: int = 256,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How alike the principal gradient expectations of the target and of each source are.

    All see the same initialisations. As many samples are taken of each, the expectation being over batches of one size:
    a larger batch has a smaller gradient noise, and so a smaller norm.

    Args:
        model: Makes the network.
        target: Labelled samples of the target.
        sources: Those of each source, by name, with labels of the same meaning.
        restarts: Initialisations.
        samples: Of the target and of each source at most, drawn at random; all take as many as the smallest has.
        seed: Of the initialisations and of the samples.

    Returns:
        "pge" (minus the gap) and "pge_cosine", each by source; higher promises more. See
        :class:`transferops.scores.PrincipalGradientExpectation`.

    Raises:
        ValueError: No sources, or as ``PrincipalGradientExpectation``.
    """
    if not sources:
        fail("sources", "at least one source", "none")
    tasks = {_TARGET: target, **sources}
    count = min(check_positive_int("samples", samples), *(len(task.labels) for task in tasks.values()))
    expectation = PrincipalGradientExpectation(model(), restarts=restarts, seed=seed)
    for name, task in tasks.items():
        index = torch.randperm(len(task.labels), generator=torch.Generator().manual_seed(seed))[:count]
        expectation.update(name, task.inputs[index], task.labels[index])
    result = expectation.compute()
    return {
        "pge": {name: -float(result.gap[0, 1 + i]) for i, name in enumerate(sources)},
        "pge_cosine": {name: float(result.cosine[0, 1 + i]) for i, name in enumerate(sources)},
    }

"""Strategies: before every epoch, how many samples to draw from each source.

A strategy is one function from a :class:`Situation` to a :class:`Decision`, registered under the name it has
in options, tables and files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from transferops._validate import fail
from transferops.otqms.allocation import allocate


@dataclass(frozen=True)
class Situation:
    """What a strategy may look at before an epoch.

    Attributes:
        epoch: Counted from 1.
        target_samples: N0, the target samples that are trained on.
        source_samples: N_i, the samples that each source has.
        dimension: The d of the risk formulas.
        gram: Computes A = Theta^T J Theta, float64 ``[K, K]``, at the current model; costly, so not called
            for you.
    """

    epoch: int
    target_samples: int
    source_samples: tuple[int, ...]
    dimension: float
    gram: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Decision:
    """How many samples to draw from each source, and the risk predicted for that where there is one."""

    quantities: tuple[int, ...]
    predicted_risk: float | None = None


Decide = Callable[[Situation], Decision]


@dataclass(frozen=True)
class Strategy:
    """A way to decide, and whether it needs the source models (that is, calls ``Situation.gram``)."""

    decide: Decide
    uses_source_models: bool


STRATEGIES: dict[str, Strategy] = {}


def register(name: str, *, uses_source_models: bool = False) -> Callable[[Decide], Decide]:
    """Decorator that makes a function known as strategy ``name``.

    Args:
        name: A new name.
        uses_source_models: Whether the function calls ``Situation.gram``: the source models are then trained
            before the first epoch, and their time is reported apart from it.

    Raises:
        ValueError: If the name is taken.
    """
    if name in STRATEGIES:
        fail("name", "a name that is not taken", repr(name))

    def add(decide: Decide) -> Decide:
        STRATEGIES[name] = Strategy(decide, uses_source_models)
        return decide

    return add


def check_strategies(names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``names`` are registered, each once, and at least one."""
    for name in names:
        if name not in STRATEGIES:
            fail("strategy", f"names among {', '.join(STRATEGIES)}", repr(name))
    if not names or len(set(names)) < len(names):
        fail("strategy", "at least one name, each once", ", ".join(names) or "none")


@register("target-only")
def target_only(situation: Situation) -> Decision:
    """Nothing from any source."""
    return Decision(tuple(0 for _ in situation.source_samples))


@register("all-sources")
def all_sources(situation: Situation) -> Decision:
    """Everything from every source."""
    return Decision(situation.source_samples)


@register("quantities", uses_source_models=True)
def quantities(situation: Situation) -> Decision:
    """OTQMS, dynamic [paper]: the quantities of least predicted risk, found anew at the current model.

    The one quadratic programme that finds them is [derived], see :func:`transferops.otqms.allocate`.
    """
    allocation = allocate(situation.gram(), situation.target_samples, situation.source_samples, situation.dimension)
    return Decision(tuple(allocation.rounded().tolist()), float(allocation.risk))

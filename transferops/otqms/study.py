"""Strategies compared: each trained with several seeds, and only then measured on the test part."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import nn

from transferops._validate import fail
from transferops.otqms.options import TrainingOptions
from transferops.otqms.pool import Pool, Samples
from transferops.otqms.records import EpochRecord, TrainingRun
from transferops.otqms.strategies import check_strategies
from transferops.otqms.trainer import OTQMS
from transferops.otqms.training import evaluate


class Split(Protocol):
    """A target in three parts, such as :class:`transferops.data.FewShotSplit`."""

    @property
    def train(self) -> Samples: ...

    @property
    def validation(self) -> Samples | None: ...

    @property
    def test(self) -> Samples: ...


@dataclass(frozen=True, eq=False)
class Trial:
    """One strategy with one seed.

    Attributes:
        seed: Of split, initialisation and every draw.
        run: How it was trained.
        accuracy: On the test part.
    """

    seed: int
    run: TrainingRun
    accuracy: float


@dataclass(frozen=True, eq=False)
class Study:
    """The trials of every strategy.

    Attributes:
        trials: By strategy, one trial per seed.
        sources: Samples that each source has, by name.
        dimension: The d of the risk formulas.
    """

    trials: Mapping[str, Sequence[Trial]]
    sources: Mapping[str, int]
    dimension: int


def compare(
    model: Callable[[], nn.Module],
    split: Callable[[int], Split],
    sources: Mapping[str, Samples],
    *,
    strategies: Sequence[str] = ("target-only", "all-sources", "quantities"),
    seeds: Sequence[int] = (0, 1, 2),
    options: TrainingOptions | None = None,
    on_epoch: Callable[[str, int, EpochRecord], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Study:
    """Train every strategy with every seed.

    A seed fixes the split, the initialisation and every draw, for all strategies alike: their differences are
    paired.

    Args:
        model: Makes the network, see :class:`OTQMS`.
        split: Cuts the target, given a seed.
        sources: Samples of each source, by name.
        strategies: Names in :data:`transferops.otqms.STRATEGIES`.
        seeds: At least one, each once.
        options: How to train.
        on_epoch: Called with strategy, seed and record after every epoch.
        checkpoint: A folder: finished trainings found there are not repeated, interrupted ones are gone on with.

    Raises:
        ValueError: If a strategy is unknown, or names or seeds are missing or repeated.
        RuntimeError: If a training diverges.
    """
    check_strategies(strategies)
    if not seeds or len(set(seeds)) < len(seeds):
        fail("seeds", "at least one seed, each once", str(list(seeds)))
    trials: dict[str, list[Trial]] = {strategy: [] for strategy in strategies}
    dimension = 0
    for seed in seeds:
        parts = split(seed)
        trainer = OTQMS(
            model, parts.train, sources, validation=parts.validation, options=options, seed=seed, checkpoint=checkpoint
        )
        dimension = trainer.dimension
        runs = [trainer.fit(strategy, on_epoch and partial(on_epoch, strategy, seed)) for strategy in strategies]
        test = Pool({"test": parts.test}, trainer.device)
        for run in runs:
            trials[run.strategy].append(Trial(seed, run, evaluate(run.model, test).accuracy))
    return Study(trials, {name: len(samples.labels) for name, samples in sources.items()}, dimension)

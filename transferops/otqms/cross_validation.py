"""Target samples held out in turn: how long to train, and whether a strategy is to be trusted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch

from transferops._validate import fail
from transferops.otqms.distributed import World
from transferops.otqms.fitting import fit
from transferops.otqms.guard import Choice, choose
from transferops.otqms.phases import Phase
from transferops.otqms.pool import Pool
from transferops.otqms.preparation import Preparation
from transferops.otqms.records import EpochRecord
from transferops.otqms.sampling import draw
from transferops.otqms.strategies import STRATEGIES
from transferops.otqms.surroundings import stream_seed
from transferops.otqms.theory import FloatArray
from transferops.otqms.training import misclassified

FALLBACKS = ("target-only", "all-sources")
"""What a strategy must not be worse than."""


class CrossValidation:
    """The target's samples in stratified folds, each held out once from a training on the others.

    The trainings share seed, initialisation, source models and whatever else knows no target sample; every one has a
    checkpoint of its own. What was found is remembered.

    Args:
        whole: What all of the target's samples are trained on with.
        folds: How many; as many as the rarest class has samples if that is fewer.

    Attributes:
        seconds: Wall time so far.

    Raises:
        ValueError: If a class has a single sample.
    """

    def __init__(self, whole: Preparation, folds: int) -> None:
        labels = whole.samples.part_labels(0)
        rarest = int(torch.unique(labels, return_counts=True)[1].min())
        if rarest < 2:
            fail("target", "at least 2 samples of every class for cross-validation", "a class with 1")
        generator = torch.Generator().manual_seed(stream_seed(whole.around.seed, "folds"))
        self.seconds = 0.0
        self._whole = whole
        self._folds = stratified_folds(labels, min(folds, rarest), generator)
        self._prepared: dict[tuple[int, bool], Preparation] = {}
        self._epochs: dict[str, tuple[int, ...]] = {}
        self._errors: dict[str, FloatArray] = {}

    def epochs(self, strategy: str) -> tuple[int, ...]:
        """Epochs of each phase after which the held-out samples of all folds are right most often; of several the most.

        In every fold each phase goes on to its end, and the next one starts from the epoch that is best there. Phases
        that do not stop early have all their epochs.
        """
        if strategy not in self._epochs:
            start = perf_counter()
            phases = STRATEGIES[strategy].phases
            lengths = [phase.epochs or self._whole.options.epochs for phase in phases]
            right = [np.zeros(length + 1) for length in lengths]  # after so many epochs, 0 included
            for number, fold in enumerate(self._folds if any(phase.early_stopping for phase in phases) else ()):
                run = fit(self._fold(number, validated=True), strategy, patient=True)
                for total, accuracies in zip(right, _by_phase(run.epochs, lengths), strict=True):
                    total += np.round(accuracies * len(fold))
            self._epochs[strategy] = tuple(
                _latest_best(total, phase) if phase.early_stopping else length
                for phase, total, length in zip(phases, right, lengths, strict=True)
            )
            self.seconds += perf_counter() - start
        return self._epochs[strategy]

    def errors(self, strategy: str) -> FloatArray:
        """1 for each target sample that a model trained without it gets wrong, 0 for the others; float64 ``[N0]``."""
        if strategy not in self._errors:
            planned = self.planned(strategy)
            start = perf_counter()
            found = [
                misclassified(fit(self._fold(number, validated=False), strategy, planned=planned).model, held_out)
                for number, held_out in enumerate(self._held_out())
            ]
            errors = torch.cat(found).double()
            World.current().send([errors])  # so that no two processes can choose differently
            self._errors[strategy] = errors.numpy()
            self.seconds += perf_counter() - start
        return self._errors[strategy]

    def planned(self, strategy: str) -> tuple[int, ...] | None:
        """:meth:`epochs` where they are to be found so; ``None``: all there are."""
        return self.epochs(strategy) if self._whole.options.early_stopping == "folds" else None

    def choice(self, strategy: str) -> Choice:
        """The strategy, or what is to be trained in its place, see :func:`transferops.otqms.guard.choose`."""
        return choose(strategy, {name: self.errors(name) for name in dict.fromkeys((strategy, *FALLBACKS))})

    def _held_out(self) -> list[Pool]:
        positions = self._whole.samples.positions(0)
        return [self._whole.samples.choose({"validation": positions[fold]}) for fold in self._folds]

    def _fold(self, number: int, validated: bool) -> Preparation:
        """What a fold is trained with; its held-out samples are looked at only if ``validated``."""
        if (number, validated) not in self._prepared:
            whole = self._whole
            kept = torch.ones(whole.samples.sizes[0], dtype=torch.bool)
            kept[self._folds[number]] = False
            parts = {name: whole.samples.positions(part) for part, name in enumerate(whole.samples.names)}
            parts["target"] = parts["target"][kept]
            folder, name = whole.around.folder, f"fold-{number}" + ("-validated" if validated else "")
            around = dataclasses.replace(
                whole.around,
                samples=whole.samples.choose(parts),
                validation=None,
                watched=None,
                folder=None if folder is None else folder / name,
            )
            watched = dataclasses.replace(around, validation=self._held_out()[number]) if validated else around
            self._prepared[number, validated] = Preparation(
                watched, around, whole.parameters, whole.classes, whole=whole
            )
        return self._prepared[number, validated]


def stratified_folds(labels: torch.Tensor, folds: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Positions ``0 .. N - 1`` in so many disjoint parts, classes and sizes as even as can be."""
    order = draw(labels, len(labels), generator)
    by_class = order[labels[order].argsort(stable=True)]
    return [by_class[number::folds] for number in range(folds)]


def _by_phase(records: Sequence[EpochRecord], lengths: Sequence[int]) -> list[FloatArray]:
    """Validation accuracies after 0, 1, ... epochs of each phase, 0 where there is none.

    After 0 epochs a phase is where the one before it was best.
    """
    accuracies = [record.validation_accuracy or 0.0 for record in records]
    result, first, best = [], 0, 0.0
    for length in lengths:
        own = np.array([best, *accuracies[first : first + length]])
        result.append(own)
        first, best = first + length, float(own.max())
    return result


def _latest_best(right: FloatArray, phase: Phase) -> int:
    least = 0 if phase.may_stay else 1
    return least + int(np.flatnonzero(right[least:] == right[least:].max())[-1])

"""A study as JSON, with enough in it to draw every picture again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from transferops._atomic import replacing
from transferops._validate import fail
from transferops.otqms.records import EpochRecord
from transferops.otqms.study import Study, Trial


def to_json(study: Study, **about: Any) -> dict[str, Any]:
    """The document that ``transferops otqms --json`` writes.

    Args:
        study: The trials.
        about: More top-level entries, such as ``target`` and ``shots``.

    Returns:
        ``strategies`` (by name, see below), ``sources`` (names), ``source_samples`` (by name), ``seeds``,
        ``dimension``, ``versions`` and ``about``. Per strategy, each a list with one entry per seed:

        * ``accuracy``: on the test part.
        * ``samples_per_epoch``: mean number of training samples per epoch, those of the target included.
        * ``seconds``: wall time of training, with validation and allocation, without the source models.
        * ``allocation_seconds``: the part of it for Fisher information and allocation.
        * ``source_model_seconds``: wall time of the source models where the strategy uses them, else 0.
        * ``cross_validation_seconds``: wall time of trainings with samples held out, for guard and early stopping.
        * ``screening``: what was found about sources that were not admitted at once, sentences.
        * ``guard``: what the guard compared and decided, sentences; none without it.
        * ``replaced_by``: the strategy that the guard had trained in its place; ``null``: none.
        * ``kept_epoch``: the epoch of the tested model, counted from 1.
        * ``samples_by_epoch``, ``train_loss_by_epoch``: a list over epochs each.
        * ``validation_accuracy_by_epoch``, ``predicted_risk_by_epoch``: likewise; ``null`` where there is none.
        * ``quantities``: by source, the samples in the last epoch up to the kept one that took any.
        * ``weights``: by source, its share of the loss in that epoch; the target has the rest.
        * ``quantities_by_epoch``: by source, a list over epochs each.
    """
    seeds = [trial.seed for trial in next(iter(study.trials.values()))]
    return {
        **about,
        "sources": list(study.sources),
        "source_samples": dict(study.sources),
        "seeds": seeds,
        "dimension": study.dimension,
        "strategies": {name: _strategy(trials, list(study.sources)) for name, trials in study.trials.items()},
        "versions": versions(),
    }


def write_json(document: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a document whole or not at all.

    Args:
        document: What JSON can hold.
        path: Of the file, replaced if it is there.

    Raises:
        OSError: If it cannot be written; what was there is left.
        ValueError: If a number is not finite (JSON has no such thing).
    """
    try:
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        fail("document", "finite numbers, which JSON can hold", str(error))
    with replacing(path) as file:
        file.write(text.encode())


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from transferops import __version__

    return {
        "transferops": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _strategy(trials: Sequence[Trial], sources: Sequence[str]) -> dict[str, Any]:
    def by_epoch(read: Callable[[EpochRecord], Any]) -> list[list[Any]]:
        return [[read(record) for record in trial.run.epochs] for trial in trials]

    runs = [trial.run for trial in trials]
    return {
        "accuracy": [trial.accuracy for trial in trials],
        "samples_per_epoch": [run.samples_per_epoch for run in runs],
        "seconds": [run.seconds for run in runs],
        "allocation_seconds": [run.allocation_seconds for run in runs],
        "source_model_seconds": [run.source_model_seconds for run in runs],
        "cross_validation_seconds": [run.cross_validation_seconds for run in runs],
        "screening": [list(run.screening) for run in runs],
        "guard": [list(run.verdicts) for run in runs],
        "replaced_by": [run.replaced_by for run in runs],
        "kept_epoch": [run.kept_epoch for run in runs],
        "samples_by_epoch": by_epoch(lambda record: record.samples),
        "train_loss_by_epoch": by_epoch(lambda record: record.train_loss),
        "validation_accuracy_by_epoch": by_epoch(lambda record: record.validation_accuracy),
        "predicted_risk_by_epoch": by_epoch(lambda record: record.predicted_risk),
        "quantities": {source: [run.allocated.quantities[source] for run in runs] for source in sources},
        "weights": {source: [run.allocated.shares.get(source) for run in runs] for source in sources},
        "quantities_by_epoch": {
            source: [[record.quantities[source] for record in run.epochs] for run in runs] for source in sources
        },
    }

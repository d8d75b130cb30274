"""One strategy trained: through its phases, or put together from the source models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from transferops.otqms.phases import Construction
from transferops.otqms.preparation import Preparation
from transferops.otqms.records import EpochRecord, TrainingRun
from transferops.otqms.strategies import STRATEGIES, Strategy
from transferops.otqms.surroundings import stream_seed
from transferops.otqms.training import evaluate

OnEpoch = Callable[[EpochRecord], None]


def fit(
    prepared: Preparation,
    strategy: str,
    *,
    planned: Sequence[int] | None = None,
    patient: bool = False,
    on_epoch: OnEpoch | None = None,
) -> TrainingRun:
    """Train with one strategy.

    Args:
        prepared: What it trains on and with.
        strategy: Its name.
        planned: Epochs of each phase, where early stopping is not to choose them.
        patient: Whether every phase goes on to its end, whatever its epochs validate at.
        on_epoch: Called with the record of every epoch.

    Returns:
        The kept model and the records.
    """
    plan = STRATEGIES[strategy]
    preparation = _prepare(prepared, plan)
    if plan.construction is not None:
        return _construct(prepared, strategy, plan.construction, preparation, on_epoch)
    run = prepared.run(
        strategy,
        "training",
        plan.phases,
        around=prepared.labelled if plan.all_labels else prepared.around,
        planned=planned,
        patient=patient,
        on_epoch=on_epoch,
    )
    model = run.complete()
    told = prepared.screening.sentences if plan.surveys else ()
    return TrainingRun(strategy, tuple(run.records), run.kept_epoch, preparation, model, run.gram, screening=told)


def _prepare(prepared: Preparation, plan: Strategy) -> float:
    """Train what the strategy needs beforehand; the seconds it took."""
    seconds = 0.0
    if plan.uses_source_models and prepared.options.directions == "models":
        seconds += prepared.sources[1]
    if plan.anchor is not None:
        seconds += prepared.anchor(plan.anchor)[1]
    if plan.surveys:
        seconds += prepared.survey(plan.all_labels).seconds
    return seconds


def _construct(
    prepared: Preparation, strategy: str, construction: Construction, preparation: float, on_epoch: OnEpoch | None
) -> TrainingRun:
    """A run of one epoch that took nothing from the sources."""
    start = perf_counter()
    device, around = prepared.device, prepared.around
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(stream_seed(around.seed, "construction"))
        model = construction(prepared).to(device).eval()
    assessed = None if around.validation is None else evaluate(model, around.validation)
    record = EpochRecord(
        epoch=1,
        quantities=dict.fromkeys(prepared.source_names, 0),
        samples=around.samples.sizes[0],
        train_loss=evaluate(model, around.samples, 0).loss,
        validation_loss=None if assessed is None else assessed.loss,
        validation_accuracy=None if assessed is None else assessed.accuracy,
        predicted_risk=None,
        seconds=perf_counter() - start,
        allocation_seconds=0.0,
        phase="construct",
        shares=dict.fromkeys(prepared.source_names, 0.0),
    )
    if on_epoch is not None:
        on_epoch(record)
    return TrainingRun(strategy, (record,), 1, preparation, model)

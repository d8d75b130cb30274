"""What a study says, in numbers per strategy and in plain sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from transferops._paired import in_words
from transferops.otqms.records import EpochRecord, TrainingRun
from transferops.otqms.study import Study, Trial

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error, ``None`` from a single seed."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of one value per seed."""
        return cls(fmean(values), stdev(values) / sqrt(len(values)) if len(values) > 1 else None)


@dataclass(frozen=True)
class StrategySummary:
    """One strategy, averaged over seeds; the terms are those of :class:`transferops.otqms.TrainingRun`.

    ``quantities`` are samples by source in the last epoch up to the kept one that took any, ``shares`` their part
    of the loss; ``predicts`` is whether the strategy weighs the sources by a predicted risk, ``weighted`` whether
    some samples count more than others.
    """

    name: str
    accuracy: Mean
    samples_per_epoch: float
    seconds: float
    allocation_seconds: float
    source_model_seconds: float
    quantities: dict[str, float]
    shares: dict[str, float]
    predicts: bool
    weighted: bool


def summarize(study: Study) -> list[StrategySummary]:
    """One summary per strategy, in the order of the study."""
    return [_summarize(name, trials, list(study.sources)) for name, trials in study.trials.items()]


def conclusions(study: Study) -> list[str]:
    """Plain sentences: which sources and strategies were given up, what was taken from where, and whether it paid."""
    runs = [(trial.seed, trial.run) for trials in study.trials.values() for trial in trials]
    told = [(seed, sentence) for seed, run in runs for sentence in (*run.screening, *run.verdicts[-1:])]
    sentences = [f"Seed {seed}: {sentence}." for seed, sentence in dict.fromkeys(told)]
    for summary in summarize(study):
        if not summary.predicts:
            continue
        sentences.append(_taken(summary, study))
        sentences.extend(
            _compared(summary.name, other, study) for other in ("all-sources", "target-only") if other in study.trials
        )
    return sentences


def _summarize(name: str, trials: Sequence[Trial], sources: Sequence[str]) -> StrategySummary:
    def mean(read: Callable[[TrainingRun], float]) -> float:
        return fmean(read(trial.run) for trial in trials)

    return StrategySummary(
        name=name,
        accuracy=Mean.of([trial.accuracy for trial in trials]),
        samples_per_epoch=mean(lambda run: run.samples_per_epoch),
        seconds=mean(lambda run: run.seconds),
        allocation_seconds=mean(lambda run: run.allocation_seconds),
        source_model_seconds=mean(lambda run: run.source_model_seconds),
        quantities={source: fmean(trial.run.allocated.quantities[source] for trial in trials) for source in sources},
        shares={source: fmean(trial.run.allocated.shares.get(source, 0.0) for trial in trials) for source in sources},
        predicts=trials[0].run.allocated.predicted_risk is not None,
        weighted=any(_is_weighted(trial.run.allocated) for trial in trials),
    )


def _is_weighted(record: EpochRecord) -> bool:
    """Whether the shares of the loss are not those of the samples."""
    return any(
        abs(share - record.quantities[source] / record.samples) > _ROUNDING for source, share in record.shares.items()
    )


def _taken(summary: StrategySummary, study: Study) -> str:
    shares = {source: summary.quantities[source] / available for source, available in study.sources.items()}
    most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    total = sum(summary.quantities.values()) / sum(study.sources.values())
    sentence = f"{summary.name} took {total:.0%} of the source samples in the epoch that was kept"
    if round(100 * shares[most]) == round(100 * shares[least]):
        return f"{sentence}, from every source alike."
    return f"{sentence}: most of {most} ({shares[most]:.0%}), least of {least} ({shares[least]:.0%})."


def _compared(name: str, other: str, study: Study) -> str:
    """``name`` against ``other`` by the differences seed by seed: splits and initialisations are shared."""
    pairs = zip(study.trials[name], study.trials[other], strict=True)
    return in_words("Its accuracy", other, [100 * (a.accuracy - b.accuracy) for a, b in pairs])

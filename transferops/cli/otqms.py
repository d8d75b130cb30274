"""``transferops otqms``: how many samples of each source should train with the target?"""

from __future__ import annotations

import functools
from pathlib import Path

import click
import torch
from rich.table import Table

from transferops._validate import check_positive_int, fail
from transferops.cli import _options
from transferops.cli._command import Command, option
from transferops.cli._screen import Progress
from transferops.cli._settings import RESULTS
from transferops.data import few_shot_split
from transferops.otqms import EpochRecord, Study, TrainingOptions, compare, network_for, to_json
from transferops.otqms.distributed import launched
from transferops.otqms.log import EpochLog
from transferops.otqms.options import Dimension
from transferops.otqms.plots import plot_accuracy, plot_quantities
from transferops.otqms.strategies import ALL_BASELINES, STRATEGIES, check_strategies, expand
from transferops.otqms.summary import Mean, StrategySummary, conclusions, summarize

_COMPARISON = "Comparison"
_SHOWN_SOURCES = 3


def _dimension(_: click.Context, __: click.Parameter, value: str) -> int | str:
    return int(value) if value.isdecimal() else value


@click.command(
    "otqms",
    cls=Command,
    examples=[
        ("On embedded data, scikit-learn's digits in seven domains", "transferops otqms --output pictures"),
        (
            "On domains of your own",
            "transferops otqms --data digits.npz --target usps --shots 10 --seeds 3 --json result.json",
        ),
        (
            "Chosen strategies, kept in a folder to go on from after an interruption",
            "transferops otqms --strategy target-only,all-sources,recommended --checkpoint state",
        ),
        (
            "With several processes, in which every batch is shared",
            "torchrun --nproc-per-node 2 -m transferops otqms --data digits.npz --target usps",
        ),
    ],
    results="--json holds every seed and epoch, and the settings; --output two pictures; --jsonl and --tensorboard "
    "each epoch as it ends; --checkpoint all that is trained, and the same command goes on from there.",
    epilog="OTQMS: arXiv 2502.04242. In a program: transferops.otqms.OTQMS.",
)
@_options.domains("do well on", sources="Domains to take samples from")
@_options.shots(10)
@_options.count("--seeds", 3, "Repetitions, each with its own split and initialisation.", _COMPARISON)
@_options.names(
    "--strategy",
    "strategies",
    group=_COMPARISON,
    metavar="NAME[,NAME]",
    default="target-only,all-sources,quantities-dynamic,recommended",
    show_default=True,
    known=(*STRATEGIES, ALL_BASELINES),
    parse=expand,
    help=f"What to compare; {ALL_BASELINES} stands for everything.",
)
@_options.count("--epochs", TrainingOptions.epochs, "Of every phase that has no number of its own.")
@option("--early-stopping", group=_options.TRAINING, is_flag=True, help="Choose the epoch on a part of the shots.")
@_options.count("--patience", TrainingOptions.patience, "With early stopping, epochs without improvement before it.")
@_options.count(
    "--folds", None, "With early stopping, choose how long to train by cross-validation; of the guard, 5 if left out."
)
@option(
    "--guard",
    group=_options.TRAINING,
    is_flag=True,
    help="Where cross-validation shows that target-only or all-sources is better, train that in a strategy's place.",
)
@_options.learning_rate(TrainingOptions.lr)
@_options.count("--batch-size", TrainingOptions.batch_size, "Samples in a step.")
@option(
    "--dimension",
    group=_options.TRAINING,
    default="auto",
    show_default=True,
    accepts=(str, int),
    callback=_dimension,
    metavar="auto|parameters|D",
    help="The d of the risk; a smaller one takes less. auto: the largest rank the target's Fisher can have.",
)
@_options.count(
    "--budget", None, "Samples in an epoch: of the sources, for budget and uniform; in all, for recommended."
)
@option(
    "--budget-seconds",
    group=_options.TRAINING,
    type=float,
    help="Seconds of an epoch instead, for budget and uniform: what a sample costs is measured.",
)
@_options.output(pictures="two pictures")
@option(
    "--checkpoint",
    group=RESULTS,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep what is trained in this folder; the same command goes on from there, also after a kill.",
)
@option(
    "--jsonl",
    "log_path",
    group=RESULTS,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Append each epoch as JSON.",
)
@option(
    "--tensorboard",
    group=RESULTS,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Each epoch for TensorBoard.",
)
@_options.machine()
def command(
    domains: _options.Domains,
    shots: int,
    seeds: int,
    strategies: list[str],
    epochs: int,
    early_stopping: bool,
    patience: int,
    folds: int | None,
    guard: bool,
    lr: float,
    batch_size: int,
    dimension: Dimension,
    budget: int | None,
    budget_seconds: float | None,
    output: _options.Output,
    checkpoint: Path | None,
    log_path: Path | None,
    tensorboard: Path | None,
    machine: _options.Machine,
) -> None:
    """How many samples of each source should I train with?

    Compares strategies on a few-shot target: training on the target only, adding all sources, adding
    the quantities of least predicted risk (OTQMS), decided anew before every epoch, and what is
    recommended, quantities by a survey of all tasks from a common start and a finish on the target.
    Accuracy is measured on target samples that no strategy has seen. All shots are trained on and the last epoch
    is kept; with early stopping, a validation part of the shots chooses it, or cross-validation.
    """
    # Everything that can be wrong is looked at before anything is trained.
    check_strategies(strategies)
    check_positive_int("seeds", seeds)
    options = TrainingOptions(
        epochs=epochs,
        patience=patience,
        early_stopping="folds" if early_stopping and folds is not None else early_stopping,
        folds=TrainingOptions.folds if folds is None else folds,
        guard=guard,
        lr=lr,
        batch_size=batch_size,
        dimension=dimension,
        budget=budget,
        budget_seconds=budget_seconds,
        device=machine.device,
    )
    machine.set_threads(domains)
    output.prepare()
    bundle, target = domains.read(output)
    target_domain, source_domains = bundle.choose(target, domains.sources)
    if few_shot_split(target_domain, shots).validation is None and early_stopping:
        fail("shots", "at least 2 with early stopping, one of them for validation", str(shots))

    for domain, missing in bundle.missing_classes().items():
        classes = ", ".join(bundle.class_names[i] if bundle.class_names else str(i) for i in missing)
        output.say(f"note: {domain} has no sample of class {classes}")
    counts = ", ".join(f"{domain.name} ({len(domain)})" for domain in source_domains)
    output.say(f"target {target} ({len(target_domain)} samples, {shots} shots per class), sources {counts}")
    with launched(torch.device(machine.device)) as world:
        log = EpochLog(log_path, tensorboard) if world.leads else EpochLog()
        planned = {name: _planned_epochs(name, epochs) for name in strategies}
        with output.progress(seeds * sum(planned.values())) as progress, _Trainings(progress, planned) as trainings:

            def on_epoch(strategy: str, seed: int, record: EpochRecord) -> None:
                trainings.on_epoch(strategy, seed, record)
                log(strategy, seed, record)

            study = compare(
                lambda: network_for(bundle.sample_shape, bundle.classes),
                lambda seed: few_shot_split(target_domain, shots, seed=seed),
                {domain.name: domain for domain in source_domains},
                strategies=strategies,
                seeds=range(seeds),
                options=options,
                on_epoch=on_epoch,
                checkpoint=checkpoint,
            )
        log.close()
        if not world.leads:
            return

    summaries = summarize(study)
    output.show(_strategies_table(summaries))
    deciding = [summary for summary in summaries if summary.predicts]
    if deciding:
        output.show(_sources_table(study, deciding))
    for sentence in conclusions(study):
        output.say(sentence)
    output.write(to_json(study, data=domains.origin, target=target, shots=shots, options=options.as_dict()))
    output.draw("accuracy.png", functools.partial(plot_accuracy, study))
    output.draw("quantities.png", functools.partial(plot_quantities, study))


class _Trainings:
    """Progress of one training after the other. Early stopping and checkpoints make them shorter than planned."""

    def __init__(self, progress: Progress, planned: dict[str, int]) -> None:
        self._progress = progress
        self._planned = planned
        self._training: tuple[str, int] | None = None
        self._before = 0  # epochs of the trainings before this one
        self._line = ""

    def __enter__(self) -> _Trainings:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def on_epoch(self, strategy: str, seed: int, record: EpochRecord) -> None:
        """Show where the training is."""
        if self._training != (strategy, seed):
            self._finish()
            self._training = (strategy, seed)
        self._line = f"seed {seed} {strategy}: epoch {record.epoch}/{self._planned[strategy]}, {record.samples} samples"
        if record.validation_accuracy is not None:
            self._line += f", validation {record.validation_accuracy:.0%}"
        most = sorted(record.quantities.items(), key=lambda entry: -entry[1])[:_SHOWN_SOURCES]
        taken = ", ".join(f"{source} {quantity}" for source, quantity in most if quantity)
        self._progress.show(f"{self._line} ({taken})" if taken else self._line)
        self._progress.reach(self._before + record.epoch)

    def _finish(self) -> None:
        if self._training is not None:
            self._before += self._planned[self._training[0]]
            self._progress.reach(self._before)
            self._progress.finished(self._line)


def _planned_epochs(strategy: str, epochs: int) -> int:
    """The epochs of all phases, if none stops early."""
    return sum(phase.epochs or epochs for phase in STRATEGIES[strategy].phases) or 1


def _strategies_table(summaries: list[StrategySummary]) -> Table:
    """Samples, time and accuracy of each strategy."""
    table = Table(caption="samples per epoch; time without source models; means over seeds")
    table.add_column("strategy")
    for heading in ("samples", "time", "Fisher+QP", "source models", "accuracy, %"):
        table.add_column(heading, justify="right")
    for summary in summaries:
        table.add_row(
            summary.name,
            f"{summary.samples_per_epoch:.0f}",
            _seconds(summary.seconds),
            _seconds(summary.allocation_seconds if summary.predicts else 0),
            _seconds(summary.source_model_seconds),
            _percent(summary.accuracy),
        )
    return table


def _sources_table(study: Study, summaries: list[StrategySummary]) -> Table:
    """Samples of each source that each of the strategies took, and their share of the loss where it differs."""
    table = Table(
        caption="samples in the epoch that was kept and, of weighted ones, their share of the loss; means over seeds"
    )
    table.add_column("source")
    table.add_column("available", justify="right")
    for summary in summaries:
        table.add_column(summary.name, justify="right")
    for source, available in study.sources.items():
        table.add_row(source, str(available), *(_taken(summary, source) for summary in summaries))
    return table


def _taken(summary: StrategySummary, source: str) -> str:
    quantity = f"{summary.quantities[source]:.0f}"
    return f"{quantity} ({summary.shares[source]:.0%})" if summary.weighted else quantity


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value else "-"


def _percent(mean: Mean) -> str:
    return f"{100 * mean.value:.1f}" + ("" if mean.error is None else f" ± {100 * mean.error:.1f}")

"""``transferops otqms``: how many samples of each source should train with the target?"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from transferops._validate import check_positive_int, fail
from transferops.cli._common import (
    click,
    console,
    names,
    prepare_outputs,
    read_domains,
    reports_errors,
    set_threads,
)
from transferops.data import DEFAULT_TARGET, few_shot_split
from transferops.otqms import EpochRecord, Study, TrainingOptions, compare, network_for, to_json, write_json
from transferops.otqms.distributed import launched
from transferops.otqms.log import EpochLog
from transferops.otqms.plots import plot_accuracy, plot_quantities
from transferops.otqms.strategies import STRATEGIES, check_strategies, expand
from transferops.otqms.summary import Mean, StrategySummary, conclusions, summarize

_SHOWN_SOURCES = 3


def _dimension(_: click.Context, __: click.Parameter, value: str) -> int | str:
    return int(value) if value.isdecimal() else value


def _strategies(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    return expand(names(context, parameter, value) or [])


@click.command("otqms", epilog="Read more: docs/, and the paper, arXiv 2502.04242.")
@click.option("--data", metavar="FILE.npz|FOLDER", help="Domains to use; without it, the embedded digits.")
@click.option("--target", metavar="DOMAIN", help=f"Domain to do well on; for the embedded digits {DEFAULT_TARGET}.")
@click.option("--sources", metavar="A,B", callback=names, help="Domains to take samples from; all others if left out.")
@click.option("--shots", default=10, show_default=True, help="Labelled target samples per class.")
@click.option("--seeds", default=3, show_default=True, help="Repetitions, each with its own split and initialisation.")
@click.option(
    "--strategy",
    "strategies",
    metavar="NAME[,NAME]",
    default="target-only,all-sources,quantities,recommended",
    show_default=True,
    callback=_strategies,
    help="What to compare; all-baselines stands for everything.",
)
@click.option("--json", "json_path", metavar="OUT", type=click.Path(path_type=Path), help="Write all results there.")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="Write two pictures into this folder.")
@click.option(
    "--checkpoint",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep what is trained in this folder; the same command goes on from there, also after a kill.",
)
@click.option("--jsonl", "log_path", metavar="FILE", type=click.Path(path_type=Path), help="Append each epoch as JSON.")
@click.option("--tensorboard", metavar="DIR", type=click.Path(path_type=Path), help="Each epoch for TensorBoard.")
@click.option("--image-size", type=int, help="Resize the images of a folder to this many pixels square.")
@click.option(
    "--epochs", default=TrainingOptions.epochs, show_default=True, help="Of every phase that has no number of its own."
)
@click.option(
    "--patience",
    default=TrainingOptions.patience,
    show_default=True,
    help="With early stopping, epochs without improvement before a stop.",
)
@click.option("--early-stopping", is_flag=True, help="Choose the epoch on a validation part of the shots.")
@click.option("--lr", default=TrainingOptions.lr, show_default=True, help="Learning rate of Adam.")
@click.option("--batch-size", default=TrainingOptions.batch_size, show_default=True)
@click.option(
    "--dimension",
    default="auto",
    show_default=True,
    callback=_dimension,
    metavar="auto|parameters|D",
    help="The d of the risk; a smaller one takes less. auto: the largest rank the target's Fisher can have.",
)
@click.option(
    "--budget", type=int, help="Samples in an epoch: of the sources, for budget and uniform; in all, for recommended."
)
@click.option("--device", default=TrainingOptions.device, show_default=True, help="For example cuda.")
@click.option("--threads", type=int, help="CPU threads; if left out one for the embedded digits, else torch's choice.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@reports_errors
def command(
    data: str | None,
    target: str | None,
    sources: list[str] | None,
    shots: int,
    seeds: int,
    strategies: list[str],
    json_path: Path | None,
    output: Path | None,
    checkpoint: Path | None,
    log_path: Path | None,
    tensorboard: Path | None,
    image_size: int | None,
    epochs: int,
    patience: int,
    early_stopping: bool,
    lr: float,
    batch_size: int,
    dimension: Any,
    budget: int | None,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """How many samples of each source should I train with?

    Compares strategies on a few-shot target: training on the target only, adding all sources, adding
    the quantities of least predicted risk (OTQMS), decided anew before every epoch, and what is
    recommended, shares of the loss in the place of quantities and a finish on the target. Accuracy is
    measured on target samples that no strategy has seen. All shots are trained on and the last epoch
    is kept; with early stopping, a validation part of the shots chooses it.

    \b
    Try it on embedded data, scikit-learn's digits in seven domains:
      transferops otqms --output pictures

    \b
    On your own: an .npz file with arrays <domain>_x and <domain>_y for every
    domain, or a folder domain/class/image:
      transferops otqms --data digits.npz --target usps --json result.json

    \b
    With several processes, in which every batch is shared:
      torchrun --nproc-per-node 4 -m transferops otqms --data digits.npz --target usps
    """
    # Everything that can be wrong is looked at before anything is trained.
    check_strategies(strategies)
    check_positive_int("seeds", seeds)
    options = TrainingOptions(
        epochs=epochs,
        patience=patience,
        early_stopping=early_stopping,
        lr=lr,
        batch_size=batch_size,
        dimension=dimension,
        budget=budget,
        device=device,
    )
    set_threads(threads, data)
    prepare_outputs(json_path, output)
    bundle, target = read_domains(data, target, image_size)
    target_domain, source_domains = bundle.choose(target, sources)
    if few_shot_split(target_domain, shots).validation is None and early_stopping:
        fail("shots", "at least 2 with early stopping, one of them for validation", str(shots))

    quiet = quiet or os.environ.get("RANK", "0") != "0"  # under torchrun the first process speaks
    screen = console(quiet)
    say = functools.partial(screen.print, soft_wrap=True)
    for domain, missing in bundle.missing_classes().items():
        classes = ", ".join(bundle.class_names[i] if bundle.class_names else str(i) for i in missing)
        say(f"note: {domain} has no sample of class {classes}")
    counts = ", ".join(f"{domain.name} ({len(domain)})" for domain in source_domains)
    say(f"target {target} ({len(target_domain)} samples, {shots} shots per class), sources {counts}")
    with launched(torch.device(device)) as world:
        log = EpochLog(log_path, tensorboard) if world.leads else EpochLog()
        with _EpochProgress(strategies, seeds, epochs, quiet) as progress:

            def on_epoch(strategy: str, seed: int, record: EpochRecord) -> None:
                progress.on_epoch(strategy, seed, record)
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
    screen.print(_strategies_table(summaries))
    deciding = [summary for summary in summaries if summary.predicts]
    if deciding:
        screen.print(_sources_table(study, deciding))
    for sentence in conclusions(study):
        say(sentence)

    origin = data or "embedded digits"
    if json_path is not None:
        write_json(to_json(study, data=origin, target=target, shots=shots, options=options.as_dict()), json_path)
        say(f"wrote {json_path}")
    if output is not None:
        plot_accuracy(study, output / "accuracy.png")
        say(f"wrote {output / 'accuracy.png'}")
        if plot_quantities(study, output / "quantities.png"):
            say(f"wrote {output / 'quantities.png'}")


class _EpochProgress:
    """A live bar on stderr where that is a terminal, a line per finished training where it is not."""

    def __init__(self, strategies: list[str], seeds: int, epochs: int, quiet: bool) -> None:
        self._console = console(quiet, stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),  # at most so long: early stopping and checkpoints shorten it
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._epochs = {name: _planned_epochs(name, epochs) for name in strategies}
        self._task = self._bar.add_task("starting", total=seeds * sum(self._epochs.values()))
        self._training: tuple[str, int] | None = None
        self._before = 0  # epochs of the trainings before this one
        self._line = ""

    def __enter__(self) -> _EpochProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._bar.stop()

    def on_epoch(self, strategy: str, seed: int, record: EpochRecord) -> None:
        """Show where the training is."""
        if self._training != (strategy, seed):
            self._finish()
            self._training = (strategy, seed)
        planned = self._epochs[strategy]
        self._line = f"seed {seed} {strategy}: epoch {record.epoch}/{planned}, {record.samples} samples"
        if record.validation_accuracy is not None:
            self._line += f", validation {record.validation_accuracy:.0%}"
        most = sorted(record.quantities.items(), key=lambda entry: -entry[1])[:_SHOWN_SOURCES]
        taken = ", ".join(f"{source} {quantity}" for source, quantity in most if quantity)
        self._bar.update(
            self._task,
            description=f"{self._line} ({taken})" if taken else self._line,
            completed=self._before + record.epoch,
        )

    def _finish(self) -> None:
        if self._training is not None:
            self._before += self._epochs[self._training[0]]
            self._bar.update(self._task, completed=self._before)
            if not self._console.is_terminal:
                self._console.print(self._line)


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

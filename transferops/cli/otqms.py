"""``transferops otqms``: how many samples of each source should train with the target?"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from transferops._validate import check_positive_int, fail
from transferops.cli._common import click, console, names, reports_errors
from transferops.data import DEFAULT_TARGET, few_shot_split, load_bundle, load_digits_domains
from transferops.otqms import EpochRecord, Study, TrainingOptions, compare, network_for, to_json, write_json
from transferops.otqms.plots import plot_accuracy, plot_quantities
from transferops.otqms.strategies import check_strategies
from transferops.otqms.summary import Mean, StrategySummary, conclusions, summarize


def _dimension(_: click.Context, __: click.Parameter, value: str) -> int | str:
    return int(value) if value.isdecimal() else value


@click.command("otqms", epilog="Read more: docs/, and the paper, arXiv 2502.04242.")
@click.option("--data", metavar="FILE.npz|FOLDER", help="Domains to use; without it, the embedded digits.")
@click.option("--target", metavar="DOMAIN", help=f"Domain to do well on; for the embedded digits {DEFAULT_TARGET}.")
@click.option("--sources", metavar="A,B", callback=names, help="Domains to take samples from; all others if left out.")
@click.option("--shots", default=10, show_default=True, help="Labelled target samples per class, validation included.")
@click.option("--seeds", default=3, show_default=True, help="Repetitions, each with its own split and initialisation.")
@click.option(
    "--strategy",
    "strategies",
    metavar="NAME[,NAME]",
    default="target-only,all-sources,quantities",
    show_default=True,
    callback=names,
    help="What to compare.",
)
@click.option("--json", "json_path", metavar="OUT", type=click.Path(path_type=Path), help="Write all results there.")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="Write two pictures into this folder.")
@click.option("--image-size", type=int, help="Resize the images of a folder to this many pixels square.")
@click.option("--epochs", default=TrainingOptions.epochs, show_default=True, help="At most so many.")
@click.option(
    "--patience",
    default=TrainingOptions.patience,
    show_default=True,
    help="Epochs without improvement before a stop.",
)
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
    image_size: int | None,
    epochs: int,
    patience: int,
    lr: float,
    batch_size: int,
    dimension: Any,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """How many samples of each source should I train with?

    Compares strategies on a few-shot target: training on the target only, adding all sources, and
    adding the quantities of least predicted risk (OTQMS), decided anew before every epoch. Accuracy
    is measured on target samples that no strategy has seen; the epoch to keep is chosen on a
    validation part of the shots.

    \b
    Try it on embedded data, scikit-learn's digits in seven domains:
      transferops otqms --output pictures

    \b
    On your own: an .npz file with arrays <domain>_x and <domain>_y for every
    domain, or a folder domain/class/image:
      transferops otqms --data digits.npz --target usps --json result.json
    """
    # Everything that can be wrong is looked at before anything is trained.
    check_strategies(strategies)
    check_positive_int("seeds", seeds)
    options = TrainingOptions(
        epochs=epochs, patience=patience, lr=lr, batch_size=batch_size, dimension=dimension, device=device
    )
    if threads is None and data is None:
        threads = 1  # batches of 8x8 images are too small to share
    if threads is not None:
        torch.set_num_threads(check_positive_int("threads", threads))
    if json_path is not None and (json_path.is_dir() or not json_path.absolute().parent.is_dir()):
        fail("json", "a file in an existing folder", str(json_path), FileNotFoundError)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    bundle = load_digits_domains() if data is None else load_bundle(data, image_size)
    if target is None:
        if data is not None:
            fail("target", f"one of {', '.join(bundle.domains)}", "none")
        target = DEFAULT_TARGET
    target_domain, source_domains = bundle.choose(target, sources)
    has_validation = few_shot_split(target_domain, shots).validation is not None

    screen = console(quiet)
    say = functools.partial(screen.print, soft_wrap=True)
    for domain, missing in bundle.missing_classes().items():
        classes = ", ".join(bundle.class_names[i] if bundle.class_names else str(i) for i in missing)
        say(f"note: {domain} has no sample of class {classes}")
    if not has_validation:
        say("note: one shot leaves nothing for validation: all epochs are trained and the last is kept")
    counts = ", ".join(f"{domain.name} ({len(domain)})" for domain in source_domains)
    say(f"target {target} ({len(target_domain)} samples, {shots} shots per class), sources {counts}")
    with _EpochProgress(len(strategies) * seeds, epochs, quiet) as progress:
        study = compare(
            lambda: network_for(bundle.sample_shape, bundle.classes),
            lambda seed: few_shot_split(target_domain, shots, seed=seed),
            {domain.name: domain for domain in source_domains},
            strategies=strategies,
            seeds=range(seeds),
            options=options,
            on_epoch=progress.on_epoch,
        )

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

    def __init__(self, trainings: int, epochs: int, quiet: bool) -> None:
        self._console = console(quiet, stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=trainings)
        self._epochs = epochs
        self._training: tuple[str, int] | None = None
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
        self._line = f"seed {seed} {strategy}: epoch {record.epoch}/{self._epochs}, {record.samples} samples"
        if record.validation_accuracy is not None:
            self._line += f", validation {record.validation_accuracy:.0%}"
        self._bar.update(self._task, description=self._line)

    def _finish(self) -> None:
        if self._training is not None:
            self._bar.advance(self._task)
            if not self._console.is_terminal:
                self._console.print(self._line)


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
    """Samples of each source that each of the strategies took."""
    table = Table(caption="samples in the epoch that was kept, means over seeds")
    table.add_column("source")
    table.add_column("available", justify="right")
    for summary in summaries:
        table.add_column(summary.name, justify="right")
    for source, available in study.sources.items():
        table.add_row(source, str(available), *(f"{summary.quantities[source]:.0f}" for summary in summaries))
    return table


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value else "-"


def _percent(mean: Mean) -> str:
    return f"{100 * mean.value:.1f}" + ("" if mean.error is None else f" ± {100 * mean.error:.1f}")

"""``transferops adapt``: the best head for a few labelled samples, without gradient descent."""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from transferops._validate import check_positive_int, fail
from transferops.adapt.few_shot import ARMS, FewShotResult, compare_heads, pretrain
from transferops.adapt.head_plots import plot_arms
from transferops.cli._common import (
    click,
    console,
    names,
    prepare_outputs,
    read_domains,
    reports_errors,
    set_threads,
)
from transferops.data import DEFAULT_TARGET, Domain, few_shot_split
from transferops.otqms import FeatureNet, network_for, write_json
from transferops.otqms.results import versions

_CLEAR = 2.0  # standard errors of a paired difference


@click.command(
    "adapt", epilog="Layer variational analysis: arXiv 2302.01798. In a program: transferops.adapt.adapt_head."
)
@click.option("--data", metavar="FILE.npz|FOLDER", help="Domains to use; without it, the embedded digits.")
@click.option("--target", metavar="DOMAIN", help=f"Domain to adapt to; for the embedded digits {DEFAULT_TARGET}.")
@click.option("--sources", metavar="A,B", callback=names, help="Domains to pretrain on; all others if left out.")
@click.option("--shots", default=10, show_default=True, help="Labelled target samples per class.")
@click.option("--seeds", default=5, show_default=True, help="Repetitions, each with its own choice of shots.")
@click.option(
    "--arms",
    metavar="A,B",
    default="unadapted,adapted,ridge",
    show_default=True,
    callback=names,
    help=f"What to compare, of {', '.join(ARMS)}.",
)
@click.option("--features", is_flag=True, help="The data are features: the pretrained model is a linear head on them.")
@click.option("--json", "json_path", metavar="OUT", type=click.Path(path_type=Path), help="Write all results there.")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="Write two pictures into this folder.")
@click.option("--image-size", type=int, help="Resize the images of a folder to this many pixels square.")
@click.option("--epochs", default=20, show_default=True, help="Of the pretraining on all sources together.")
@click.option("--lr", default=2e-3, show_default=True, help="Learning rate of the pretraining, with Adam.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="For example cuda.")
@click.option("--threads", type=int, help="CPU threads; if left out one for the embedded digits, else torch's choice.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@reports_errors
def command(
    data: str | None,
    target: str | None,
    sources: list[str] | None,
    shots: int,
    seeds: int,
    arms: list[str],
    features: bool,
    json_path: Path | None,
    output: Path | None,
    image_size: int | None,
    epochs: int,
    lr: float,
    batch_size: int,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """What is the best head for my few labelled samples?

    Trains one network on all sources together, then adapts its last layer to a few target samples in
    closed form: ridge regression around the pretrained head, the penalty chosen by exact leave-one-out.
    Compared with the network as it is and with ridge regression that forgets the pretrained head.
    Accuracy is measured on target samples that no head has seen.

    \b
    Try it on embedded data, scikit-learn's digits in seven domains:
      transferops adapt --output pictures

    \b
    On your own: an .npz file with arrays <domain>_x and <domain>_y for every domain, or a folder
    domain/class/image; with --features, _x holds the features of a frozen network:
      transferops adapt --data digits.npz --target usps --shots 5 --json result.json
    """
    # Everything that can be wrong is looked at before anything is trained.
    for name, value in (("seeds", seeds), ("epochs", epochs), ("batch_size", batch_size)):
        check_positive_int(name, value)
    for arm in arms:
        if arm not in ARMS:
            fail("arms", f"names among {', '.join(ARMS)}", repr(arm))
    if not 0 < lr < float("inf"):
        fail("lr", "a positive number", f"{lr}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device
        raise ValueError(f"device: expected one that works here, got {device!r}") from error
    set_threads(threads, data)
    prepare_outputs(json_path, output)
    bundle, target = read_domains(data, target, image_size)
    target_domain, source_domains = bundle.choose(target, sources)
    if features and len(bundle.sample_shape) != 1:
        fail("features", "feature vectors with --features", f"samples of shape {list(bundle.sample_shape)}")
    few_shot_split(target_domain, shots, validation_fraction=0)

    screen = console(quiet)
    say = functools.partial(screen.print, soft_wrap=True)
    counts = ", ".join(f"{domain.name} ({len(domain)})" for domain in source_domains)
    say(f"target {target} ({len(target_domain)} samples, {shots} shots per class), sources {counts}")
    torch.manual_seed(0)
    if features:
        network: torch.nn.Module = FeatureNet(bundle.sample_shape[0], bundle.classes, hidden=0)
    else:
        network = network_for(bundle.sample_shape, bundle.classes)
    network.to(device)
    with _progress(quiet) as progress:
        task = progress.add_task("pretraining", total=epochs)
        pretrain(
            network,
            torch.cat([domain.inputs for domain in source_domains]).to(device),
            torch.cat([domain.labels for domain in source_domains]).to(device),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            on_epoch=lambda _: progress.advance(task),
        )
        task = progress.add_task("adapting", total=seeds)
        results = []
        for seed in range(seeds):
            split = few_shot_split(target_domain, shots, validation_fraction=0, seed=seed)
            train, test = _on(device, split.train), _on(device, split.test)
            results.append(compare_heads(network, train, test, arms=arms))
            progress.advance(task)

    screen.print(_table(results, arms))
    say(f"seed 0: {results[0].report}")
    for other in ("unadapted", "ridge", "gradient"):
        if "adapted" in arms and other in arms:
            say(_compared(results, other))
    if json_path is not None:
        about = {"data": data or "embedded digits", "target": target, "shots": shots, "seeds": list(range(seeds))}
        options = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "features": features, "device": device}
        sizes = {domain.name: len(domain) for domain in source_domains}
        write_json({**about, "sources": sizes, "options": options, **_document(results, arms)}, json_path)
        say(f"wrote {json_path}")
    if output is not None:
        plot_arms({arm: [r.accuracy[arm] for r in results] for arm in arms}, output / "adapt-accuracy.png")
        say(f"wrote {output / 'adapt-accuracy.png'}")
        results[0].report.plot(output / "adapt-penalty.png")
        say(f"wrote {output / 'adapt-penalty.png'}")


def _on(device: str, domain: Domain) -> tuple[torch.Tensor, torch.Tensor]:
    return domain.inputs.to(device), domain.labels.to(device)


def _progress(quiet: bool) -> Progress:
    screen = console(quiet, stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)


def _document(results: list[FewShotResult], arms: list[str]) -> dict[str, Any]:
    return {
        "arms": {
            arm: {"accuracy": [r.accuracy[arm] for r in results], "seconds": [r.seconds[arm] for r in results]}
            for arm in arms
        },
        "reports": [r.report.as_dict() for r in results],
        "versions": versions(),
    }


def _table(results: list[FewShotResult], arms: list[str]) -> Table:
    table = Table(caption="means over seeds and their standard errors; time without pretraining")
    table.add_column("head")
    table.add_column("accuracy, %", justify="right")
    table.add_column("time", justify="right")
    for arm in arms:
        mean, error = _mean([100 * r.accuracy[arm] for r in results])
        milliseconds = 1000 * fmean(r.seconds[arm] for r in results)
        accuracy = f"{mean:.1f}" + ("" if error is None else f" ± {error:.1f}")
        table.add_row(arm, accuracy, "-" if arm == "unadapted" else f"{milliseconds:.0f} ms")
    return table


def _compared(results: list[FewShotResult], other: str) -> str:
    """The adapted head against another by the differences seed by seed: shots are shared."""
    mean, error = _mean([100 * (r.accuracy["adapted"] - r.accuracy[other]) for r in results])
    sentence = f"adapted is {abs(mean):.1f} points {'above' if mean >= 0 else 'below'} {other}"
    if error is None:
        return f"{sentence}; one seed cannot say how sure that is."
    clear = "a clear difference" if abs(mean) > _CLEAR * error else "no clear difference"
    return f"{sentence} (± {error:.1f}), {clear}."


def _mean(values: list[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None

"""``transferops adapt``: the best head for a few labelled samples, without gradient descent."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import click
import torch
from rich.table import Table

from transferops._paired import in_words
from transferops._validate import check_positive_int, fail
from transferops.adapt.few_shot import ARMS, FewShotResult, compare_heads, pretrain
from transferops.adapt.head_plots import plot_arms
from transferops.cli import _options
from transferops.cli._command import Command, option
from transferops.data import Domain, few_shot_split
from transferops.otqms import FeatureNet, TrainingOptions, network_for
from transferops.otqms.results import versions


@click.command(
    "adapt",
    cls=Command,
    examples=[
        ("On embedded data, scikit-learn's digits in seven domains", "transferops adapt --output pictures"),
        (
            "On domains of your own, one of them with few labels",
            "transferops adapt --data digits.npz --target usps --shots 5 --json result.json",
        ),
        (
            "On features of a frozen network, against fine-tuning",
            "transferops adapt --data features.npz --target photo --features --arms unadapted,adapted,gradient",
        ),
    ],
    results="--json holds every repetition, the report of each head and the settings; --output two pictures.",
    epilog="Layer variational analysis: arXiv 2302.01798. In a program: transferops.adapt.adapt_head.",
)
@_options.domains("adapt to", sources="Domains to pretrain on")
@_options.shots(10)
@option(
    "--features", group=_options.DATA, is_flag=True, help="The data are features: the model is a linear head on them."
)
@_options.count("--seeds", 5, "Repetitions, each with its own choice of shots.", group="Comparison")
@_options.names(
    "--arms",
    group="Comparison",
    default="unadapted,adapted,ridge",
    show_default=True,
    known=ARMS,
    help=f"What to compare, of {', '.join(ARMS)}.",
)
@_options.count("--epochs", 20, "Of the pretraining on all sources together.")
@_options.learning_rate(2e-3)
@_options.count("--batch-size", TrainingOptions.batch_size, "Samples in a step.")
@_options.output(pictures="two pictures")
@_options.machine()
def command(
    domains: _options.Domains,
    shots: int,
    features: bool,
    seeds: int,
    arms: list[str],
    epochs: int,
    lr: float,
    batch_size: int,
    output: _options.Output,
    machine: _options.Machine,
) -> None:
    """What is the best head for my few labelled samples?

    Trains one network on all sources together, then adapts its last layer to a few target samples in
    closed form: ridge regression around the pretrained head, the penalty chosen by exact leave-one-out.
    Compared with the network as it is and with ridge regression that forgets the pretrained head.
    Accuracy is measured on target samples that no head has seen.
    """
    # Everything that can be wrong is looked at before anything is trained.
    check_positive_int("seeds", seeds)
    TrainingOptions(epochs=epochs, lr=lr, batch_size=batch_size, device=machine.device)
    for arm in arms:
        if arm not in ARMS:
            fail("arms", f"names among {', '.join(ARMS)}", repr(arm))
    if len(set(arms)) < len(arms):
        fail("arms", "each name once", ", ".join(arms))
    machine.set_threads(domains)
    output.prepare()
    bundle, target = domains.read(output)
    target_domain, source_domains = bundle.choose(target, domains.sources)
    if features and len(bundle.sample_shape) != 1:
        fail("features", "feature vectors with --features", f"samples of shape {list(bundle.sample_shape)}")
    few_shot_split(target_domain, shots, validation_fraction=0)

    counts = ", ".join(f"{domain.name} ({len(domain)})" for domain in source_domains)
    output.say(f"target {target} ({len(target_domain)} samples, {shots} shots per class), sources {counts}")
    torch.manual_seed(0)
    if features:
        network: torch.nn.Module = FeatureNet(bundle.sample_shape[0], bundle.classes, hidden=0)
    else:
        network = network_for(bundle.sample_shape, bundle.classes)
    network.to(machine.device)
    with output.progress(epochs + seeds) as progress:
        progress.show("pretraining")
        pretrain(
            network,
            torch.cat([domain.inputs for domain in source_domains]).to(machine.device),
            torch.cat([domain.labels for domain in source_domains]).to(machine.device),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            on_epoch=lambda _: progress.advance(),
        )
        progress.finished(f"pretrained, {epochs} epochs")
        results = []
        for seed in range(seeds):
            progress.show(f"adapting, seed {seed}")
            split = few_shot_split(target_domain, shots, validation_fraction=0, seed=seed)
            train, test = _on(machine.device, split.train), _on(machine.device, split.test)
            results.append(compare_heads(network, train, test, arms=arms))
            progress.advance()
            accuracies = ", ".join(f"{arm} {accuracy:.1%}" for arm, accuracy in results[-1].accuracy.items())
            progress.finished(f"seed {seed}: {accuracies}")

    output.show(_table(results, arms))
    output.say(f"seed 0: {results[0].report}")
    for other in ("unadapted", "ridge", "gradient"):
        if "adapted" in arms and other in arms:
            output.say(_compared(results, other))
    sizes = {domain.name: len(domain) for domain in source_domains}
    about = {"data": domains.origin, "target": target, "shots": shots, "seeds": list(range(seeds)), "sources": sizes}
    output.write({**about, **_document(results, arms)})
    output.draw("adapt-accuracy.png", lambda path: plot_arms({arm: _accuracies(results, arm) for arm in arms}, path))
    output.draw("adapt-penalty.png", results[0].report.plot)


def _on(device: str, domain: Domain) -> tuple[torch.Tensor, torch.Tensor]:
    return domain.inputs.to(device), domain.labels.to(device)


def _accuracies(results: list[FewShotResult], arm: str) -> list[float]:
    return [result.accuracy[arm] for result in results]


def _document(results: list[FewShotResult], arms: list[str]) -> dict[str, Any]:
    return {
        "arms": {
            arm: {"accuracy": _accuracies(results, arm), "seconds": [r.seconds[arm] for r in results]} for arm in arms
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
        mean, error = _mean([100 * accuracy for accuracy in _accuracies(results, arm)])
        milliseconds = 1000 * fmean(r.seconds[arm] for r in results)
        accuracy = f"{mean:.1f}" + ("" if error is None else f" ± {error:.1f}")
        table.add_row(arm, accuracy, "-" if arm == "unadapted" else f"{milliseconds:.0f} ms")
    return table


def _compared(results: list[FewShotResult], other: str) -> str:
    """The adapted head against another by the differences seed by seed: shots are shared."""
    return in_words("adapted", other, [100 * (r.accuracy["adapted"] - r.accuracy[other]) for r in results])


def _mean(values: list[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None

"""``transferops inherit``: start from another model's parameters, and find out whether that helps."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from transferops._atomic import replacing
from transferops._content import content_hash
from transferops._validate import check_positive_int, fail
from transferops.adapt.checkpoints import load_state
from transferops.adapt.few_shot_transfer import FewShotTransfer
from transferops.adapt.inheritance import inherit
from transferops.adapt.masks import GRANULARITIES, SELECTIONS
from transferops.adapt.transfer_check import DEFAULT_ALPHAS, TransferCheck, transfer_check
from transferops.adapt.transfer_plots import plot_transfer_check
from transferops.adapt.verdict import INTERVALS
from transferops.cli import _options
from transferops.cli._command import Command, option
from transferops.cli._settings import RESULTS
from transferops.data import Domain, few_shot_split
from transferops.otqms import TrainingOptions, network_for
from transferops.rank import load_candidate

_DEFAULT_UPSTREAM = "plain"  # of the embedded digits
_PARTS, _CHECK = "What to inherit", "With --check"


def _alphas(_: click.Context, __: click.Parameter, value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers separated by commas, got {value!r}") from None


@click.command(
    "inherit",
    cls=Command,
    examples=[
        ("Half of a larger model", "transferops inherit mynets:small --from big.pt --alpha 0.5 --save start.pt"),
        ("A model of timm", "transferops inherit timm:resnet18 --from resnet34.safetensors --granularity block"),
        ("Does it help? On embedded data, digits in seven domains", "transferops inherit --check"),
        (
            "On domains of your own; the same command goes on after an interruption",
            "transferops inherit --check --data digits.npz --upstream mnist --target usps --journal check.jsonl",
        ),
    ],
    results="--save holds the state dict and what was inherited of it; --json the report and the settings; "
    "with --check, --journal every training and --output a picture.",
    epilog="Partial inheritance: arXiv 2509.22056. In a program: transferops.adapt.inherit.",
)
@click.argument("model", required=False, metavar="[MODEL]")
@option(
    "--from",
    "checkpoint",
    group=_PARTS,
    type=click.Path(),
    metavar="FILE",
    help="The upstream parameters: a state dict or .safetensors.",
)
@option("--alpha", group=_PARTS, default=1.0, show_default=True, help="Share to inherit, without --check.")
@option(
    "--granularity",
    group=_PARTS,
    type=click.Choice(GRANULARITIES),
    default="filter",
    show_default=True,
    help="What is inherited as a whole.",
)
@option(
    "--select",
    group=_PARTS,
    type=click.Choice(SELECTIONS),
    default="random",
    show_default=True,
    help="What comes first.",
)
@_options.count("--seed", 0, "Of the initialisation and of random selection, without --check.", _PARTS)
@option(
    "--check",
    group=_CHECK,
    is_flag=True,
    help="Train with several shares, and say whether inheriting helps or hurts.",
)
@_options.domains("do well on", group=_CHECK)
@option("--upstream", group=_CHECK, metavar="DOMAIN", help="Domain to train an upstream model on, without --from.")
@_options.shots(10, group=_CHECK)
@_options.count("--seeds", 10, "Paired repetitions.", _CHECK)
@option(
    "--alphas",
    group=_CHECK,
    default=",".join(f"{alpha:g}" for alpha in DEFAULT_ALPHAS),
    show_default=True,
    listed=True,
    accepts=(float, int, str),
    callback=_alphas,
    help="Shares to compare, 0 among them.",
)
@option(
    "--interval", group=_CHECK, type=click.Choice(INTERVALS), default="t", show_default=True, help="Of the differences."
)
@option("--confidence", group=_CHECK, default=0.95, show_default=True, help="Of all intervals together.")
@_options.count("--epochs", TrainingOptions.epochs, "At most so many.", _CHECK)
@_options.learning_rate(TrainingOptions.lr, _CHECK)
@_options.machine(_CHECK)
@option(
    "--save",
    group=RESULTS,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the state dict and the masks, without --check.",
)
@_options.output(pictures="with --check, a picture")
@option(
    "--journal",
    group=RESULTS,
    type=click.Path(),
    metavar="FILE",
    help="With --check, keep results there; the same command goes on from them.",
)
def command(
    model: str | None,
    checkpoint: str | None,
    alpha: float,
    granularity: str,
    select: str,
    seed: int,
    check: bool,
    save: Path | None,
    output: _options.Output,
    **options: Any,
) -> None:
    """Which part of an upstream model should mine inherit - and is it hurting me?

    Fills MODEL, module:function or timm:NAME, with parameters of a checkpoint, also where widths, depths or heads
    differ, and says what became of every tensor. Files are read without running anything in them.

    With --check a model is trained on a few labelled samples of a target domain, once for every share and seed,
    and compared with starting afresh. Without MODEL a built-in network is used, without --from one is trained on
    the domain --upstream first.
    """
    state = None if checkpoint is None else load_state(checkpoint)
    _options.check_file("save", save)
    output.prepare()
    if check:
        document = _check(model, checkpoint, state, granularity, select, output, **options)
    else:
        if model is None or state is None:
            fail("arguments", "MODEL and --from, or --check", "neither")
        document = _inherit(model, state, output, alpha, granularity, select, seed, save)
    output.write(document)


def _inherit(
    name: str,
    state: Mapping[str, torch.Tensor],
    output: _options.Output,
    alpha: float,
    granularity: str,
    select: str,
    seed: int,
    save: Path | None,
) -> dict[str, Any]:
    if select == "fisher":
        fail("select", "random, uniform or magnitude (a Fisher diagonal needs data: use --check or Python)", "'fisher'")
    model = _made(name, check_positive_int("seed", seed, minimum=0))
    report = inherit(model, state, alpha, granularity, select, seed)
    output.say(report)
    if save is not None:
        _save({"state_dict": model.state_dict(), "masks": report.masks}, save)
        output.say(f"wrote {save}")
    return {"model": name, **report.to_dict()}


def _check(
    name: str | None,
    checkpoint: str | None,
    state: Mapping[str, torch.Tensor] | None,
    granularity: str,
    select: str,
    output: _options.Output,
    *,
    domains: _options.Domains,
    upstream: str | None,
    shots: int,
    seeds: int,
    alphas: list[float],
    interval: str,
    confidence: float,
    epochs: int,
    lr: float,
    machine: _options.Machine,
    journal: str | None,
) -> dict[str, Any]:
    check_positive_int("seeds", seeds, minimum=2)
    training = TrainingOptions(epochs=epochs, lr=lr, device=machine.device)
    machine.set_threads(domains)
    bundle, target = domains.read(output)
    if domains.data is None:
        upstream = upstream or _DEFAULT_UPSTREAM
    if upstream is None and state is None:
        fail("upstream", f"one of {', '.join(bundle.domains)}", "none")
    domain, others = bundle.choose(target, None if upstream is None else [upstream])
    few_shot_split(domain, shots)  # refuses shots before anything is trained
    source = others[0] if state is None else state
    about = {
        "data": domains.origin,
        "model": name or "built-in",
        "upstream": os.path.abspath(checkpoint) if checkpoint else upstream,
        "target": target,
        "shots": shots,
        "granularity": granularity,
        "select": select,
        "training": training.as_dict(),
        "content": content_hash(_content(domain, source)),
    }
    output.say(f"upstream {about['upstream']}, target {target} ({len(domain)} samples, {shots} shots per class)")
    train = FewShotTransfer(
        lambda: network_for(bundle.sample_shape, bundle.classes) if name is None else load_model(name),
        source,
        lambda seed: few_shot_split(domain, shots, seed=seed),
        granularity=granularity,
        select=select,
        options=training,
    )
    with output.progress(len(alphas) * seeds) as progress:

        def on_result(alpha: float, seed: int, metric: float) -> None:
            line = f"seed {seed} alpha {alpha:g}: test accuracy {metric:.1%}"
            progress.show(line)
            progress.advance()
            progress.finished(line)

        result: TransferCheck = transfer_check(
            train,
            alphas,
            range(seeds),
            confidence=confidence,
            interval=interval,
            journal=journal,
            about=about,
            on_result=on_result,
        )
    output.say(result)
    output.draw("transfer.png", functools.partial(plot_transfer_check, result, metric="test accuracy"))
    return {**about, **result.to_dict()}


def _content(target: Domain, upstream: Domain | Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the results depend on beside the settings: a file may have changed since it was named."""
    tensors = [target.inputs, target.labels]
    if isinstance(upstream, Domain):
        return [*tensors, upstream.inputs, upstream.labels]
    return [*tensors, *(value for _, value in sorted(upstream.items()))]


def load_model(name: str) -> nn.Module:
    """The untrained model that ``module:function`` or ``timm:NAME`` makes."""
    return load_candidate(name, pretrained=False).model


def _made(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return load_model(name)


def _save(content: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    with replacing(path) as file:
        torch.save(content, file)

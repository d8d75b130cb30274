"""``transferops inherit``: start from another model's parameters, and find out whether that helps."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from transferops._validate import check_positive_int, fail
from transferops.adapt.checkpoints import load_state
from transferops.adapt.few_shot_transfer import FewShotTransfer
from transferops.adapt.inheritance import inherit
from transferops.adapt.masks import GRANULARITIES, SELECTIONS
from transferops.adapt.transfer_check import DEFAULT_ALPHAS, TransferCheck, transfer_check
from transferops.adapt.transfer_plots import plot_transfer_check
from transferops.adapt.verdict import INTERVALS
from transferops.cli._common import (
    check_file,
    click,
    console,
    prepare_outputs,
    read_domains,
    reports_errors,
    set_threads,
)
from transferops.data import few_shot_split
from transferops.otqms import TrainingOptions, network_for, write_json
from transferops.rank import load_candidate

_DEFAULT_UPSTREAM = "plain"  # of the embedded digits


def _alphas(_: click.Context, __: click.Parameter, value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers separated by commas, got {value!r}") from None


@click.command("inherit", epilog="Read more: docs/, and the paper, arXiv 2509.22056.")
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("--from", "checkpoint", metavar="FILE", help="The upstream parameters: a state dict or .safetensors.")
@click.option("--alpha", default=1.0, show_default=True, help="Share to inherit.")
@click.option("--granularity", type=click.Choice(GRANULARITIES), default="filter", show_default=True)
@click.option("--select", type=click.Choice(SELECTIONS), default="random", show_default=True, help="What comes first.")
@click.option("--seed", default=0, show_default=True, help="Of the initialisation and of random selection.")
@click.option("--save", metavar="FILE", type=click.Path(path_type=Path), help="Write the state dict and the masks.")
@click.option("--json", "json_path", metavar="OUT", type=click.Path(path_type=Path), help="Write the report there.")
@click.option("--check", is_flag=True, help="Train with several shares, and say whether inheriting helps or hurts.")
@click.option("--data", metavar="FILE.npz|FOLDER", help="[check] Domains; without it, the embedded digits.")
@click.option("--upstream", metavar="DOMAIN", help="[check] Domain to train an upstream model on, without --from.")
@click.option("--target", metavar="DOMAIN", help="[check] Domain to do well on.")
@click.option("--shots", default=10, show_default=True, help="[check] Labelled target samples per class.")
@click.option("--seeds", default=10, show_default=True, help="[check] Paired repetitions.")
@click.option(
    "--alphas",
    default=",".join(f"{alpha:g}" for alpha in DEFAULT_ALPHAS),
    show_default=True,
    callback=_alphas,
    help="[check] Shares to compare, 0 among them.",
)
@click.option("--interval", type=click.Choice(INTERVALS), default="t", show_default=True, help="[check]")
@click.option("--confidence", default=0.95, show_default=True, help="[check] Of all intervals together.")
@click.option("--journal", metavar="FILE", help="[check] Keep results there; the same command goes on from them.")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="[check] Write a picture there.")
@click.option("--image-size", type=int, help="[check] Resize the images of a folder to this many pixels square.")
@click.option("--epochs", default=TrainingOptions.epochs, show_default=True, help="[check] At most so many.")
@click.option("--lr", default=TrainingOptions.lr, show_default=True, help="[check] Learning rate of Adam.")
@click.option("--device", default=TrainingOptions.device, show_default=True, help="[check] For example cuda.")
@click.option("--threads", type=int, help="[check] CPU threads; if left out one for the embedded digits.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@reports_errors
def command(model: str | None, checkpoint: str | None, check: bool, quiet: bool, **options: Any) -> None:
    """Which part of an upstream model should mine inherit - and is it hurting me?

    Fills MODEL, module:function or timm:NAME, with parameters of a checkpoint, also where widths, depths or heads
    differ, and says what became of every tensor. Files are read without running anything in them.

    \b
      transferops inherit mynets:small --from big.pt --alpha 0.5 --save start.pt

    With --check a model is trained on a few labelled samples of a target domain, once for every share and seed,
    and compared with starting afresh. Without MODEL a built-in network is used, without --from one is trained on
    the domain --upstream first.

    \b
      transferops inherit --check
      transferops inherit --check --data digits.npz --upstream mnist --target usps --journal check.jsonl
    """
    state = None if checkpoint is None else load_state(checkpoint)
    json_path: Path | None = options["json_path"]
    check_file("json", json_path)
    check_file("save", options["save"])
    screen = console(quiet)
    say = functools.partial(screen.print, soft_wrap=True)
    if check:
        document = _check(model, checkpoint, state, say, quiet, **options)
    else:
        if model is None or state is None:
            fail("arguments", "MODEL and --from, or --check", "neither")
        document = _inherit(model, state, say, **options)
    if json_path is not None:
        write_json(document, json_path)
        say(f"wrote {json_path}")


def _inherit(
    name: str,
    state: Mapping[str, torch.Tensor],
    say: Callable[[str], None],
    alpha: float,
    granularity: str,
    select: str,
    seed: int,
    save: Path | None,
    **_: Any,
) -> dict[str, Any]:
    if select == "fisher":
        fail("select", "random, uniform or magnitude (a Fisher diagonal needs data: use --check or Python)", "'fisher'")
    model = _made(name, check_positive_int("seed", seed, minimum=0))
    report = inherit(model, state, alpha, granularity, select, seed)
    say(str(report))
    if save is not None:
        _save({"state_dict": model.state_dict(), "masks": report.masks}, save)
        say(f"wrote {save}")
    return {"model": name, **report.to_dict()}


def _check(
    name: str | None,
    checkpoint: str | None,
    state: Mapping[str, torch.Tensor] | None,
    say: Callable[[str], None],
    quiet: bool,
    data: str | None,
    upstream: str | None,
    target: str | None,
    shots: int,
    seeds: int,
    alphas: list[float],
    granularity: str,
    select: str,
    interval: str,
    confidence: float,
    journal: str | None,
    output: Path | None,
    image_size: int | None,
    epochs: int,
    lr: float,
    device: str,
    threads: int | None,
    **_: Any,
) -> dict[str, Any]:
    check_positive_int("seeds", seeds, minimum=2)
    training = TrainingOptions(epochs=epochs, lr=lr, device=device)
    set_threads(threads, data)
    prepare_outputs(None, output)
    bundle, target = read_domains(data, target, image_size)
    if data is None:
        upstream = upstream or _DEFAULT_UPSTREAM
    if upstream is None and state is None:
        fail("upstream", f"one of {', '.join(bundle.domains)}", "none")
    domain, others = bundle.choose(target, None if upstream is None else [upstream])
    few_shot_split(domain, shots)  # refuses shots before anything is trained
    source = others[0] if state is None else state
    about = {
        "data": data or "embedded digits",
        "model": name or "built-in",
        "upstream": os.path.abspath(checkpoint) if checkpoint else upstream,
        "target": target,
        "shots": shots,
        "granularity": granularity,
        "select": select,
        "training": training.as_dict(),
    }
    say(f"upstream {about['upstream']}, target {target} ({len(domain)} samples, {shots} shots per class)")
    train = FewShotTransfer(
        lambda: network_for(bundle.sample_shape, bundle.classes) if name is None else load_model(name),
        source,
        lambda seed: few_shot_split(domain, shots, seed=seed),
        granularity=granularity,
        select=select,
        options=training,
    )
    with _Progress(len(alphas) * seeds, quiet) as progress:
        result: TransferCheck = transfer_check(
            train,
            alphas,
            range(seeds),
            confidence=confidence,
            interval=interval,
            journal=journal,
            about=about,
            on_result=progress.on_result,
        )
    say(str(result))
    if output is not None:
        plot_transfer_check(result, output / "transfer.png", "test accuracy")
        say(f"wrote {output / 'transfer.png'}")
    return {**about, **result.to_dict()}


class _Progress:
    """A live bar on stderr where that is a terminal, a line per training where it is not."""

    def __init__(self, trainings: int, quiet: bool) -> None:
        self._console = console(quiet, stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        silent = not self._console.is_terminal
        self._bar = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True, disable=silent)
        self._task = self._bar.add_task("starting", total=trainings)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_result(self, alpha: float, seed: int, metric: float) -> None:
        """Show what was trained."""
        line = f"seed {seed} alpha {alpha:g}: test accuracy {metric:.1%}"
        self._bar.update(self._task, description=line, advance=1)
        if not self._console.is_terminal:
            self._console.print(line)


def load_model(name: str) -> nn.Module:
    """The untrained model that ``module:function`` or ``timm:NAME`` makes."""
    return load_candidate(name, pretrained=False).model


def _made(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return load_model(name)


def _save(content: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

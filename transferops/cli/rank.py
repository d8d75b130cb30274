"""``transferops rank``: which source or which model suits the target?"""

from __future__ import annotations

import functools
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
from transferops.data import DEFAULT_TARGET, Domain, DomainBundle, few_shot_split
from transferops.otqms import TrainingOptions, network_for, write_json
from transferops.rank import (
    HEAD_INPUT,
    Candidate,
    Ranking,
    extract_cached,
    gradient_relations,
    load_candidate,
    rank_candidates,
    source_candidates,
    to_json,
)
from transferops.rank.plots import plot_ranking
from transferops.rank.ranking import check_scores

_NUMBER_WIDTH = 9


@click.command("rank", epilog="What the scores are, and what they are not: transferops.scores.")
@click.option("--data", metavar="FILE.npz|FOLDER", help="Domains to use; without it, the embedded digits.")
@click.option("--target", metavar="DOMAIN", help=f"Domain to do well on; for the embedded digits {DEFAULT_TARGET}.")
@click.option("--sources", metavar="A,B", callback=names, help="Domains to rank; all others if left out.")
@click.option(
    "--model",
    "models",
    metavar="MODULE:FUNCTION|timm:NAME|hf:NAME",
    multiple=True,
    help="A model to rank, instead of the sources; may be given several times.",
)
@click.option("--random-weights", is_flag=True, help="Leave timm and hf models untrained.")
@click.option("--layers", metavar="A,B", callback=names, help=f"Layers to take features from.  [default: {HEAD_INPUT}]")
@click.option("--scores", metavar="A,B", callback=names, help="Scores to compute; all that need no extra if left out.")
@click.option("--shots", type=int, help="Use so many target samples per class only; all if left out.")
@click.option("--seed", default=0, show_default=True, help="Of the shots and of the source models.")
@click.option("--source-steps", default=TrainingOptions.source_steps, show_default=True, help="Steps of source models.")
@click.option(
    "--cache", metavar="DIR", type=click.Path(path_type=Path), help="Keep features there; an interrupted run goes on."
)
@click.option("--json", "json_path", metavar="OUT", type=click.Path(path_type=Path), help="Write all results there.")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="Write a picture into this folder.")
@click.option("--image-size", type=int, help="Resize the images of a folder to this many pixels square.")
@click.option("--device", default=TrainingOptions.device, show_default=True, help="For example cuda.")
@click.option("--threads", type=int, help="CPU threads; if left out one for the embedded digits, else torch's choice.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@reports_errors
def command(
    data: str | None,
    target: str | None,
    sources: list[str] | None,
    models: tuple[str, ...],
    random_weights: bool,
    layers: list[str] | None,
    scores: list[str] | None,
    shots: int | None,
    seed: int,
    source_steps: int,
    cache: Path | None,
    json_path: Path | None,
    output: Path | None,
    image_size: int | None,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Which source, or which pretrained model, suits my target?

    Runs every candidate once over the labelled target samples and scores what it makes of them. A
    candidate is a network trained on one source domain, or a model of your own (--model). No score is
    best everywhere; the number of parameters and a nearest-neighbour classifier stand beside them as
    what a score has to beat.

    \b
    Try it on embedded data, scikit-learn's digits in seven domains:
      transferops rank --output pictures

    \b
    Sources in a file, or models over a folder domain/class/image:
      transferops rank --data digits.npz --target usps --shots 10
      transferops rank --data images --target photo --model timm:resnet18 --model my_models:resnet
    """
    options = TrainingOptions(device=device, source_steps=source_steps)
    check_positive_int("seed", seed, minimum=0)
    if scores is not None:
        check_scores(scores)
    if models and sources:
        fail("sources", "none beside --model: either sources or models are ranked", ", ".join(sources))
    set_threads(threads, data)
    prepare_outputs(json_path, output)
    bundle, target = read_domains(data, target, image_size)

    screen = console(quiet)
    say = functools.partial(screen.print, soft_wrap=True)
    domain, candidates, relations = _candidates(
        bundle, target, sources, models, random_weights, shots, seed, options, say
    )
    chosen = layers or [HEAD_INPUT]
    extractions = {}
    with _progress(quiet) as progress:
        task = progress.add_task("features", total=len(candidates) * len(domain))
        for name, candidate in candidates.items():
            progress.update(task, description=name)
            extractions[name] = extract_cached(
                candidate.model.to(device),
                domain.inputs,
                domain.labels,
                cache,
                layers=chosen,
                on_batch=functools.partial(progress.advance, task),
            )
    ranking = rank_candidates(
        extractions,
        scores=scores,
        extra=relations if scores is None else {},
        parameters={name: candidate.parameters for name, candidate in candidates.items()},
        target=target,
    )
    screen.print(_table(ranking, screen.width))
    for sentence in _remarks(ranking):
        say(sentence)
    if json_path is not None:
        write_json(to_json(ranking, data=data or "embedded digits", shots=shots, seed=seed), json_path)
        say(f"wrote {json_path}")
    if output is not None:
        plot_ranking(ranking, output / "ranking.png")
        say(f"wrote {output / 'ranking.png'}")


def _candidates(
    bundle: DomainBundle,
    target: str,
    sources: list[str] | None,
    models: tuple[str, ...],
    random_weights: bool,
    shots: int | None,
    seed: int,
    options: TrainingOptions,
    say: Any,
) -> tuple[Domain, dict[str, Candidate], dict[str, dict[str, float]]]:
    """The target samples to score on, what is ranked, and scores that compare the sources' data with the target's."""
    if models:
        if target not in bundle.domains:
            fail("target", f"one of {', '.join(bundle.domains)}", repr(target))
        domain = bundle.domains[target]
    else:
        domain, source_domains = bundle.choose(target, sources)
    if shots is not None:
        domain = few_shot_split(domain, shots, seed=seed, validation_fraction=0).train
    say(f"target {target}: {len(domain)} labelled samples of {len(torch.unique(domain.labels))} classes")
    if models:
        loaded = [load_candidate(name, pretrained=not random_weights) for name in dict.fromkeys(models)]
        return domain, {candidate.name: candidate for candidate in loaded}, {}
    say(f"training one network on each of {', '.join(f'{s.name} ({len(s)})' for s in source_domains)}")
    by_name = {source.name: source for source in source_domains}
    network = functools.partial(network_for, bundle.sample_shape, bundle.classes)
    trained = source_candidates(network, domain, by_name, options=options, seed=seed)
    return domain, trained, gradient_relations(network, domain, by_name, seed=seed)


def _progress(quiet: bool) -> Progress:
    """A live bar on stderr where that is a terminal, nothing where it is not."""
    screen = console(quiet, stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )


def _table(ranking: Ranking, width: int) -> Table:
    """Scores by candidates, the best mean rank first; as many candidates as the screen has room for."""
    layers = {row.layer for row in ranking.rows}
    titles = [row.name if len(layers) == 1 else f"{row.name}\n{row.layer}" for row in ranking.rows]
    ranks = ranking.mean_ranks()
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    room = width - max(map(len, ranking.scores)) - 4
    shown: list[int] = []
    for i in order:
        room -= max(_NUMBER_WIDTH, *map(len, titles[i].split("\n"))) + 3
        if room < 0 and shown:
            break
        shown.append(i)
    hidden = f"; {len(order) - len(shown)} more candidates are in the JSON" if len(shown) < len(order) else ""
    table = Table(caption=f"higher promises more; of the mean rank, baselines left out, 1 is best{hidden}")
    table.add_column("score")
    for i in shown:
        table.add_column(titles[i], justify="right")
    table.add_row("mean rank", *(f"{ranks[i]:.1f}" for i in shown))
    for score in ranking.scores:
        table.add_row(score, *(f"{ranking.rows[i].scores[score]:.4g}" for i in shown))
    return table


def _remarks(ranking: Ranking) -> list[str]:
    """What limits the numbers, once each, and who leads."""
    ranks = ranking.mean_ranks()
    best = ranking.rows[ranks.index(min(ranks))]
    first = {score: ranking.order(score)[0].name for score in ranking.scores if score != "parameters"}
    agreeing = sum(name == best.name for name in first.values())
    lines = [f"{best.name} has the best mean rank; {agreeing} of {len(first)} scores put it first"]
    notes = dict.fromkeys(note for row in ranking.rows for note in row.notes.values())
    return [*lines, *(f"note: {note}" for note in notes)]

"""``transferops rank``: which source or which model suits the target?"""

from __future__ import annotations

import functools
from pathlib import Path

import click
import torch
from rich.table import Table

from transferops._validate import check_positive_int, fail
from transferops.cli import _options
from transferops.cli._command import Command, option
from transferops.cli._settings import RESULTS
from transferops.data import few_shot_split
from transferops.otqms import TrainingOptions, network_for
from transferops.rank import (
    HEAD_INPUT,
    Ranking,
    extract,
    extract_cached,
    load_candidate,
    rank_candidates,
    source_candidates,
    source_relations,
    to_json,
)
from transferops.rank.plots import plot_ranking
from transferops.rank.ranking import check_scores
from transferops.scores import RELATIONS, SCORES

_CANDIDATES = "Candidates and scores"
_NUMBER_WIDTH = 9
_DEFAULT_RELATIONS = ("pge", "pge_cosine")


@click.command(
    "rank",
    cls=Command,
    examples=[
        ("On embedded data, scikit-learn's digits in seven domains", "transferops rank --output pictures"),
        ("Sources in a file", "transferops rank --data digits.npz --target usps --shots 10 --json ranking.json"),
        (
            "Models, over a folder domain/class/image",
            "transferops rank --data images --target photo --model timm:resnet18 --model my_models:resnet",
        ),
    ],
    results="--json holds all scores, also those that the table has no room for, and the settings; --output a picture.",
    epilog="What the scores are, and what they are not: transferops.scores.",
)
@_options.domains("do well on", sources="Domains to rank")
@_options.shots(None)
@option(
    "--model",
    "models",
    group=_CANDIDATES,
    metavar="MODULE:FUNCTION|timm:NAME|hf:NAME",
    multiple=True,
    help="A model to rank, instead of the sources; may be given several times.",
)
@option("--random-weights", group=_CANDIDATES, is_flag=True, help="Leave timm and hf models untrained.")
@_options.names("--layers", group=_CANDIDATES, help=f"Layers to take features from.  [default: {HEAD_INPUT}]")
@_options.names(
    "--scores",
    group=_CANDIDATES,
    known=[*SCORES, *RELATIONS],
    help="Scores to compute; all that need no extra if left out (task2vec trains a network more).",
)
@_options.count("--seed", 0, "Of the shots and of the source models.")
@_options.count("--source-steps", TrainingOptions.source_steps, "Steps of source models.")
@_options.output(pictures="a picture")
@option(
    "--cache",
    group=RESULTS,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep features there; an interrupted run goes on.",
)
@_options.machine()
def command(
    domains: _options.Domains,
    shots: int | None,
    models: tuple[str, ...],
    random_weights: bool,
    layers: list[str] | None,
    scores: list[str] | None,
    seed: int,
    source_steps: int,
    output: _options.Output,
    cache: Path | None,
    machine: _options.Machine,
) -> None:
    """Which source, or which pretrained model, suits my target?

    Runs every candidate once over the labelled target samples and scores what it makes of them. A
    candidate is a network trained on one source domain, or a model of your own (--model). No score is
    best everywhere; the number of parameters and a nearest-neighbour classifier stand beside them as
    what a score has to beat.
    """
    training = TrainingOptions(device=machine.device, source_steps=source_steps)
    check_positive_int("seed", seed, minimum=0)
    comparing = list(_DEFAULT_RELATIONS if scores is None else [name for name in scores if name in RELATIONS])
    if scores is not None:
        scores = check_scores([name for name in scores if name not in RELATIONS] or ["knn"], further=RELATIONS)
    if models and scores is not None and comparing:
        fail("scores", "none that compares sources, beside --model", ", ".join(comparing))
    if models and domains.sources:
        fail("sources", "none beside --model: either sources or models are ranked", ", ".join(domains.sources))
    machine.set_threads(domains)
    output.prepare()
    bundle, target = domains.read(output)
    if not models:
        domain, sources = bundle.choose(target, domains.sources)
    elif target in bundle.domains:
        domain = bundle.domains[target]
    else:
        fail("target", f"one of {', '.join(bundle.domains)}", repr(target))
    if shots is not None:
        domain = few_shot_split(domain, shots, seed=seed, validation_fraction=0).train

    output.say(f"target {target}: {len(domain)} labelled samples of {len(torch.unique(domain.labels))} classes")
    relations: dict[str, dict[str, float]] = {}
    if models:
        candidates = {name: load_candidate(name, pretrained=not random_weights) for name in dict.fromkeys(models)}
    else:
        by_name = {source.name: source for source in sources}
        network = functools.partial(network_for, bundle.sample_shape, bundle.classes)
        # A layer that there is not is found before anything is trained.
        extract(network(), [(domain.inputs[:1], domain.labels[:1])], layers=layers or [HEAD_INPUT])
        output.say(f"training one network on each of {', '.join(f'{s.name} ({len(s)})' for s in sources)}")
        candidates = source_candidates(network, domain, by_name, options=training, seed=seed)
        relations = source_relations(comparing, network, domain, by_name, candidates, options=training, seed=seed)
    extractions = {}
    with output.progress(len(candidates) * len(domain)) as progress:
        for name, candidate in candidates.items():
            progress.show(name)
            extractions[name] = extract_cached(
                candidate.model.to(machine.device),
                domain.inputs,
                domain.labels,
                cache,
                layers=layers or [HEAD_INPUT],
                on_batch=progress.advance,
            )
            progress.finished(f"{name}: features of {len(domain)} samples")
    ranking = rank_candidates(
        extractions,
        scores=scores,
        extra=relations,
        parameters={name: candidate.parameters for name, candidate in candidates.items()},
        target=target,
    )
    output.show(_table(ranking, output.width))
    for sentence in _remarks(ranking):
        output.say(sentence)
    output.write(to_json(ranking, data=domains.origin, shots=shots, seed=seed))
    output.draw("ranking.png", functools.partial(plot_ranking, ranking))


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
    scores = [score for score in ranking.scores if score != "parameters"]
    agreeing = sum(best in ranking.first(score) for score in scores)
    lines = [f"{best.name} has the best mean rank; {agreeing} of {len(scores)} scores put it first"]
    notes = dict.fromkeys(note for row in ranking.rows for note in row.notes.values())
    return [*lines, *(f"note: {note}" for note in notes)]

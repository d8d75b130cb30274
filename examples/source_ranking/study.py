"""Does a ranking of sources agree with how well they transfer? Measured on few-shot targets, over seeds.

For every target domain and seed: a network is trained on each other domain; the scores see its features and outputs on
the target's shots only; then the network is fine-tuned on the same shots and tested on the rest of the target. The
question is how well each score orders the sources by that accuracy.

    python examples/source_ranking/study.py                       # scikit-learn's digits in seven domains
    python examples/source_ranking/study.py --data digits_multi.npz --output results

Every network and accuracy is written down as soon as it is there; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from transferops._figures import DPI, new_figure, plain_axes
from transferops.data import Domain, DomainBundle, few_shot_split, load_bundle, load_digits_domains
from transferops.otqms import TrainingOptions, network_for
from transferops.rank import evaluate_ranking, extract, gradient_relations, rank_candidates, source_candidates

FINE_TUNE_STEPS = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an .npz file or a folder domain/class/image; without it, scikit-learn's digits")
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("source_ranking"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same result on every machine
    bundle = load_digits_domains() if arguments.data is None else load_bundle(arguments.data)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = list(trials(bundle, arguments.shots, arguments.seeds, arguments.output / "trials.jsonl"))
    name = Path(arguments.data).stem if arguments.data else "digits"
    summary = summarize(rows, data=name, shots=arguments.shots)
    (arguments.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (arguments.output / "summary.md").write_text(as_markdown(summary))
    plot(summary, arguments.output / "summary.png")
    print(as_markdown(summary))


def trials(bundle: DomainBundle, shots: int, seeds: int, path: Path) -> Iterator[dict[str, Any]]:
    """One row per seed and target: scores and accuracy by source. Rows in the file are not computed again."""
    done = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            done[row["seed"], row["target"]] = row
    for seed in range(seeds):
        models = None
        for target in bundle.domains:
            if (seed, target) not in done:
                models = models or train_on_each(bundle, seed)
                row = trial(bundle, models, target, shots, seed)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                done[seed, target] = row
                print(f"seed {seed} {target}: " + ", ".join(f"{k} {v:.3f}" for k, v in row["accuracy"].items()))
            yield done[seed, target]


def train_on_each(bundle: DomainBundle, seed: int) -> dict[str, nn.Module]:
    """A network per domain, all from one initialisation."""
    anything = next(iter(bundle.domains.values()))
    network = functools.partial(network_for, bundle.sample_shape, bundle.classes)
    candidates = source_candidates(network, anything, bundle.domains, options=TrainingOptions(), seed=seed)
    return {name: candidate.model for name, candidate in candidates.items()}


def trial(bundle: DomainBundle, models: dict[str, nn.Module], target: str, shots: int, seed: int) -> dict[str, Any]:
    split = few_shot_split(bundle.domains[target], shots, validation_fraction=0, seed=seed)
    batch = [(split.train.inputs, split.train.labels)]
    extractions = {name: extract(model, batch) for name, model in models.items() if name != target}
    network = functools.partial(network_for, bundle.sample_shape, bundle.classes)
    sources = {name: bundle.domains[name] for name in extractions}
    relations = gradient_relations(network, split.train, sources, seed=seed)
    ranking = rank_candidates(extractions, extra=relations, target=target)
    return {
        "seed": seed,
        "target": target,
        "scores": {row.name: row.scores for row in ranking.rows},
        "accuracy": {name: fine_tuned_accuracy(models[name], split.train, split.test, seed) for name in extractions},
    }


def fine_tuned_accuracy(model: nn.Module, train: Domain, test: Domain, seed: int) -> float:
    """Test accuracy after fine-tuning a copy of the model on the shots, for a fixed number of steps."""
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FINE_TUNE_STEPS)
    for _ in range(FINE_TUNE_STEPS):
        index = torch.randperm(len(train), generator=generator)[:32]
        optimizer.zero_grad()
        F.cross_entropy(model(train.inputs[index]), train.labels[index]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(test.inputs.split(512), test.labels.split(512))
        )
    return right / len(test)


def summarize(rows: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    """For each score the mean over targets and seeds of its measures, and the standard error over targets."""
    names = [name for name in next(iter(rows[0]["scores"].values())) if name != "parameters"]
    by_score = {}
    for name in names:
        by_target: dict[str, list[tuple[float, float, float]]] = {}
        for row in rows:
            scores = np.array([row["scores"][source][name] for source in row["accuracy"]], dtype=float)
            accuracy = np.array(list(row["accuracy"].values()))
            if not np.isfinite(scores).all() or np.ptp(scores) == 0:
                continue
            quality = evaluate_ranking(scores, accuracy, resamples=1)
            loss = accuracy.max() - accuracy[int(scores.argmax())]
            by_target.setdefault(row["target"], []).append((quality.weighted_tau.value, quality.pearson.value, loss))
        means = np.array([np.mean(values, axis=0) for values in by_target.values()])
        if len(means) == 0:
            continue
        error = means.std(0, ddof=1) / math.sqrt(len(means)) if len(means) > 1 else np.zeros(3)
        measures = ("weighted_tau", "pearson", "accuracy_lost_by_its_choice")
        by_score[name] = {m: [float(v), float(e)] for m, v, e in zip(measures, means.mean(0), error, strict=True)}
    chance = float(np.mean([max(row["accuracy"].values()) - np.mean(list(row["accuracy"].values())) for row in rows]))
    order = sorted(by_score, key=lambda name: -by_score[name]["weighted_tau"][0])
    return {
        **about,
        "targets": sorted({row["target"] for row in rows}),
        "seeds": sorted({row["seed"] for row in rows}),
        "accuracy_lost_by_a_random_choice": chance,
        "scores": {name: by_score[name] for name in order},
    }


def as_markdown(summary: dict[str, Any]) -> str:
    head = (
        f"# Ranking sources: {summary['data']}, {summary['shots']} shots per class\n\n"
        f"{len(summary['targets'])} targets, {len(summary['seeds'])} seeds; mean and standard error over targets. "
        f"Points lost: test accuracy of the best source less that of the score's first choice; a random choice loses "
        f"{100 * summary['accuracy_lost_by_a_random_choice']:.1f}.\n\n"
        "| score | weighted tau | Pearson | points lost |\n|---|---|---|---|\n"
    )
    lines = []
    for name, measures in summary["scores"].items():
        tau, pearson, lost = measures.values()
        lines.append(
            f"| {name} | {tau[0]:.2f} ± {tau[1]:.2f} | {pearson[0]:.2f} ± {pearson[1]:.2f} "
            f"| {100 * lost[0]:.1f} ± {100 * lost[1]:.1f} |"
        )
    return head + "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    names = list(summary["scores"])[::-1]
    figure = new_figure(1.2 + 0.32 * len(names))
    axes = plain_axes(figure.subplots())
    values = np.array([summary["scores"][name]["weighted_tau"] for name in names])
    axes.errorbar(values[:, 0], range(len(names)), xerr=values[:, 1], fmt="o", capsize=3)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("weighted Kendall tau with fine-tuned accuracy  (mean and standard error over targets)")
    axes.set_title(f"{summary['data']}: ranking the sources of few-shot targets", loc="left", fontsize=10)
    figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    main()

"""What deciding costs: time saved against samples saved, and Fisher information and allocation against an epoch.

    python bench/otqms_overhead.py --data digits_multi.npz
    python bench/otqms_overhead.py --data digits_multi.npz --parts state --rounds 1   # again and again: a round more

Trains "all-sources" and "quantities-dynamic" in turn, several times the same; of every epoch the fastest counts. A
sample counts as often as it is trained on: an epoch of few samples passes over them until it has min_steps steps.
Source models are trained once and not counted, nor is the first decision of a process. Writes
bench/results/otqms_overhead.json and .md. Run it on a quiet machine; if it is quiet for a minute at a time only, with
``--parts``: source models and rounds are kept in that folder.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run import ROOT, environment

from transferops import _checkpoint as checkpoint
from transferops.adapt.journal import Journal
from transferops.data import DomainBundle, few_shot_split, load_bundle
from transferops.otqms import OTQMS, TrainingOptions, allocate, network_for

STRATEGIES = ("all-sources", "quantities-dynamic")


def measure(
    bundle: DomainBundle, target: str, shots: int, epochs: int, rounds: int, parts: Path | None
) -> dict[str, Any]:
    """Both strategies' epochs, and what follows."""
    domain, sources = bundle.choose(target)
    split = few_shot_split(domain, shots)
    path = None if parts is None else parts / f"{target}-{shots}-shots.ckpt"
    kept = None if path is None else checkpoint.load(path)
    trainer = OTQMS(
        partial(network_for, bundle.sample_shape, bundle.classes),
        split.train,
        {source.name: source for source in sources},
        validation=split.validation,
        options=TrainingOptions(epochs=epochs),
        source_models=kept,
    )
    models = {name: model.state_dict() for name, model in zip(trainer.source_names, trainer.source_models())}
    if path is not None and kept is None:
        checkpoint.save(models, path)
    (samples, *available) = trainer.samples.sizes  # once before the clock runs: what a process loads and compiles
    allocate(trainer.gram(trainer.source_models()[0]), samples, available, trainer.dimension)
    runs = [] if parts is None else Journal(parts / f"{target}-{shots}-shots.jsonl", environment()).results
    for _ in range(rounds):
        epochs_of = {name: [vars(record) for record in trainer.fit(name).epochs] for name in STRATEGIES}
        if parts is None:
            runs.append(epochs_of)
        else:
            journal = Journal(parts / f"{target}-{shots}-shots.jsonl", environment())
            journal.add(epochs_of)
            runs = journal.results
    found: dict[str, Any] = {"target": target, "shots": shots, "rounds": len(runs)}
    if not runs:
        return found
    for strategy in STRATEGIES:
        repeated = [run[strategy] for run in runs]
        found[strategy] = {
            "samples": [record["samples"] * passes(record["samples"], trainer.options) for record in repeated[0]],
            "seconds": [min(r["seconds"] for r in same) for same in zip(*repeated, strict=True)],
            "deciding": [min(r["allocation_seconds"] for r in same) for same in zip(*repeated, strict=True)],
        }
    whole, ours = (found[name] for name in STRATEGIES)
    found["samples_saved"] = 1 - sum(ours["samples"]) / sum(whole["samples"])
    found["time_saved"] = 1 - sum(ours["seconds"]) / sum(whole["seconds"])
    found["time_over_samples_saved"] = found["time_saved"] / found["samples_saved"]
    found["deciding_over_epoch"] = sum(ours["deciding"]) / sum(whole["seconds"])
    return found


def passes(samples: int, options: TrainingOptions) -> int:
    """Of an epoch, as :meth:`transferops.otqms.training.EpochPlan.shuffled` has them."""
    return max(1, math.ceil(options.min_steps / math.ceil(samples / options.batch_size)))


def markdown(report: dict[str, Any]) -> str:
    """A row per target."""
    env = report["environment"]
    lines = [
        f"Measured {env['date']} at commit {env['commit']} on {env['processor']}, {env['threads']} threads, torch "
        f"{env['torch']}: {report['epochs']} epochs, the fastest of so many rounds of each.",
        "",
        "| target | rounds | all-sources, s per epoch | quantities-dynamic, s per epoch | deciding, s per epoch "
        "| deciding / epoch of all-sources | samples saved | time saved | time saved / samples saved |",
        "|---" * 9 + "|",
    ]
    for row in report["targets"]:
        whole, ours = (row[name] for name in STRATEGIES)
        means = [sum(values) / len(values) for values in (whole["seconds"], ours["seconds"], ours["deciding"])]
        lines.append(
            f"| {row['target']} | {row['rounds']} | {means[0]:.3f} | {means[1]:.3f} | {means[2]:.3f} "
            f"| {row['deciding_over_epoch']:.1%} "
            f"| {row['samples_saved']:.1%} | {row['time_saved']:.1%} | {row['time_over_samples_saved']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file or a folder domain/class/image")
    parser.add_argument("--targets", default="usps,street", help="names, separated by commas")
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", type=Path, help="a folder to go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle = load_bundle(arguments.data)
    found = [
        measure(bundle, target, arguments.shots, arguments.epochs, arguments.rounds, arguments.parts)
        for target in arguments.targets.split(",")
    ]
    measured = [row for row in found if row["rounds"]]
    report = {"environment": environment(), "epochs": arguments.epochs, "targets": measured}
    place = ROOT / "bench" / "results" / "otqms_overhead"
    place.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    place.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

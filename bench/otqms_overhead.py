"""What deciding costs: time saved against samples saved, and Fisher information and allocation against an epoch.

    python bench/otqms_overhead.py --data digits_multi.npz

Trains "all-sources" and "quantities-dynamic" in turn, several times the same; of every epoch the fastest counts. Source
models are trained once and not counted. Writes bench/results/otqms_overhead.json and .md. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from run import ROOT, environment

from transferops.data import DomainBundle, few_shot_split, load_bundle
from transferops.otqms import OTQMS, TrainingOptions, network_for

STRATEGIES = ("all-sources", "quantities-dynamic")


def measure(bundle: DomainBundle, target: str, shots: int, epochs: int, rounds: int) -> dict[str, Any]:
    """Both strategies' epochs, and what follows."""
    domain, sources = bundle.choose(target)
    split = few_shot_split(domain, shots)
    trainer = OTQMS(
        partial(network_for, bundle.sample_shape, bundle.classes),
        split.train,
        {source.name: source for source in sources},
        validation=split.validation,
        options=TrainingOptions(epochs=epochs),
    )
    trainer.source_models()
    runs = [[trainer.fit(name).epochs for name in STRATEGIES] for _ in range(rounds)]
    found: dict[str, Any] = {"target": target, "shots": shots}
    for strategy, repeated in zip(STRATEGIES, zip(*runs, strict=True), strict=True):
        found[strategy] = {
            "samples": [record.samples for record in repeated[0]],
            "seconds": [min(r.seconds for r in same) for same in zip(*repeated, strict=True)],
            "deciding": [min(r.allocation_seconds for r in same) for same in zip(*repeated, strict=True)],
        }
    whole, ours = (found[name] for name in STRATEGIES)
    found["samples_saved"] = 1 - sum(ours["samples"]) / sum(whole["samples"])
    found["time_saved"] = 1 - sum(ours["seconds"]) / sum(whole["seconds"])
    found["time_over_samples_saved"] = found["time_saved"] / found["samples_saved"]
    found["deciding_over_epoch"] = sum(ours["deciding"]) / sum(whole["seconds"])
    return found


def markdown(report: dict[str, Any]) -> str:
    """A row per target."""
    env = report["environment"]
    lines = [
        f"Measured {env['date']} at commit {env['commit']} on {env['processor']}, {env['threads']} threads, torch "
        f"{env['torch']}: {report['epochs']} epochs, the fastest of {report['rounds']} rounds of each.",
        "",
        "| target | all-sources, s per epoch | quantities-dynamic, s per epoch | deciding, s per epoch "
        "| deciding / epoch of all-sources | samples saved | time saved | time saved / samples saved |",
        "|---" * 8 + "|",
    ]
    for row in report["targets"]:
        whole, ours = (row[name] for name in STRATEGIES)
        means = [sum(values) / len(values) for values in (whole["seconds"], ours["seconds"], ours["deciding"])]
        lines.append(
            f"| {row['target']} | {means[0]:.3f} | {means[1]:.3f} | {means[2]:.3f} | {row['deciding_over_epoch']:.1%} "
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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle = load_bundle(arguments.data)
    report = {
        "environment": environment(),
        "epochs": arguments.epochs,
        "rounds": arguments.rounds,
        "targets": [
            measure(bundle, target, arguments.shots, arguments.epochs, arguments.rounds)
            for target in arguments.targets.split(",")
        ],
    }
    place = ROOT / "bench" / "results" / "otqms_overhead"
    place.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    place.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

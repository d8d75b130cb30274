"""When does inheriting hurt? The simulated two-layer ReLU CNNs, and how often the index is right.

    python bench/study_inherit.py [folder for the results, bench/results if left out]

Three parts: the reference settings; heat maps over N1, |u| and alpha; random settings against the sign of the index.
Writes study_inherit.json, .md and .png.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import ROOT, environment

from transferops.adapt import Effect, TransferSetting, gamma_index, paired_effects, simulate
from transferops.adapt.transfer_plots import plot_transfer_maps

SEEDS = range(20)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAP_SAMPLES = (50, 100, 200, 400)
MAP_SHARED = (0.0, 0.5, 1.0, 1.5, 2.0)
RANDOM_SETTINGS = 60


def reference() -> list[dict[str, Any]]:
    """|u| = 0, 1, 2 with everything else at its default, in both ways to weigh upstream samples."""
    rows = []
    settings = [TransferSetting(shared) for shared in (0.0, 1.0, 2.0)]
    for upstream_mean in (False, True):
        accuracy = simulate(settings, ALPHAS, SEEDS, upstream_mean=upstream_mean)
        for setting, values in zip(settings, accuracy, strict=True):
            rows.append(
                {
                    "shared": setting.shared,
                    "upstream_mean": upstream_mean,
                    "accuracy": values.mean(1).tolist(),
                    "verdicts": [effect.verdict for effect in paired_effects(values, ALPHAS)],
                }
            )
    return rows


def heat_maps(path: Path) -> list[list[list[float]]]:
    """Accuracy against alpha = 0, [N1, |u|, alpha]; drawn into ``path``."""
    settings = [TransferSetting(shared, samples) for samples in MAP_SAMPLES for shared in MAP_SHARED]
    accuracy = simulate(settings, ALPHAS, SEEDS).mean(2).view(len(MAP_SAMPLES), len(MAP_SHARED), len(ALPHAS))
    difference = (accuracy - accuracy[..., :1])[..., 1:]
    plot_transfer_maps(difference, MAP_SAMPLES, MAP_SHARED, ALPHAS[1:], path)
    return difference.tolist()


def random_settings(count: int, seed: int = 0) -> list[TransferSetting]:
    """Settings around the reference: log-uniform numbers of samples, uniform strengths and noises."""
    generator = np.random.default_rng(seed)

    def setting() -> TransferSetting:
        strengths = generator.uniform((0, 1, 1, 0.5, 0.5), (2.5, 3, 3, 1.5, 1.5))
        shared, first, second, upstream_noise, downstream_noise = (float(value) for value in strengths)
        return TransferSetting(
            shared,
            int(np.exp(generator.uniform(np.log(50), np.log(400)))),
            int(np.exp(generator.uniform(np.log(10), np.log(50)))),
            first,
            second,
            upstream_noise,
            downstream_noise,
            int(generator.choice([500, 1000, 2000])),
        )

    return [setting() for _ in range(count)]


def agreement() -> dict[str, Any]:
    """Share of random settings in which the index has the sign of the measured effect."""
    settings = random_settings(RANDOM_SETTINGS)
    start, processor = time.perf_counter(), time.process_time()
    accuracy = simulate(settings, ALPHAS, SEEDS)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    effects: list[tuple[Effect, ...]] = [paired_effects(values, ALPHAS) for values in accuracy]
    result: dict[str, Any] = {"settings": len(settings), "seeds": len(SEEDS), "by_alpha": {}}
    result |= {"seconds": seconds, "processor_seconds": processor}
    for k, alpha in enumerate(ALPHAS[1:]):
        warned = [gamma_index(setting, alpha) < gamma_index(setting, 0) for setting in settings]
        right = [warns == (effect[k].difference < 0) for warns, effect in zip(warned, effects, strict=True)]
        clear = [effect[k].verdict != "undecided" for effect in effects]
        result["by_alpha"][f"{alpha:g}"] = {
            "right": sum(right),
            "clear": sum(clear),
            "right_and_clear": sum(r and c for r, c in zip(right, clear, strict=True)),
            "false_alarms": sum(
                w and effect[k].verdict == "positive" for w, effect in zip(warned, effects, strict=True)
            ),
            "negative": sum(effect[k].verdict == "negative" for effect in effects),
            "positive": sum(effect[k].verdict == "positive" for effect in effects),
        }
    return result


def markdown(report: dict[str, Any]) -> str:
    env = report["environment"]
    lines = [
        f"Measured {env['date']} at commit {env['commit']} on {env['processor']}, {env['threads']} threads, torch "
        f"{env['torch']}; {len(SEEDS)} seeds. Accuracy by alpha; + and - where the verdict (95 % over all shares) is "
        "positive or negative.",
        "",
        "| upstream samples weigh | abs(u) | " + " | ".join(f"alpha {alpha:g}" for alpha in ALPHAS) + " |",
        "|---|---|" + "---|" * len(ALPHAS),
    ]
    marks = {"positive": " +", "negative": " -", "undecided": ""}
    for row in report["reference"]:
        verdicts = ["", *(marks[verdict] for verdict in row["verdicts"])]
        cells = [f"{value:.3f}{mark}" for value, mark in zip(row["accuracy"], verdicts, strict=True)]
        weigh = "1/N1 (mean loss)" if row["upstream_mean"] else "1/N2, as downstream"
        lines.append(f"| {weigh} | {row['shared']:g} | " + " | ".join(cells) + " |")
    index = report["agreement"]
    lines += [
        "",
        f"Sign of the index on {index['settings']} random settings, {index['seeds']} seeds each, simulated in "
        f"{index['seconds']:.0f} s ({index['processor_seconds']:.0f} s of processor time):",
        "",
        "| alpha | right | clear cases | right among them | false alarms | hurts | helps |",
        "|---|---|---|---|---|---|---|",
    ]
    for alpha, row in index["by_alpha"].items():
        lines.append(
            f"| {alpha} | {row['right']}/{index['settings']} | {row['clear']} | {row['right_and_clear']} "
            f"| {row['false_alarms']} | {row['negative']} | {row['positive']} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    folder = Path(arguments[0]) if arguments else ROOT / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "environment": environment(),
        "reference": reference(),
        "maps": {
            "upstream_samples": MAP_SAMPLES,
            "shared": MAP_SHARED,
            "alphas": ALPHAS[1:],
            "difference": heat_maps(folder / "study_inherit.png"),
        },
        "agreement": agreement(),
    }
    (folder / "study_inherit.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "study_inherit.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1:])

"""Train with 1, 2 and 4 processes over Gloo and compare decisions and losses.

    python bench/stress_processes.py

Prints the largest relative difference of each strategy's losses to those of one process, writes
bench/results/stress_processes.json, and exits with 1 if a decision differs or a difference is above 1e-4 (float32 sums
in another order).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from run import ROOT, environment
from stress_kills import task
from torch import nn

from transferops.otqms import OTQMS, TrainingOptions
from transferops.otqms.distributed import launched

STRATEGIES = ("quantities-dynamic", "weights", "recommended", "pooled-then-fine-tuned", "wadn")
OPTIONS = TrainingOptions(epochs=6, batch_size=9, min_steps=10, source_steps=60, schedule="cosine")
TOLERANCE = 1e-4


def train() -> dict[str, list[tuple[list[int], list[float]]]]:
    """Quantities, and losses, of every epoch by strategy."""
    torch.set_num_threads(1)

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    sources = {"near": task(1, 40), "far": task(2, 35, 1), "small": task(3, 3)}
    trainer = OTQMS(network, task(0, 8), sources, validation=task(5, 6), options=OPTIONS)
    results = {}
    for name in STRATEGIES:
        records = trainer.fit(name).epochs
        losses = [[r.train_loss, r.validation_loss or 0.0, r.predicted_risk or 0.0] for r in records]
        results[name] = [(list(r.quantities.values()), own) for r, own in zip(records, losses, strict=True)]
    return results


def main() -> None:
    """The driver, or with ``--output`` one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output")
    arguments = parser.parse_args()
    if arguments.output is not None:
        with launched(torch.device("cpu")) as world:
            results = train()
            if world.leads:
                Path(arguments.output).write_text(json.dumps(results))
            world.wait()
        return

    alone = json.loads(json.dumps(train()))
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for size in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "results.json"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
            subprocess.run([*launcher, __file__, "--output", str(output)], check=True)
            together = json.loads(output.read_text())
        for name in STRATEGIES:
            pairs = list(zip(alone[name], together[name], strict=True))
            same = all(a[0] == b[0] for a, b in pairs)
            worst = max(abs(x - y) / max(abs(x), 1e-12) for a, b in pairs for x, y in zip(a[1], b[1], strict=True))
            print(f"{size} processes, {name}: {'same' if same else 'OTHER'} decisions, losses differ by {worst:.1e}")
            results.setdefault(f"{size} processes", {})[name] = {"same_decisions": same, "relative_difference": worst}
    place = ROOT / "bench" / "results" / "stress_processes.json"
    place.write_text(json.dumps({"environment": environment(), "against one process": results}, indent=1) + "\n")
    found = [entry for by_strategy in results.values() for entry in by_strategy.values()]
    sys.exit(0 if all(e["same_decisions"] and e["relative_difference"] <= TOLERANCE for e in found) else 1)


if __name__ == "__main__":
    main()

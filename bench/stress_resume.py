"""Kill a training with SIGKILL at random moments, resume it, and compare the final weights bit for bit.

    python bench/stress_resume.py --kills 20

Prints one line per kill, writes bench/results/stress_resume.json, and exits with 1 if a resumed training differs from
the undisturbed one. Data are made up; the network has dropout and the schedule changes the learning rate at every step,
so that a random state or a step that is lost shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from run import ROOT, environment
from torch import nn

from transferops.otqms import OTQMS, TrainingOptions
from transferops.otqms.pool import TensorSamples

OPTIONS = TrainingOptions(
    epochs=40, patience=40, batch_size=8, min_steps=60, source_steps=400, checkpoint_steps=7, schedule="cosine"
)


def task(seed: int, per_class: int, turn: int = 0) -> TensorSamples:
    """Three Gaussian classes; ``turn`` exchanges the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3 * per_class) % 3
    inputs = 2 * torch.eye(3, 4)[labels] + 0.7 * torch.randn(len(labels), 4, generator=generator)
    return TensorSamples(inputs, (labels + turn) % 3)


def network() -> nn.Module:
    """With dropout."""
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))


def train(strategy: str, folder: str | None) -> str:
    """A hash of the weights and the records of one training."""
    torch.set_num_threads(1)
    sources = {"near": task(1, 100), "far": task(2, 80, 1)}
    trainer = OTQMS(network, task(0, 8), sources, validation=task(5, 6), options=OPTIONS, checkpoint=folder)
    run = trainer.fit(strategy)
    content = b"".join(value.numpy().tobytes() for value in run.model.state_dict().values())
    records = [{k: v for k, v in dataclasses.asdict(r).items() if "seconds" not in k} for r in run.epochs]
    return hashlib.sha256(content + json.dumps(records).encode()).hexdigest()


def warm_up() -> None:
    """Have everything imported that is imported late, so that no kill is wasted on it."""
    options = dataclasses.replace(OPTIONS, epochs=1, min_steps=1, source_steps=1)
    sources = {"near": task(1, 4), "far": task(2, 4, 1)}
    OTQMS(network, task(0, 4), sources, options=options).fit("quantities-dynamic")


def main() -> None:
    """The driver, or with ``--folder`` one training that it kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--strategy", default="quantities-dynamic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        warm_up()
        print("started", flush=True)
        print(train(arguments.strategy, arguments.folder), flush=True)
        return

    reference = train(arguments.strategy, None)
    randomness, killed = random.Random(arguments.seed), 0
    trainings: list[dict[str, Any]] = []
    while killed < arguments.kills:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--strategy", arguments.strategy, "--folder", folder]
            result, moments = "", list[float]()
            while not result:
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                    assert process.stdout is not None
                    process.stdout.readline()
                    moment = randomness.uniform(0.02, 2.0)
                    if killed < arguments.kills and len(moments) < 4:
                        time.sleep(moment)
                        process.send_signal(signal.SIGKILL)
                    result = process.stdout.readline().strip()
                if not result:
                    moments.append(round(moment, 3))
                    killed += 1
                    print(f"kill {killed}: {sorted(path.name for path in Path(folder).rglob('*.ckpt'))}")
            trainings.append({"killed_after_seconds": moments, "bit_identical": result == reference})
            verdict = "the same" if result == reference else "DIFFERENT"
            print(f"{len(moments)} kills, then finished: {verdict}", flush=True)
    identical = all(training["bit_identical"] for training in trainings)
    report = {"environment": environment(), "strategy": arguments.strategy, "kills": killed, "trainings": trainings}
    place = ROOT / "bench" / "results" / "stress_resume.json"
    place.write_text(json.dumps({**report, "bit_identical": identical}, indent=1) + "\n")
    sys.exit(0 if identical else 1)


if __name__ == "__main__":
    main()

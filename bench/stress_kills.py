"""Kill long-running work with SIGKILL at random moments, run it again, and compare what it writes in the end.

    python bench/stress_kills.py --kills 25
    python bench/stress_kills.py --kills 30 --command otqms --command training

Each command runs in a forked process, which is killed up to four times and then left alone. Its document is to be what
the undisturbed command wrote, bit for bit but for measured seconds. Writes bench/results/stress_kills.json; the exit
status is 1 if a document differs. Data are made up.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import ROOT, environment
from torch import nn

from transferops import _checkpoint as checkpoint
from transferops.cli import cli
from transferops.otqms import OTQMS, TrainingOptions, write_json
from transferops.otqms.pool import TensorSamples
from transferops.rank import extract_cached

MOST = 4  # kills of one run


def network() -> nn.Module:
    """A candidate for ``rank``: the same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 768), nn.ReLU(), nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 3))


def write_domains(path: Path, samples: int) -> None:
    """Two domains with three Gaussian classes of six features."""
    generator = np.random.default_rng(0)
    arrays = {}
    for name, turn in (("near", 0), ("target", 0), ("far", 1)):
        labels = np.arange(samples) % 3
        arrays[f"{name}_x"] = 2 * np.eye(3, 6)[(labels + turn) % 3] + generator.normal(size=(samples, 6))
        arrays[f"{name}_y"] = labels
    np.savez(path, **arrays)


def task(seed: int, per_class: int, turn: int = 0) -> TensorSamples:
    """Three Gaussian classes of four features; ``turn`` exchanges the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3 * per_class) % 3
    inputs = 2 * torch.eye(3, 4)[labels] + 0.7 * torch.randn(len(labels), 4, generator=generator)
    return TensorSamples(inputs, (labels + turn) % 3)


def _command(*arguments: str) -> Callable[[Path], None]:
    """A command of the command line that writes ``document.json``; ``{}`` in an argument is the folder."""

    def run(folder: Path) -> None:
        filled = [argument.format(folder) for argument in arguments]
        common = ["--data", str(folder.parent / "domains.npz"), "--target", "target", "--threads", "1"]
        cli.main([*filled, *common, "--quiet", "--json", str(folder / "document.json")], standalone_mode=False)

    return run


def features(folder: Path) -> None:
    """Extract 40 parts of features through the cache."""
    model = nn.Sequential(*network(), nn.Linear(3, 2))
    inputs = torch.randn(40 * 2048, 6, generator=torch.Generator().manual_seed(1))
    found = extract_cached(model, inputs, torch.zeros(len(inputs), dtype=torch.int64), folder / "cache")
    checkpoint.save({"outputs": found.outputs, "sums": [found.outputs.sum(0)]}, folder / "document.json")


def training(folder: Path) -> None:
    """Dropout, and a learning rate that changes at every step: a random state or a step that is lost shows."""
    options = TrainingOptions(
        epochs=16, patience=16, batch_size=8, min_steps=60, source_steps=400, checkpoint_steps=7, schedule="cosine"
    )
    trainer = OTQMS(
        lambda: nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3)),
        task(0, 8),
        {"near": task(1, 100), "far": task(2, 80, 1)},
        validation=task(5, 6),
        options=options,
        checkpoint=folder / "state",
    )
    run = trainer.fit("quantities-dynamic")
    weights = b"".join(value.numpy().tobytes() for value in run.model.state_dict().values())
    epochs = [dataclasses.asdict(record) for record in run.epochs]
    write_json({"weights": hashlib.sha256(weights).hexdigest(), "epochs": epochs}, folder / "document.json")


COMMANDS: dict[str, Callable[[Path], None]] = {
    "otqms": _command(
        "otqms", "--shots", "8", "--seeds", "1", "--epochs", "16", "--checkpoint", "{}/state",
        "--strategy", "target-only,quantities,recommended",
    ),
    "rank": _command(
        "rank", "--model", f"{Path(__file__).stem}:network", "--cache", "{}/cache", "--scores", "h_score,leep"
    ),
    "inherit": _command(
        "inherit", "--check", "--upstream", "near", "--shots", "8", "--seeds", "3", "--epochs", "6", "--alphas", "0,1",
        "--journal", "{}/journal.jsonl",
    ),
    "features": features,
    "training": training,
}  # fmt: skip


def start(run: Callable[[Path], None], folder: Path) -> int:
    """The process that runs it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(folder)
            status = 0
        finally:
            os._exit(status)
    return child


def finish(child: int) -> None:
    """Wait for a process that is to succeed."""
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("a command failed")


def document(folder: Path) -> Any:
    """What was written, without measured times and the settings, which name the folder."""
    path = folder / "document.json"
    state = path.read_bytes()
    return _timeless(json.loads(state)) if state.startswith(b"{") else state


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: _timeless(entry) for name, entry in value.items() if "seconds" not in name}
        return {name: entry for name, entry in kept.items() if name not in ("settings", "versions", "checkpoint")}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def kill_and_resume(name: str, kills: int, seed: int) -> dict[str, Any]:
    """Runs of one command until it was killed so many times."""
    run, runs, randomness = COMMANDS[name], list[dict[str, Any]](), random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        write_domains(Path(place) / "domains.npz", 9000 if name == "rank" else 300)
        undisturbed = Path(place) / "undisturbed"
        undisturbed.mkdir()
        begin = time.perf_counter()
        finish(start(run, undisturbed))
        longest = time.perf_counter() - begin
        expected, killed = document(undisturbed), 0
        while killed < kills:
            folder = Path(tempfile.mkdtemp(dir=place))
            moments: list[float] = []
            for _ in range(min(MOST, kills - killed)):
                child, moment = start(run, folder), randomness.uniform(0.0, 0.8 * longest)
                time.sleep(moment)
                os.kill(child, signal.SIGKILL)
                if os.waitpid(child, 0)[1] != signal.SIGKILL:  # it was faster
                    break
                moments.append(round(moment, 3))
            if not moments:
                continue
            finish(start(run, folder))
            killed += len(moments)
            same = document(folder) == expected
            left = sorted(path.name for path in folder.rglob("*.part"))
            found = {"identical": same, "unfinished_files": len(left), "seed": seed}
            runs.append({"killed_after_seconds": moments, **found})
            print(f"{name}: {killed} of {kills} kills, {'the same' if same else 'DIFFERENT'}", flush=True)
    return {
        "undisturbed_seconds": longest,
        "kills": killed,
        "identical": all(r["identical"] for r in runs),
        "runs": runs,
    }


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of each command")
    parser.add_argument("--command", action="append", choices=COMMANDS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # before a fork: threads do not survive it
    sys.path.insert(0, str(Path(__file__).parent))
    place, results = ROOT / "bench" / "results" / "stress_kills.json", dict[str, dict[str, Any]]()
    for name in arguments.command or COMMANDS:
        results[name] = kill_and_resume(name, arguments.kills, arguments.seed)
        place.write_text(json.dumps({"environment": environment(), "commands": results}, indent=1) + "\n")
    sys.exit(0 if all(result["identical"] for result in results.values()) else 1)


if __name__ == "__main__":
    main()

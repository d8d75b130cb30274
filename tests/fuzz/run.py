"""``make fuzz``: as many random examples of every public function as the time allows, and a summary as JSON.

Each target runs in a process of its own with a share of the time. An example that crashes the process or hangs ends
it, and is on record, since it was written down before it ran; one that takes more than 10 seconds of processor time
fails.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from test_fuzz import CHECKS, TARGETS

EXAMPLE_SECONDS = 10
BATCH = 200


def fuzz(name: str, seconds: float, record: Path) -> dict[str, Any]:
    """Examples of one target until the time is over; the outcomes counted, the first failure with its example."""
    target, counts, start = TARGETS[name], collections.Counter[str](), time.monotonic()
    failed: dict[str, Any] = {}

    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.specs)
    def run(spec: dict[str, Any]) -> None:
        if time.monotonic() - start > seconds and not failed:
            return
        record.write_text(json.dumps(spec))
        faulthandler.dump_traceback_later(10 * EXAMPLE_SECONDS, exit=True)
        begin = time.process_time()
        try:
            counts[target.check(spec)] += 1
            taken = time.process_time() - begin
            assert taken <= EXAMPLE_SECONDS, f"the example took {taken:.1f} s"
        except Exception:
            failed["example"] = spec
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()

    try:
        while time.monotonic() - start < seconds:
            run()
    except Exception as error:
        return {**counts, "failure": f"{type(error).__name__}: {error}"[:2000], "example": failed.get("example")}
    return dict(counts)


def fuzz_all(names: list[str], minutes: float, workers: int) -> dict[str, Any]:
    """``fuzz`` of every target, each in a forked process, so many at a time."""
    context = multiprocessing.get_context("fork")
    seconds = minutes * 60 * workers / len(names)
    waiting, running, results = list(names), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                files = [Path(folder) / f"{name}.{kind}.json" for kind in ("example", "result")]
                running[name] = context.Process(target=_fuzz_into, args=(name, seconds, *files))
                running[name].start()
            multiprocessing.connection.wait([process.sentinel for process in running.values()])
            for name in [name for name, process in running.items() if not process.is_alive()]:
                example, result = (Path(folder) / f"{name}.{kind}.json" for kind in ("example", "result"))
                exit_code = running.pop(name).exitcode
                if exit_code == 0:
                    results[name] = json.loads(result.read_text())
                else:
                    results[name] = {"failure": f"exit {exit_code}", "example": json.loads(example.read_text())}
                print(f"{name}: {results[name]}", flush=True)
    return {name: results[name] for name in names}


def _fuzz_into(name: str, seconds: float, example: Path, result: Path) -> None:
    result.write_text(json.dumps(fuzz(name, seconds, example)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "fuzz.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # before the first op: OpenMP's threads do not survive a fork
    for slow in ("ot", "scipy.stats", "torch._dynamo"):  # seconds each, which every process would take from its time
        importlib.import_module(slow)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    results = fuzz_all(list(CHECKS.values()), options.minutes, options.workers)
    total = sum(found.get(kind, 0) for found in results.values() for kind in ("agreed", "refused"))
    summary = {
        "examples": total,
        "failures": sum("failure" in found for found in results.values()),
        "minutes": options.minutes,
        "workers": options.workers,
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hypothesis": hypothesis.__version__,
        "targets": results,
    }
    options.output.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{total} examples, {summary['failures']} failures: {options.output}")
    return int(summary["failures"] > 0)


if __name__ == "__main__":
    sys.exit(main())

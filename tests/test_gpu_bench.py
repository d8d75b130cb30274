"""The GPU benchmark without a GPU: the whole flow at small sizes, and the table of predictions in the documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_flow_completes_on_the_cpu() -> None:
    process = run("--dry-run")
    assert process.returncode == 0, process.stderr
    assert process.stderr.endswith("dry run: complete\n")


def test_the_documented_predictions_are_those_of_the_cases() -> None:
    process = run("--plan")
    assert process.returncode == 0, process.stderr
    assert process.stdout in (ROOT / "docs" / "gpu.md").read_text()


def test_measuring_needs_a_gpu_or_somewhere_to_write() -> None:
    process = run()
    assert process.returncode == 2
    assert "needs" in process.stderr

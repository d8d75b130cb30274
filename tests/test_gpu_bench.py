"""The GPU benchmark without a GPU: the whole flow at small sizes, and the table of predictions in the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_flow_completes_on_the_cpu() -> None:
    process = run("--dry-run")
    assert process.returncode == 0, process.stderr
    assert process.stderr.endswith("dry run: complete\n")


def test_what_there_is_no_time_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case is measured and handed on as soon as it is; all else is late."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    reports: list[str] = []
    late = iter([True] * 3 + [False] + [True] * 1000)
    gpu.measure_all(True, lambda report: reports.append(json.dumps(report)), lambda: next(late))
    first, last = json.loads(reports[3]), json.loads(reports[-1])
    assert len(first["benchmarks"]) == len(last["benchmarks"]) == 1
    assert len(first["left_out"]) == 3
    assert len(last["left_out"]) == 3 + run("--plan").stdout.count("\n") - 3


def test_exit_statuses_are_added_to_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from gpu import report_file

    steps = tmp_path / "steps"
    steps.write_text("build=0\nmemcheck=124\n")
    file = report_file(tmp_path)  # named after the GPU, if there is one
    file.write_text('{"benchmarks": [1]}')
    process = run("--output", str(tmp_path), "--steps", str(steps))
    assert process.returncode == 0, process.stderr
    assert json.loads(file.read_text()) == {"benchmarks": [1], "steps_exit_status": {"build": 0, "memcheck": 124}}


def test_the_documented_predictions_are_those_of_the_cases() -> None:
    process = run("--plan")
    assert process.returncode == 0, process.stderr
    assert process.stdout in (ROOT / "docs" / "gpu.md").read_text()


def test_measuring_needs_a_gpu_or_somewhere_to_write() -> None:
    process = run()
    assert process.returncode == 2
    assert "needs" in process.stderr

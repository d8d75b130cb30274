"""What an older processor runs: the same results, to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_concurrency import PROBLEM

from transferops import show_config

PROGRAM = (
    "import sys; sys.path[0] = sys.argv[1]; import torch, transferops; from test_concurrency import PROBLEM;"
    "torch.save({name: call() for name, call in PROBLEM.items()}, sys.argv[2]);"
    "print(transferops.show_config()['cpu_level'])"
)


@pytest.mark.parametrize(("level", "name"), [("v3", "x86-64-v3 (AVX2)"), ("baseline", "baseline")])
def test_every_op(level: str, name: str, tmp_path: Path) -> None:
    if level == "v3" and show_config()["cpu_level"] == "baseline":
        pytest.skip(f"this processor has no {name}")
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path / "results")]
    environment = {**os.environ, "TRANSFEROPS_CPU_LEVEL": level}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == name
    found = torch.load(tmp_path / "results")
    for op, call in PROBLEM.items():
        for one, other in zip(call(), found[op], strict=True):
            # Sums of thousands of float32 products in another order.
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.double().abs().max()), msg=op)

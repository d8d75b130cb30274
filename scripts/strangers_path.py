#!/usr/bin/env python3
"""Types what docs/index.md tells a stranger to type, in an empty environment and a copy of the tree.

Fails if a command fails or a line on the screen warns of something that EXPLAINED does not explain. Reports what each
step took, and which took longer than LIMIT.

    scripts/strangers_path.py [REQUIREMENT ...]    such as torch==2.13.0: what pip is held to
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "index.md"
END = "## A first answer in a program"
LIMIT = 120  # seconds, on two cores that nobody else uses
HANGS = 900

EXPLAINED = {
    r"WARNING: Location '.*' is ignored": "pip: an index of this machine's configuration does not have the package",
    r"WARNING: Running pip as the 'root' user": "pip: the environment is this script's own, so that nothing is at risk",
}
"""Warnings that are not the project's, by pattern, and why they may appear."""


@dataclass
class Step:
    """Command lines that answer one question, and what came of them."""

    name: str
    lines: list[str]
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


def steps() -> list[Step]:
    """The shell blocks of the page, in order: installing is one step, every other line one of its own."""
    text = PAGE.read_text(encoding="utf-8").split(END)[0]
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    install = [line for line in lines if line.startswith("pip ")]
    return [
        Step("install", install),
        *(Step(" ".join(line.split()[:2]), [line]) for line in lines if line not in install),
    ]


def warnings_in(output: str) -> list[str]:
    """The lines that warn of something unexplained, each once."""
    suspicious = [line for line in output.splitlines() if re.search("warning", line, re.I)]
    return [line for line in dict.fromkeys(suspicious) if not any(re.search(known, line) for known in EXPLAINED)]


def copy_tree(into: Path) -> None:
    """What a clone would have: all files that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)


def walk(step: Step, folder: Path, environment: dict[str, str]) -> int:
    """Type the lines of a step. Returns the exit code of the first that fails, else 0."""
    started = time.perf_counter()
    output = ""
    code = 0
    for line in step.lines:
        print(f"$ {line}", flush=True)
        process = subprocess.Popen(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        hangs = threading.Timer(HANGS, process.kill)
        hangs.start()
        assert process.stdout is not None
        for shown in process.stdout:
            print(shown, end="", flush=True)
            output += shown
        code = process.wait()
        hangs.cancel()
        if code:
            break
    step.seconds = time.perf_counter() - started
    step.warnings = warnings_in(output)
    return code


def report(path: list[Step]) -> None:
    """What each step took, and what nobody explained."""
    print("\nstep                  seconds")
    for step in path:
        print(f"{step.name:<22}{step.seconds:7.1f}" + (f"  more than {LIMIT}" if step.seconds > LIMIT else ""))
        for line in step.warnings:
            print(f"  unexplained: {line}")
    sys.stdout.flush()


def main(requirements: list[str]) -> int:
    """Walk the path; the exit code."""
    path = steps()
    with tempfile.TemporaryDirectory(prefix="stranger-") as folder:
        clone, environment = Path(folder, "transferops"), Path(folder, "environment")
        copy_tree(clone)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("".join(f"{each}\n" for each in requirements))
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
        variables["PIP_CONSTRAINT"] = str(constraints)
        failed = next((step for step in path if walk(step, clone, variables)), None)
        report(path)
    if failed:
        print(f"failed: {' && '.join(failed.lines)}")
    return int(failed is not None or any(step.warnings for step in path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

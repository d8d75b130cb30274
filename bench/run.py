"""Runs the benchmarks and writes their JSON and a Markdown table.

    python bench/run.py [pytest arguments, e.g. bench/bench_h_score.py]

Run it on a quiet machine. Results go to bench/results, one JSON and one Markdown file per family, with the machine,
versions and commit. A family may be run in parts: rows that are there already stay if all of these are the same.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import transferops

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str:
    """The commit that was measured, marked if the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+changes" if git("status", "--porcelain", "--", "csrc", "transferops") else ""
    )


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transferops": transferops.show_config(),
    }


def markdown(report: dict[str, Any]) -> str:
    """One row per benchmark."""
    env = report["environment"]
    lines = [
        f"Measured {env['date']} at commit {env['commit']} on {env['processor']}, {env['threads']} threads, "
        f"torch {env['torch']}. Times are minima of interleaved calls in one run; memory is the growth of the resident "
        "set.",
        "",
        "| benchmark | sizes | ours, s | best peer, s | times faster | floor, s | times floor | ours, MiB | peer, MiB "
        "| on record |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["benchmarks"]:
        memory = row["megabytes"]
        peer = row["best_peer"]
        cells = [
            row["name"],
            ", ".join(f"{key}={value}" for key, value in row["sizes"].items()),
            f"{row['seconds']['ours']:.4f}",
            f"{row['seconds'][peer]:.3f} ({peer})",
            f"{row['times_faster']:.1f}",
            f"{row['floor_seconds']:.4f}",
            f"{row['times_floor']:.2f}",
            *(f"{memory[name]:.0f}" if memory[name] is not None else "-" for name in ("ours", peer)),
            ", ".join(f"{key} {value:.3g}" for key, value in row["values"].items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        others = [name for name in row["seconds"] if name not in ("ours", peer)]
        for name in others:
            ratio = row["seconds"][name] / row["seconds"]["ours"]
            lines.append(f"| | | | {row['seconds'][name]:.3f} ({name}) | {ratio:.1f} | | | | {memory[name]:.0f} | |")
        lines += [f"| | | | fails ({name}: {reason}) | | | | | | |" for name, reason in row.get("failed", {}).items()]
    return "\n".join(lines) + "\n"


def earlier(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows on record of the same commit, day and machine that ``report`` does not have."""
    written = json.loads(path.read_text()) if path.exists() else {}
    if written.get("environment") != report["environment"]:
        return []
    names = {row["name"] for row in report["benchmarks"]}
    return [row for row in written["benchmarks"] if row["name"] not in names]


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            str(ROOT / "bench" / "pytest.ini"),
            f"--benchmark-json={raw}",
        ]
        chosen = [str(Path(a).resolve()) if Path(a).exists() else a for a in arguments] or [str(ROOT / "bench")]
        code = subprocess.run([*command, *chosen], cwd=ROOT / "bench").returncode
        if code:
            return code
        families: dict[str, list[dict[str, Any]]] = {}
        for row in json.loads(raw.read_text())["benchmarks"]:
            family = row["fullname"].split(".py")[0].rsplit("/")[-1].removeprefix("bench_")
            families.setdefault(family, []).append({"name": row["name"].removeprefix("test_"), **row["extra_info"]})
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    for family, rows in families.items():
        target = results / f"{family}-cpu-{torch.get_num_threads()}-threads"
        report = {"environment": environment(), "benchmarks": rows}
        report["benchmarks"] = [*earlier(target.with_suffix(".json"), report), *rows]
        target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        target.with_suffix(".md").write_text(markdown(report))
        print(f"{family}\n\n{markdown(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Tables of the committed benchmark results, for the documentation site.

Usage: python scripts/docs_performance.py    (prints what the page shows)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"

_HEADER = """\
| benchmark | sizes | time | alternative | times faster | floor | times floor | memory, alternative's, MiB |
|---|---|---|---|---|---|---|---|"""


def sections() -> str:
    """Markdown: a section for every file of benchmark results, whatever its machine."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    reports = {name: report for name, report in found.items() if isinstance(report.get("benchmarks"), list)}
    if not reports:
        raise FileNotFoundError(f"no benchmark results under {RESULTS}")
    parts = [_section(name, report) for name, report in reports.items()]
    if not any(report["environment"].get("gpu") for report in reports.values()):
        parts.append(
            "## On a GPU\n\nNo results of a GPU are committed: the CUDA kernels have not been measured on one.\n"
        )
    return "\n".join(parts)


def _section(name: str, report: dict[str, Any]) -> str:
    environment = report["environment"]
    machine = environment.get("gpu") or f"{environment['processor']}, {environment['threads']} threads"
    versions = f"torch {environment['torch']}, transferops at commit {environment['commit']}, {environment['date']}"
    lines = [f"## {_title(name)}", "", f"{machine}; {versions}.", "", _HEADER]
    for row in report["benchmarks"]:
        lines += _rows(row)
    return "\n".join(lines) + "\n"


def _title(name: str) -> str:
    return name.partition("-cpu-")[0].replace("_", " ")


def _rows(row: dict[str, Any]) -> list[str]:
    """A line for us against the best alternative, and one for each of the others."""
    unit = "seconds" if "seconds" in row else "milliseconds"
    scale = 1.0 if unit == "seconds" else 1e-3
    times = {name: scale * value for name, value in row[unit].items()}
    memory = row.get("megabytes") or row.get("mebibytes") or {}
    ours = times.pop("ours")
    sizes = ", ".join(f"{key}={value}" for key, value in row["sizes"].items())
    first = [row["name"], sizes, _time(ours)]
    floor = [_time(scale * row[f"floor_{unit}"]), _ratio(row["times_floor"])]
    lines = []
    for name, seconds in sorted(times.items(), key=lambda item: item[1]):
        held = f"{_amount(memory.get('ours'))}, {_amount(memory.get(name))}"
        lines.append([*first, f"{name}: {_time(seconds)}", _ratio(seconds / ours), *floor, held])
        first, floor = ["", "", ""], ["", ""]
    for name, reason in row.get("failed", {}).items():
        lines.append([*first, f"{name}: fails ({reason})", "", *floor, ""])
        first, floor = ["", "", ""], ["", ""]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _amount(mebibytes: float | None) -> str:
    return "-" if mebibytes is None else f"{mebibytes:.0f}"


if __name__ == "__main__":
    print(sections())

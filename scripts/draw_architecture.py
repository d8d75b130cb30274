"""Draws docs/images/architecture.svg: the parts of the library, each on those that it uses.

Usage: python scripts/draw_architecture.py [OUTPUT.svg]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "architecture.svg"

# From the top; nothing imports what stands above it. Of each row: what it is, its colour, its parts and a line on each.
ROWS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("for users", "#e8eef7", [
        ("cli", "a command per question"),
        ("integrations", "Lightning, Hugging Face,\nscikit-learn, BackPACK, ..."),
        ("compat", "tllib, LogME,\ntransformer-ranker"),
        ("C++ programs", "find_package(transferops)"),
    ]),
    ("applications", "#d6e3f3", [
        ("rank", "which source, which model"),
        ("otqms", "how many samples of each"),
        ("adapt", "which head,\nwhich parameters"),
        ("data", "domains, few-shot splits"),
    ]),
    ("estimators", "#bfd4ec", [
        ("scores", "H-score, LogME and kin:\nupdate, merge, compute"),
        ("fisher", "Gram, diagonal, trace, products:\nno per-sample gradients in memory"),
    ]),
    ("ops", "#a3c1e3", [
        ("ops", "pure functions of tensors: checks, shapes, derivatives; torch.compile, torch.export"),
    ]),
    ("bindings", "#f3e3c8", [
        ("torch", "dispatcher, stable ABI"),
        ("python", "NumPy, DLPack"),
        ("include", "C++ API"),
    ]),
    ("kernels", "#ecd0a0", [
        ("kernels/cpu", "C++: float64 accumulation, any number of threads, same result"),
        ("kernels/cuda", "sm_90; checked on the CPU, thread by thread"),
    ]),
]  # fmt: skip

_WIDTH, _LABEL, _HEIGHT, _GAP = 10.0, 1.25, 0.62, 0.16


def draw(path: Path) -> None:
    """Write the picture."""
    # Text stays text and nothing depends on the time: the same file wherever it is drawn.
    style = {"svg.fonttype": "none", "svg.hashsalt": "transferops", "font.family": "sans-serif", "font.size": 8}
    with mpl.rc_context(style):
        top = len(ROWS) * (_HEIGHT + _GAP)
        figure = Figure(figsize=(_WIDTH, top + 0.1), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, _WIDTH)
        axes.set_ylim(-0.05, top + 0.05)
        for row, (layer, colour, parts) in enumerate(ROWS):
            bottom = top - (row + 1) * (_HEIGHT + _GAP) + _GAP / 2
            axes.text(0.1, bottom + _HEIGHT / 2, layer, va="center", color="#555555", style="italic")
            width = (_WIDTH - _LABEL - 0.05) / len(parts)
            for column, (name, what) in enumerate(parts):
                left = _LABEL + column * width
                box = FancyBboxPatch(
                    (left + 0.05, bottom), width - 0.15, _HEIGHT, boxstyle="round,pad=0,rounding_size=0.06",
                    facecolor=colour, edgecolor="#888888", linewidth=0.6,
                )  # fmt: skip
                axes.add_patch(box)
                centre = left + width / 2 - 0.025
                axes.text(centre, bottom + _HEIGHT - 0.07, name, ha="center", va="top", weight="bold")
                axes.text(centre, bottom + 0.23, what, ha="center", va="center", fontsize=7)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)

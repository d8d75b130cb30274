"""One look for all pictures. matplotlib is an extra, imported late."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from transferops._atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
WIDTH = 7.0  # inches


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of a size in inches. It needs no display and leaves the caller's backend alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: Axes) -> Axes:
    """No frame above and to the right, a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return axes


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture, whole or not at all, in the format that the name ends in; png if it ends in none."""
    with replacing(path) as file:
        figure.savefig(file, dpi=DPI, format=Path(path).suffix[1:] or "png")

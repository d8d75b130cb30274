"""One look for all pictures. matplotlib is an extra, imported late."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

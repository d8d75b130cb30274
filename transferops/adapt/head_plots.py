"""Pictures of heads: losses over the penalty, accuracy by arm."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from transferops._figures import new_figure, plain_axes, save_figure
from transferops.adapt.head_path import HeadPath


def plot_path(path: HeadPath, lam: float, before: float | None, file: str | os.PathLike[str]) -> None:
    """Draw the losses of every finite penalty, the loss before adaptation, and where the choice fell.

    Args:
        path: of the head.
        lam: the chosen penalty.
        before: loss of the head as it was; None where that has other targets.
        file: the PNG to write.
    """
    finite = path.lams.isfinite() & (path.lams > 0)
    lams = path.lams[finite].tolist()
    figure = new_figure(4.6)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    top.plot(lams, path.training[finite].sum(1).tolist(), label="on the samples at hand", color="tab:gray")
    if path.held_out is not None:
        top.plot(lams, path.held_out[finite].sum(1).tolist(), label=path.held_out_by, color="tab:blue")
    if before is not None:
        top.axhline(before, label="before adaptation", color="tab:red", linestyle=":")
    bottom.plot(lams, path.degrees_of_freedom[finite].tolist(), color="tab:blue")
    for panel in (top, bottom):
        plain_axes(panel).set_xscale("log")
        if 0 < lam < math.inf:
            panel.axvline(lam, color="black", linewidth=0.8)
    top.set_yscale("log")
    top.set_ylabel("mean squared residual")
    top.legend(frameon=False, fontsize=9)
    bottom.set_ylabel("degrees of\nfreedom")
    bottom.set_xlabel("penalty lam  (vertical line: the choice)" if 0 < lam < math.inf else "penalty lam")
    save_figure(figure, file)


def plot_arms(accuracy: Mapping[str, Sequence[float]], file: str | os.PathLike[str]) -> None:
    """Draw the test accuracy of each arm: a dot per seed, the mean and its standard error.

    Args:
        accuracy: by arm, one per seed.
        file: the PNG to write.
    """
    figure = new_figure(1.2 + 0.5 * len(accuracy))
    panel = plain_axes(figure.subplots())
    for row, values in enumerate(accuracy.values()):
        percent = [100 * value for value in values]
        mean, error = fmean(percent), stdev(percent) / len(percent) ** 0.5 if len(percent) > 1 else 0.0
        panel.plot(percent, [row] * len(percent), "o", color="tab:blue", alpha=0.3, markersize=5)
        panel.errorbar(mean, row, xerr=error, fmt="D", color="tab:blue", capsize=4, markersize=6)
        panel.annotate(f"{mean:.1f}", (mean, row), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    panel.set_yticks(range(len(accuracy)), list(accuracy))
    panel.set_ylim(len(accuracy) - 0.5, -0.5)
    panel.set_xlabel("test accuracy, %  (dots: seeds; diamond and bar: mean and its standard error)")
    save_figure(figure, file)

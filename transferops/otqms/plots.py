"""Two pictures of a study: quantities by epoch and source, accuracy by strategy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from transferops._figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from transferops.otqms.study import Study, Trial

_WIDTH = 7.0


def plot_quantities(study: Study, path: str | os.PathLike[str]) -> bool:
    """Draw how much of each source was taken, by epoch: the mean over the seeds still training.

    The lines become thin where the first seed stops: from there on the mean is over fewer.
    One panel for each strategy that predicts a risk, the ones that decide anew every epoch.

    Args:
        study: The trials.
        path: The PNG to write.

    Returns:
        Whether there was such a strategy; if not, nothing is written.
    """
    deciding = {name: trials for name, trials in study.trials.items() if _decides(trials)}
    if not deciding:
        return False
    picture = figure(3.2 * len(deciding))
    panels = picture.subplots(len(deciding), sharex=True, squeeze=False)[:, 0]
    for panel, (name, trials) in zip(panels, deciding.items(), strict=True):
        style(panel)
        complete = min(len(trial.run.epochs) for trial in trials)
        for source, available in study.sources.items():
            share = 100 * np.array(_mean_by_epoch(trials, source)) / available
            epochs = np.arange(1, len(share) + 1)
            (line,) = panel.plot(epochs[:complete], share[:complete], label=source, linewidth=1.8)
            panel.plot(epochs[complete - 1 :], share[complete - 1 :], color=line.get_color(), linewidth=0.6)
        panel.set_title(f"{name}: how much of each source is taken", loc="left", fontsize=10)
        panel.set_ylabel("% of the source")
        panel.set_ylim(-4, 104)
    panels[-1].set_xlabel("epoch  (mean over seeds; thin once some seeds have stopped)")
    panels[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    save_figure(picture, path)
    return True


def plot_accuracy(study: Study, path: str | os.PathLike[str]) -> None:
    """Draw the test accuracy of each strategy: a dot per seed, the mean, and its standard error.

    Args:
        study: The trials.
        path: The PNG to write.
    """
    picture = figure(1.2 + 0.5 * len(study.trials))
    panel = picture.subplots()
    style(panel)
    names = list(study.trials)
    for row, trials in enumerate(study.trials.values()):
        accuracy = 100 * np.array([trial.accuracy for trial in trials])
        panel.plot(accuracy, np.full(len(accuracy), row), "o", color="tab:blue", alpha=0.3, markersize=5)
        error = accuracy.std(ddof=1) / np.sqrt(len(accuracy)) if len(accuracy) > 1 else 0.0
        panel.errorbar(accuracy.mean(), row, xerr=error, fmt="D", color="tab:blue", capsize=4, markersize=6)
        panel.annotate(
            f"{accuracy.mean():.1f}",
            (accuracy.mean(), row),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel("test accuracy, %  (dots: seeds; diamond and bar: mean and its standard error)")
    save_figure(picture, path)


def _decides(trials: Sequence[Trial]) -> bool:
    return any(record.predicted_risk is not None for trial in trials for record in trial.run.epochs)


def _mean_by_epoch(trials: Sequence[Trial], source: str) -> list[float]:
    """Mean quantity of ``source`` over the trials that had such an epoch, by epoch."""
    quantities = [[record.quantities[source] for record in trial.run.epochs] for trial in trials]
    longest = max(len(series) for series in quantities)
    return [float(np.mean([series[i] for series in quantities if i < len(series)])) for i in range(longest)]


def figure(height: float) -> Figure:
    """An empty picture of the common width, ``height`` inches high."""
    # An extra, imported late; the object interface needs no display and leaves the caller's backend alone.
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def style(panel: Axes) -> None:
    """The common look of a panel."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.set_axisbelow(True)

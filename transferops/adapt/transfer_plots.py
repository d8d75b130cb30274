"""Pictures of what inheriting does: a check's metric by share, a simulation's heat maps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch

from transferops._figures import WIDTH, new_figure, plain_axes, save_figure
from transferops._validate import fail
from transferops.adapt.transfer_check import TransferCheck

_COLOURS = {"positive": "tab:green", "negative": "tab:red", "undecided": "tab:gray"}


def plot_transfer_check(check: TransferCheck, path: str | os.PathLike[str], metric: str = "metric") -> None:
    """Draw the differences to starting afresh, by alpha: a dot per seed, the mean, and its interval.

    Args:
        check: The outcome.
        path: The picture to write.
        metric: What the metric is called.
    """
    figure = new_figure(3.4)
    axes = plain_axes(figure.subplots())
    scratch = np.array(check.metrics[check.alphas.index(0.0)])
    axes.axhline(0, color="black", linewidth=0.8)
    for effect in check.effects:
        colour = _COLOURS[effect.verdict]
        differences = np.array(check.metrics[check.alphas.index(effect.alpha)]) - scratch
        axes.plot(np.full(len(differences), effect.alpha), differences, "o", color=colour, alpha=0.3, markersize=4)
        if math.isfinite(effect.low):
            ends = [[effect.difference - effect.low], [effect.high - effect.difference]]
            axes.errorbar(effect.alpha, effect.difference, yerr=ends, fmt="D", color=colour, capsize=4, markersize=5)
        else:
            axes.plot(effect.alpha, effect.difference, "D", color=colour, markersize=5)
    for verdict, colour in _COLOURS.items():
        axes.plot([], [], "D", color=colour, label=verdict)
    axes.set_xticks(check.alphas, [f"{alpha:g}" for alpha in check.alphas])
    axes.set_xlabel(f"share inherited  (dots: seeds; bars hold all at once with {check.confidence:.0%} confidence)")
    axes.set_ylabel(f"{metric} against alpha = 0 ({scratch.mean():.3f})")
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_transfer_maps(
    difference: torch.Tensor,
    upstream_samples: Sequence[int],
    shared: Sequence[float],
    alphas: Sequence[float],
    path: str | os.PathLike[str],
) -> None:
    """Draw heat maps of an accuracy difference over |u| and alpha, one for every N1.

    Args:
        difference: ``[N1, |u|, alpha]``, accuracy against alpha = 0.
        upstream_samples: N1.
        shared: |u|.
        alphas: The shares.
        path: The picture to write.

    Raises:
        ValueError: The shape of ``difference`` is another.
    """
    expected = [len(upstream_samples), len(shared), len(alphas)]
    if list(difference.shape) != expected:
        fail("difference", f"shape {expected}", str(list(difference.shape)))
    figure = new_figure(3.0, max(WIDTH, 2.4 * len(upstream_samples)))
    panels = figure.subplots(1, len(upstream_samples), sharey=True, squeeze=False)[0]
    limit = max(float(difference.abs().max()), 1e-3)
    for panel, samples, values in zip(panels, upstream_samples, difference, strict=True):
        picture = panel.imshow(values.numpy(), origin="lower", aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
        panel.set_title(f"N1 = {samples}", fontsize=10)
        panel.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        panel.set_yticks(range(len(shared)), [f"{value:g}" for value in shared])
        panel.set_xlabel("alpha")
    panels[0].set_ylabel("|u|")
    figure.colorbar(picture, ax=list(panels), label="accuracy against alpha = 0")
    save_figure(figure, path)

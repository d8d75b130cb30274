"""A picture of a ranking: every score of every candidate, coloured by its rank."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferops._figures import new_figure, save_figure
from transferops.rank.ranking import Ranking, rounded


def plot_ranking(ranking: Ranking, path: str | os.PathLike[str]) -> None:
    """Draw candidates by scores: the numbers, on a colour from the lowest to the highest rank of each score.

    Scores have scales of their own, so only ranks within a column compare; candidates stand in the order of their mean
    rank.

    Args:
        ranking: Of at least one candidate.
        path: The PNG to write.
    """
    ranks = ranking.mean_ranks()
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    rows = [ranking.rows[i] for i in order]
    layers = {row.layer for row in rows}
    names = [row.name if len(layers) == 1 else f"{row.name} / {row.layer}" for row in rows]
    values = np.array([[row.scores[score] for score in ranking.scores] for row in rows])
    figure = new_figure(1.6 + 0.4 * len(rows), 2.4 + 0.8 * len(ranking.scores))
    axes = figure.subplots()
    ranks_in_column = _relative_ranks(np.vectorize(rounded)(values))
    axes.imshow(ranks_in_column, aspect="auto", cmap="YlGn", vmin=0, vmax=1)
    for row, column in np.ndindex(*values.shape):
        number = values[row, column]
        text = "-" if math.isnan(number) else f"{number:.3g}"
        colour = "white" if ranks_in_column[row, column] > 0.75 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(ranking.scores)), ranking.scores, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_title(f"{ranking.target}: {ranking.samples} samples; darker promises more in its column", fontsize=9)
    save_figure(figure, path)


def _relative_ranks(values: NDArray[np.float64]) -> Any:
    """0 for the lowest of a column to 1 for the highest, level ones alike; NaN masked."""
    below = (values[None] < values[:, None]).sum(1)
    above = (values[None] > values[:, None]).sum(1)
    spread = np.maximum(below + above, 1)
    return np.ma.masked_array(np.where(below + above == 0, 0.5, below / spread), mask=np.isnan(values))

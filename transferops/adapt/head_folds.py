"""Cross-validation of heads from sums alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from transferops._validate import fail
from transferops.adapt.head_held_out import k_fold
from transferops.adapt.head_path import HeadPath, Spectrum
from transferops.adapt.head_rows import parse_penalties
from transferops.adapt.head_solver import HeadSolver
from transferops.adapt.head_statistics import HeadStatistics


def k_fold_path(folds: Sequence[HeadSolver], lams: Sequence[float] | Tensor | None = None) -> HeadPath:
    """The path of all folds together, with its held-out loss by exact k-fold cross-validation from sums alone.

    Each fold's loss is that of the head fitted to the others; their sums are those of all minus those of the fold.
    Cost: one eigendecomposition per fold. Where rows are not independent (the positions of an image), put all that
    belong together into one fold.

    Args:
        folds: at least two solvers with the same prior, each of the samples of one fold.
        lams: penalties; the default grid of :meth:`HeadSolver.solve` if left out.

    Raises:
        ValueError: there are fewer than two folds with samples, or they do not belong together.
    """
    folds = [fold for fold in folds if fold.samples]
    if len(folds) < 2:
        fail("folds", "at least two solvers with samples", f"{len(folds)}")
    for fold in folds[1:]:
        folds[0].check_alike(fold)
    parts = [fold.statistics() for fold in folds]
    total = functools.reduce(HeadStatistics.merge, parts)
    prior = folds[0].prior(total.gram)
    scale = folds[0].scale(lambda: total.spread(prior.weight))
    spectrum = Spectrum.of_statistics(total.scaled(scale), prior)
    grid = spectrum.default_lams() if lams is None else parse_penalties(lams)
    # Sums of the others are added up, not subtracted: a fold may hold nearly all of the weight.
    others = [functools.reduce(HeadStatistics.merge, parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
    held_out = k_fold(
        [Spectrum.of_statistics(part.scaled(scale), prior) for part in others],
        [part.scaled(scale) for part in parts],
        grid.tolist(),
    )
    return HeadPath.of(spectrum, grid, held_out, f"exact {len(parts)}-fold cross-validation", scale)

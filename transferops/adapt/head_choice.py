"""Which penalty, and whether to keep the prior at all: decided by the loss on samples left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from transferops.adapt.head_folds import k_fold_path
from transferops.adapt.head_path import HeadPath
from transferops.adapt.head_solver import HeadSolver

# Penalties where leave-one-out cannot see, as shares of the largest eigenvalue: around a prior that is right more often
# than chance would be, and around 0.
_BLIND_PRIOR, _BLIND_PLAIN = 0.3, 0.03


@dataclass(frozen=True, eq=False)
class Choice:
    """A head, and why this one.

    Attributes:
        weight, bias: [c, p], [c] float64.
        lam: the penalty.
        keeps_prior: whether the penalty is on the distance to the prior; if not, on that to 0.
        reason: how it was chosen, in words.
        path: of the prior that was chosen (or of 0).
        prior_path: of the prior, for what it loses as it is.
        held_out: mean squared residual on samples left out, summed over outputs.
        accuracy: share of samples left out that are right; NaN if targets are not labels.
    """

    weight: Tensor
    bias: Tensor
    lam: float
    keeps_prior: bool
    reason: str
    path: HeadPath
    prior_path: HeadPath
    held_out: float
    accuracy: float


def choose(folds: Sequence[HeadSolver], lam: float | None = None) -> Choice:
    """Choose the head of least held-out loss, around the prior or around 0.

    The prior as it is (an infinite penalty) is among the penalties around the prior, so the best of these never loses
    more on the samples left out than no adaptation at all. Of the two best penalties, around the prior and around 0,
    the one of less loss is taken; with labels the one that is right more often, the prior's if they tie: squared errors
    count the scale of a prior against it even where its ranking of the classes is the better one.

    Leave-one-out is blind where most samples are the only ones of their class: without it, nothing is known of its
    class, and every change looks harmful. The penalty is then fixed: 0.3 times the largest eigenvalue around a prior
    that is right on more samples than chance would be, else 0.03 times around 0 [derived; measured on few-shot digits].

    Args:
        folds: one solver, for leave-one-out over its samples; several, for cross-validation with these folds.
        lam: use this penalty around the prior instead of choosing.
    """
    if len(folds) == 1 and lam is not None and folds[0].samples < 2:
        path = folds[0].path(held_out=False)
        return _take(path, path, lam, True, "given")
    path = folds[0].path() if len(folds) == 1 else k_fold_path(folds)
    if lam is not None:
        return _take(path, path, lam, True, "given")
    if not folds[0].has_prior:
        return _take(path, path, _best(path), False, path.held_out_by)
    plain = [fold.without_prior(path.target_scale) for fold in folds]
    if len(folds) == 1 and _blind(folds[0]) and len(path.spectrum.eigenvalues):
        trusted = path.accuracy_at(math.inf) * len(path.spectrum.target_mean) > 1
        lam = (_BLIND_PRIOR if trusted else _BLIND_PLAIN) * float(path.spectrum.eigenvalues[0])
        reason = "a share of the largest eigenvalue: leave-one-out is blind to classes of one sample"
        return _take(path if trusted else plain[0].path(), path, lam, trusted, reason)
    plain_path = plain[0].path() if len(folds) == 1 else k_fold_path(plain)
    with_prior, without = (_take(p, path, _best(p), p is path, p.held_out_by) for p in (path, plain_path))
    if path.accuracy is None:
        return with_prior if with_prior.held_out <= without.held_out else without
    right = path.accuracy_at(with_prior.lam) >= plain_path.accuracy_at(without.lam)
    return with_prior if right else without


def _best(path: HeadPath) -> float:
    best = path.best()
    assert isinstance(best, float)
    return best


def _take(path: HeadPath, prior_path: HeadPath, lam: float, keeps_prior: bool, reason: str) -> Choice:
    weight, bias = path.head(lam)
    return Choice(
        weight, bias, lam, keeps_prior, reason, path, prior_path, path.held_out_at(lam), path.accuracy_at(lam)
    )


def _blind(solver: HeadSolver) -> bool:
    counts = solver.class_counts()
    return counts is not None and 2 * int((counts == 1).sum()) > int(counts.sum())

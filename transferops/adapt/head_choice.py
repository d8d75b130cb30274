"""Which penalty, and how much of the prior to keep: decided on samples left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transferops.adapt.head_folds import k_fold_path
from transferops.adapt.head_held_out import left_out_outputs
from transferops.adapt.head_margin import MarginFit, shortfall
from transferops.adapt.head_path import HeadPath
from transferops.adapt.head_rows import Rows
from transferops.adapt.head_solver import HeadSolver

_BLIND = 2  # samples of a class up to which leave-one-out cannot see it: without one, half of the class is gone
_SURE = 1.645  # standard deviations: 5 %, one-sided


@dataclass(frozen=True, eq=False)
class Choice:
    """A head, and why this one.

    Attributes:
        weight, bias: [c, p], [c] float64.
        lam: the penalty.
        prior_share: the penalty is on the distance to this share of the prior: 1, 1/2 or 0.
        reason: how it was chosen, in words.
        path: around that share of the prior.
        before, after: loss of the prior as it is and of the head, on the samples at hand.
        held_out: loss on samples left out.
        accuracy_before: share of the samples that the prior is right on; NaN if targets are not labels.
        accuracy: share of samples left out that are right; NaN if targets are not labels.
    """

    weight: Tensor
    bias: Tensor
    lam: float
    prior_share: float
    reason: str
    path: HeadPath
    before: float
    after: float
    held_out: float
    accuracy_before: float
    accuracy: float

    @property
    def keeps_prior(self) -> bool:
        """Whether the head is the prior as it is."""
        return math.isinf(self.lam) and self.prior_share == 1


def choose(folds: Sequence[HeadSolver], lam: float | None = None) -> Choice:
    """Choose the head that does best on samples left out.

    Numbers as targets: the least loss, around the prior or around 0. The prior as it is (an infinite penalty) is among
    the penalties, so the best never loses more on the samples left out than no adaptation at all.

    Labels, a prior and all samples kept as rows: :func:`_choose_for_labels`. Labels otherwise: as for numbers, but of
    the best penalties around the prior and around 0 the one that is right more often, the prior's if they tie: squared
    errors count the scale of a prior against it even where its ranking of the classes is the better one.

    Args:
        folds: one solver, for leave-one-out over its samples; several, for cross-validation with these folds.
        lam: use this penalty around the prior instead of choosing.
    """
    if len(folds) == 1 and folds[0].has_prior and folds[0].labelled:
        rows = folds[0].rows()
        if rows is not None:
            return _choose_for_labels(folds[0], rows, lam)
    if len(folds) == 1 and lam is not None and folds[0].samples < 2:
        path = folds[0].path(held_out=False)
        return _take(path, path, lam, 1.0, "given")
    path = folds[0].path() if len(folds) == 1 else k_fold_path(folds)
    if lam is not None:
        return _take(path, path, lam, 1.0, "given")
    plain = [fold.without_prior(path.target_scale) for fold in folds]
    plain_path = plain[0].path() if len(folds) == 1 else k_fold_path(plain)
    around_prior = _take(path, path, _best(path), 1.0, path.held_out_by)
    around_zero = _take(plain_path, path, _best(plain_path), 0.0, plain_path.held_out_by)
    if path.accuracy is None:
        return around_prior if around_prior.held_out <= around_zero.held_out else around_zero
    return around_prior if around_prior.accuracy >= around_zero.accuracy else around_zero


def _choose_for_labels(solver: HeadSolver, rows: Rows, lam: float | None) -> Choice:
    """Of the fits to margin targets around the prior and half of it, and of ridge regression around 0, the best.

    For each the penalty of least leave-one-out loss; of these the one that is right most often on samples left out,
    the one nearest to the prior if they tie. Where the prior is not clearly right more often than by chance, and ridge
    regression is, the latter: with few samples the others would win now and then by luck.

    Leave-one-out is blind where most samples have at most one other of their class: most of what is known of the class
    goes with the sample, and every change looks harmful. The penalty around the prior is then the largest that is right
    on every sample at hand: the least change that does what the samples ask for (the discrepancy principle).
    [derived; chosen on targets other than those of the published figures, but for the comparison with chance]
    """
    around_prior = MarginFit(solver)
    if lam is not None:
        return _take_labels(solver, rows, around_prior.path, around_prior.left_out, lam, 1.0, "given")
    if _blind(rows, len(around_prior.path.spectrum.target_mean)):
        reason = "the largest that is right on the samples at hand (leave-one-out is blind to classes of one or two)"
        lam = around_prior.largest_right()
        found = [_take_labels(solver, rows, around_prior.path, around_prior.left_out, lam, 1.0, reason)]
    else:
        found = []
        for share, fit in ((1.0, around_prior), (0.5, MarginFit(solver, 0.5))):
            path, lam = fit.path, _best(fit.path)
            found.append(_take_labels(solver, rows, path, fit.left_out, lam, share, path.held_out_by))
    if len(rows) > 1:
        scale = around_prior.path.target_scale
        path = solver.without_prior(scale).path()
        targets = rows.dense_targets(len(path.spectrum.target_mean)) * scale
        left_out = partial(left_out_outputs, path.spectrum, rows=rows, targets=targets)
        found.append(_take_labels(solver, rows, path, left_out, _best(path), 0.0, path.held_out_by))
        if found[0].accuracy_before <= _beyond_chance(solver, rows) < found[-1].accuracy:
            return found[-1]
    return max(found, key=lambda choice: choice.accuracy)


def _best(path: HeadPath) -> float:
    best = path.best()
    assert isinstance(best, float)
    return best


def _take(path: HeadPath, prior_path: HeadPath, lam: float, share: float, reason: str) -> Choice:
    weight, bias = path.head(lam)
    unit = path.spectrum.weight * path.target_scale**2
    before, after = (
        float(p.spectrum.training_squares([value]).sum()) / unit for p, value in ((prior_path, math.inf), (path, lam))
    )
    kept = math.isinf(lam) and share == 1
    return Choice(
        weight, bias, lam, share, reason, path, before, after, before if kept else path.held_out_at(lam),
        prior_path.accuracy_at(math.inf), path.accuracy_at(lam),
    )  # fmt: skip


def _take_labels(
    solver: HeadSolver,
    rows: Rows,
    path: HeadPath,
    left_out: Callable[[float], Tensor],
    lam: float,
    share: float,
    reason: str,
) -> Choice:
    """Losses are shortfalls from the margin, which all heads share."""
    weight, bias = path.head(lam)
    outputs = solver.prior_outputs(rows), rows.features.double() @ weight.mT + bias, left_out(lam)
    before, after, held_out = (shortfall(o, rows, path.target_scale) for o in outputs)
    accuracy_before, _, accuracy = (_accuracy(o, rows) for o in outputs)
    return Choice(weight, bias, lam, share, reason, path, before, after, held_out, accuracy_before, accuracy)


def _beyond_chance(solver: HeadSolver, rows: Rows) -> float:
    """What predictions as frequent as the prior's, but independent of the labels, stay below in 95 of 100 cases."""
    outputs = solver.prior_outputs(rows)
    weights = rows.weight() / rows.weight().sum()
    empty = weights.new_zeros(outputs.shape[1])
    predicted, labelled = (empty.index_add(0, classes, weights) for classes in (outputs.argmax(1), rows.targets))
    chance = float(predicted @ labelled)
    return chance + _SURE * math.sqrt(chance * (1 - chance) / len(rows))


def _accuracy(outputs: Tensor, rows: Rows) -> float:
    return float(rows.weight() @ (outputs.argmax(1) == rows.targets).double() / rows.weight().sum())


def _blind(rows: Rows, classes: int) -> bool:
    counts = torch.bincount(rows.targets, minlength=classes)
    return 2 * int(counts[counts <= _BLIND].sum()) > len(rows)

"""Targets for a head trained with cross-entropy: what its outputs lack of being right, and nothing else.

Such a head puts out logits. One-hot targets ask it to give up their size and shape, even on samples that it gets right
by far; with one or two samples per class that costs more than the samples can teach. The targets here are the nearest
outputs that are right by a margin, so the residual of a sample that is right already is 0 [derived]. The margin is one
step of one-hot targets on the scale of the logits (:class:`transferops.adapt.HeadSolver`, ``target_scale``), and of a
head of zeros the nearest such outputs are just these one-hot targets.

The bias is the weight of a constant feature here, as in the published pseudo-inverse, and penalised like the others:
the mean output over a handful of samples says little about the bias that a head needs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from transferops.adapt.head_held_out import leave_one_out, left_out_outputs
from transferops.adapt.head_path import HeadPath, Prior, Spectrum
from transferops.adapt.head_rows import Rows
from transferops.adapt.head_solver import HeadSolver
from transferops.adapt.head_statistics import HeadStatistics


def margin_targets(outputs: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The outputs t nearest to those given with t_y >= t_k + margin for the label y and every other class k.

    With u the output of the label, those of other classes above u - margin come down to it; u is where the sum over
    the label and these classes is what it was.

    Args:
        outputs: [N, c] float64.
        labels: [N] int64.
        margin: positive.

    Returns:
        [N, c] float64.
    """
    own = outputs.gather(1, labels.unsqueeze(1))
    others = (outputs + margin).scatter(1, labels.unsqueeze(1), -torch.inf).sort(1, descending=True).values
    # The level u if the first k others come down; they are those above the level that includes them.
    counts = torch.arange(1, outputs.shape[1] + 1, dtype=outputs.dtype, device=outputs.device)
    levels = torch.cat([own, (own + others[:, :-1].cumsum(1)) / (1 + counts[:-1])], 1)
    level = levels.gather(1, (others[:, :-1] > levels[:, 1:]).sum(1, keepdim=True))
    return torch.minimum(outputs, level - margin).scatter(1, labels.unsqueeze(1), level)


def shortfall(outputs: Tensor, rows: Rows, margin: float) -> float:
    """Mean squared distance of outputs [N, c] from being right by a margin, in units of the margin."""
    if not bool(outputs.isfinite().all()):
        return math.inf
    squares = (margin_targets(outputs, rows.targets, margin) - outputs).square().sum(1)
    return float(rows.weight() @ squares / rows.weight().sum()) / margin**2


class MarginFit:
    """All penalties around a share of the prior, for labels.

    Args:
        solver: with a prior, labels, and all its samples kept as rows.
        share: of the prior: its weight and bias are multiplied by it.

    Attributes:
        path: with exact leave-one-out.
    """

    def __init__(self, solver: HeadSolver, share: float = 1.0) -> None:
        rows = solver.rows()
        assert rows is not None
        one = rows.features.new_ones(len(rows), 1)
        self._rows = replace(rows, features=torch.cat([rows.features, one], 1))
        prior = solver.prior(rows.features)
        bias = prior.weight.new_zeros(len(prior.weight)) if prior.bias is None else prior.bias
        extended = Prior(share * torch.cat([prior.weight, bias.unsqueeze(1)], 1), None)
        scale = solver.fitted_scale()
        self._targets = margin_targets(share * solver.prior_outputs(rows), rows.targets, scale)
        self.path = self._path(extended, scale)

    def _path(self, prior: Prior, scale: float) -> HeadPath:
        if len(self._rows) > self._rows.features.shape[1]:
            statistics = HeadStatistics.of(replace(self._rows, targets=self._targets), len(prior.weight))
            spectrum = Spectrum.of_statistics(statistics, prior, intercept=False)
        else:
            spectrum = Spectrum.of_rows(self._rows, self._targets, prior, intercept=False)
        lams = spectrum.default_lams()
        held_out = leave_one_out(spectrum, lams.tolist(), self._rows, self._targets)
        return HeadPath.of(spectrum, lams, held_out, "exact leave-one-out", scale)

    def left_out(self, lam: float) -> Tensor:
        """Outputs [N, c] for each sample of the head fitted without it."""
        return left_out_outputs(self.path.spectrum, lam, self._rows, self._targets)

    def largest_right(self) -> float:
        """The largest penalty whose head is right on as many of the samples at hand as any penalty's."""
        features, labels = self._rows.features[:, :-1].double(), self._rows.targets
        best, most = 0.0, -1.0
        for lam in self.path.lams.tolist():
            weight, bias = self.path.head(lam)
            right = float(self._rows.weight() @ ((features @ weight.mT + bias).argmax(1) == labels).double())
            if right >= most:
                best, most = lam, right
        return best

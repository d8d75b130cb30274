"""LEEP and NCE: how well the labels of a source model predict the target's.

LEEP [paper: Nguyen et al., ICML 2020]: with theta(x)_z the source model's class probabilities, P(y, z) the empirical
joint (1/N) sum_n theta(x_n)_z [y_n = y] and P(y|z) its conditional, LEEP = (1/N) sum_n ln sum_z P(y_n|z) theta(x_n)_z.

NCE [paper: Tran, Nguyen and Hassner, ICCV 2019]: -H(Y|Z) for hard source labels z_n.

Both are at most 0. A source class without mass has no conditional and takes no part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from transferops import ops
from transferops._validate import as_tensor, describe, fail
from transferops.scores.base import Collection, Score, ScoreDetails
from transferops.scores.rows import Rows


class Leep(Score):
    """Streaming :func:`leep`. Keeps the probabilities: the score needs each row a second time."""

    name = "leep"
    takes = "probabilities"
    _checks_late = False  # whether the rows are looked at as they are added up, not by ``update``

    def update(self, values: Tensor | Any, labels: Tensor | Any) -> Self:
        """Add a batch. Arguments and errors as for the function; an empty batch, and one refused, change nothing."""
        probabilities, _ = _check_form(values, labels)
        wide = None if probabilities.dtype == torch.float64 else torch.float32
        if len(probabilities):
            _check_rows(probabilities, probabilities.sum(1, dtype=wide), probabilities.amin(1))
        return super().update(values, labels)

    def _collection(self) -> Collection:
        return Rows(_check_form)

    def _evaluate(self, data: Any) -> ScoreDetails:
        probabilities, labels = data.all()
        classes, index = torch.unique(labels, return_inverse=True)
        found = ops.empirical_prediction(probabilities, index, len(classes))
        if self._checks_late:
            _check_rows(probabilities, found.totals, found.lowest)
        value, rank = mean_log(found)
        return ScoreDetails(
            value, len(labels), len(classes), probabilities.shape[1], rank=rank, warnings=_caveats(self.name, classes)
        )


def mean_log(found: ops.EmpiricalPrediction) -> tuple[float, int]:
    """LEEP of checked probabilities, and how many source classes have mass."""
    return min(float(found.prediction.log().mean()), 0.0), int((found.mass > 0).sum())


def _check_form(values: Any, labels: Any) -> tuple[Tensor, Tensor]:
    probabilities = as_tensor("source_probabilities", values).detach()
    targets = check_labels("labels", labels)
    if not probabilities.is_floating_point():
        fail("source_probabilities", "floating point", describe(probabilities), TypeError)
    if probabilities.dim() != 2 or probabilities.shape[1] == 0:
        fail("source_probabilities", "shape [N, C_s] with C_s >= 1", describe(probabilities))
    check_lengths("source_probabilities", probabilities, targets)
    return probabilities, targets


def _check_rows(probabilities: Tensor, totals: Tensor, lowest: Tensor) -> None:
    """Refuse rows that are no probabilities, by the sum and the smallest element of each."""
    # Each probability was rounded to its dtype; they were added up in float32 or better.
    added = torch.finfo(totals.dtype).eps * probabilities.shape[1]
    tolerance = torch.finfo(probabilities.dtype).eps + added + 1e-4
    bad = (~((totals - 1).abs() <= tolerance)).nonzero()
    if len(bad):
        row = int(bad[0])
        fail("source_probabilities", "rows that sum to 1", f"a sum of {float(totals[row]):.6g} in row {row}")
    if bool((lowest < 0).any()):
        row = int((lowest < 0).nonzero()[0])
        column = int((probabilities[row] < 0).nonzero()[0])
        value = float(probabilities[row, column])
        fail("source_probabilities", "no negative value", f"{value:.6g} at position {[row, column]}")


class Nce(Score):
    """Streaming :func:`nce`."""

    name = "nce"
    takes = "source_labels"

    def _collection(self) -> Collection:
        return Rows(_check_label_pairs)

    def _evaluate(self, data: Any) -> ScoreDetails:
        sources, labels = data.all()
        _, source = torch.unique(sources, return_inverse=True)
        names, target = torch.unique(labels, return_inverse=True)
        pairs, joint = torch.unique(torch.stack([source, target]), dim=1, return_counts=True)
        weight = joint.double()
        mass = torch.zeros(int(source.max()) + 1, dtype=torch.float64, device=weight.device)
        mass.index_add_(0, pairs[0], weight)
        value = float((weight * (weight / mass[pairs[0]]).log()).sum() / len(labels))
        return ScoreDetails(value, len(labels), len(names), 0, rank=len(mass), warnings=_caveats(self.name, names))


def _caveats(name: str, classes: Tensor) -> tuple[str, ...]:
    if len(classes) > 1:
        return ()
    return (f"{name}: all samples are of one class, so there is nothing to tell apart and the score is 0",)


def _check_label_pairs(values: Any, labels: Any) -> tuple[Tensor, Tensor]:
    sources, targets = check_labels("source_labels", values), check_labels("labels", labels)
    check_lengths("source_labels", sources, targets)
    return sources, targets


def leep(source_probabilities: Tensor | Any, labels: Tensor | Any) -> float:
    """Log expected empirical prediction of target labels from a source model's class probabilities.

    Args:
        source_probabilities: [N, C_s] floating point, rows that sum to 1 (within rounding, or 1e-4).
        labels: [N] integers of any values, the target's classes.

    Returns:
        LEEP in nats, at most 0; higher means more transferable. Right to 1e-6 for float32, 1e-12 for float64.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a negative probability, a row that does not sum to 1.

    Warns:
        ScoreWarning: a single class (the score is 0, the highest there is).
    """
    score = Leep()
    score._checks_late = True  # saves a read
    return score._once(source_probabilities, labels)


def nce(source_labels: Tensor | Any, labels: Tensor | Any) -> float:
    """Negative conditional entropy of the target's labels given those of a source model.

    Args:
        source_labels: [N] integers of any values, what the source model predicts.
        labels: [N] integers of any values.

    Returns:
        -H(Y|Z) in nats, at most 0; higher means more transferable.

    Raises:
        TypeError: an argument is no array or not of integers.
        ValueError: shapes or devices disagree, or there are no samples.

    Warns:
        ScoreWarning: a single class (the score is 0, the highest there is).
    """
    return Nce()._once(source_labels, labels)


def check_labels(argument: str, value: Any) -> Tensor:
    """Integers [N]."""
    labels = as_tensor(argument, value).detach()
    if labels.is_floating_point() or labels.is_complex():
        fail(argument, "integers", describe(labels), TypeError)
    if labels.dim() != 1:
        fail(argument, "shape [N]", describe(labels))
    return labels.long()


def check_lengths(argument: str, values: Tensor, labels: Tensor) -> None:
    """One label per row, on one device."""
    if len(values) != len(labels):
        fail("labels", f"one label for each of the {len(values)} rows of {argument}", f"{len(labels)}")
    if values.device != labels.device:
        fail("labels", f"the device of {argument}, {values.device}", str(labels.device))

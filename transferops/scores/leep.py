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

from transferops._validate import as_tensor, describe, fail
from transferops.scores.rows import RowScore

_BLOCK_ELEMENTS = 1 << 18  # of a block of rows and its gathered conditionals: they stay in cache


class Leep(RowScore):
    """Streaming :func:`leep`. Keeps the probabilities: the score needs each row a second time."""

    def _check(self, values: Any, labels: Any) -> tuple[Tensor, Tensor]:
        probabilities = as_tensor("source_probabilities", values).detach()
        targets = _check_labels("labels", labels)
        if not probabilities.is_floating_point():
            fail("source_probabilities", "floating point", describe(probabilities), TypeError)
        if probabilities.dim() != 2 or probabilities.shape[1] == 0:
            fail("source_probabilities", "shape [N, C_s] with C_s >= 1", describe(probabilities))
        _check_lengths("source_probabilities", probabilities, targets)
        sums = probabilities.sum(1, dtype=torch.float64)
        tolerance = probabilities.shape[1] * torch.finfo(probabilities.dtype).eps + 1e-4
        bad = (~((sums - 1).abs() <= tolerance)).nonzero()
        if len(bad):
            row = int(bad[0])
            fail("source_probabilities", "rows that sum to 1", f"a sum of {float(sums[row]):.6g} in row {row}")
        if probabilities.numel() and float(probabilities.min()) < 0:
            position = (probabilities < 0).nonzero()[0].tolist()
            fail(
                "source_probabilities",
                "no negative value",
                f"{probabilities[tuple(position)].item():.6g} at position {position}",
            )
        return probabilities, targets

    def _score(self, values: Tensor, labels: Tensor) -> float:
        classes, index = torch.unique(labels, return_inverse=True)
        samples, width = values.shape
        rows = max(_BLOCK_ELEMENTS // width, 1)
        joint = values.new_zeros(len(classes), width, dtype=torch.float64)
        for start in range(0, samples, rows):
            part = slice(start, start + rows)
            joint.index_add_(0, index[part], values[part].double())
        mass = joint.sum(0)
        conditional = torch.where(mass > 0, joint / torch.where(mass > 0, mass, 1), 0)
        total = 0.0
        for start in range(0, samples, rows):
            part = slice(start, start + rows)
            expected = (values[part].double() * conditional[index[part]]).sum(1)
            total += float(expected.log().sum())
        return min(total / samples, 0.0)


class Nce(RowScore):
    """Streaming :func:`nce`."""

    def _check(self, values: Any, labels: Any) -> tuple[Tensor, Tensor]:
        sources, targets = _check_labels("source_labels", values), _check_labels("labels", labels)
        _check_lengths("source_labels", sources, targets)
        return sources, targets

    def _score(self, values: Tensor, labels: Tensor) -> float:
        _, source = torch.unique(values, return_inverse=True)
        _, target = torch.unique(labels, return_inverse=True)
        pairs, joint = torch.unique(torch.stack([source, target]), dim=1, return_counts=True)
        weight = joint.double()
        mass = torch.zeros(int(source.max()) + 1, dtype=torch.float64, device=weight.device)
        mass.index_add_(0, pairs[0], weight)
        return float((weight * (weight / mass[pairs[0]]).log()).sum() / len(labels))


def leep(source_probabilities: Tensor | Any, labels: Tensor | Any) -> float:
    """Log expected empirical prediction of target labels from a source model's class probabilities.

    Args:
        source_probabilities: [N, C_s] floating point, rows that sum to 1 (within rounding, or 1e-4).
        labels: [N] integers of any values, the target's classes.

    Returns:
        LEEP in nats, at most 0; higher means more transferable. Sums in float64.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a negative probability, a row that does not sum to 1.
    """
    return Leep().update(source_probabilities, labels).compute()


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
    """
    return Nce().update(source_labels, labels).compute()


def _check_labels(argument: str, value: Any) -> Tensor:
    labels = as_tensor(argument, value).detach()
    if labels.is_floating_point() or labels.is_complex():
        fail(argument, "integers", describe(labels), TypeError)
    if labels.dim() != 1:
        fail(argument, "shape [N]", describe(labels))
    return labels.long()


def _check_lengths(argument: str, values: Tensor, labels: Tensor) -> None:
    if len(values) != len(labels):
        fail("labels", f"one label for each of the {len(values)} rows of {argument}", f"{len(labels)}")
    if values.device != labels.device:
        fail("labels", f"the device of {argument}, {values.device}", str(labels.device))

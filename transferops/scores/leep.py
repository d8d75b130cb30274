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
from transferops.scores.base import Collection, Score, ScoreDetails
from transferops.scores.rows import Rows

_BLOCK_ELEMENTS = 1 << 20  # of a block of rows and its gathered conditionals: they stay in the last-level cache
_BAG_ROWS = 256  # rows summed in the probabilities' own dtype before their sum enters the float64 total


class Leep(Score):
    """Streaming :func:`leep`. Keeps the probabilities: the score needs each row a second time."""

    name = "leep"
    takes = "probabilities"

    def _collection(self) -> Collection:
        return Rows(_check_probabilities)

    def _evaluate(self, data: Any) -> ScoreDetails:
        probabilities, labels = data.all()
        classes, index = torch.unique(labels, return_inverse=True)
        value, mass = log_expected_prediction(probabilities, index, len(classes))
        rank = int((mass > 0).sum())
        return ScoreDetails(value, len(labels), len(classes), probabilities.shape[1], rank=rank)


def log_expected_prediction(probabilities: Tensor, index: Tensor, classes: int) -> tuple[float, Tensor]:
    """LEEP of checked probabilities [N, C_s] and classes 0 .. C-1 [N]; and the mass of each source class [C_s].

    Sums over rows in float64; the products of float32 and narrower probabilities in float32.
    """
    samples, width = probabilities.shape
    values = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    joint = _sums_by_class(values, index, classes)
    mass = joint.sum(0)
    conditional = (joint / torch.where(mass > 0, mass, 1)).to(values.dtype)
    rows = max(_BLOCK_ELEMENTS // width, 1)
    expected = [
        conditional.index_select(0, labels).mul_(block).sum(1)
        for block, labels in zip(torch.split(values, rows), torch.split(index, rows))
    ]
    return min(float(torch.cat(expected).double().log().sum()) / samples, 0.0), mass


def _sums_by_class(values: Tensor, index: Tensor, classes: int) -> Tensor:
    """[C, C_s] float64, the sum of the rows of each class."""
    order = index.argsort(stable=True)
    sizes = torch.bincount(index, minlength=classes)
    # Each class in bags of at most _BAG_ROWS rows: embedding_bag adds rows where they lie, without a sorted copy.
    bags = (sizes + _BAG_ROWS - 1) // _BAG_ROWS
    owner = torch.repeat_interleave(bags)
    within = torch.arange(len(owner), device=index.device) - (bags.cumsum(0) - bags)[owner]
    offsets = (sizes.cumsum(0) - sizes)[owner] + within * _BAG_ROWS
    partial = torch.nn.functional.embedding_bag(order, values, offsets, mode="sum")
    joint = values.new_zeros(classes, values.shape[1], dtype=torch.float64)
    return joint.index_add_(0, owner, partial.double())


def _check_probabilities(values: Any, labels: Any) -> tuple[Tensor, Tensor]:
    probabilities = as_tensor("source_probabilities", values).detach()
    targets = check_labels("labels", labels)
    if not probabilities.is_floating_point():
        fail("source_probabilities", "floating point", describe(probabilities), TypeError)
    if probabilities.dim() != 2 or probabilities.shape[1] == 0:
        fail("source_probabilities", "shape [N, C_s] with C_s >= 1", describe(probabilities))
    check_lengths("source_probabilities", probabilities, targets)
    wide = None if probabilities.dtype == torch.float64 else torch.float32
    blocks = torch.split(probabilities, max(_BLOCK_ELEMENTS // probabilities.shape[1], 1))
    facts = [(block.sum(1, dtype=wide), block.amin(1)) for block in blocks]  # in one read
    sums, lowest = (torch.cat(column) for column in zip(*facts))
    tolerance = probabilities.shape[1] * torch.finfo(probabilities.dtype).eps + 1e-4
    bad = (~((sums - 1).abs() <= tolerance)).nonzero()
    if len(bad):
        row = int(bad[0])
        fail("source_probabilities", "rows that sum to 1", f"a sum of {float(sums[row]):.6g} in row {row}")
    if bool((lowest < 0).any()):
        position = (probabilities < 0).nonzero()[0].tolist()
        fail(
            "source_probabilities",
            "no negative value",
            f"{probabilities[tuple(position)].item():.6g} at position {position}",
        )
    return probabilities, targets


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
        return ScoreDetails(value, len(labels), len(names), 0, rank=len(mass))


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
    """
    return Leep()._once(source_probabilities, labels)


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

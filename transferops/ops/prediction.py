"""The target's labels predicted from a source model's class probabilities: what LEEP is made of.

Everything is summed in float64, whatever the dtype of the probabilities. Results do not depend on the number of threads
and are the same in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transferops._extension import check_device  # also registers torch.ops.transferops
from transferops._validate import as_tensor, check_positive_int, describe, fail
from transferops.ops.moments import check_label_range, check_labels

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_BLOCK_ELEMENTS = 1 << 22  # of a block of rows, which is converted to float64


class EmpiricalPrediction(NamedTuple):
    """The expected empirical predictor of Nguyen et al. (ICML 2020), and what tells whether its input was sound.

    Attributes:
        prediction: [N] float64, sum_z P(y_n|z) theta_nz, the probability of a row's own label.
        mass: [C_s] float64, the sum of each column.
        totals: [N] float64, the sum of each row.
        lowest: [N] float64, the smallest element of each row; of a row with NaN, any number.
    """

    prediction: Tensor
    mass: Tensor
    totals: Tensor
    lowest: Tensor


def empirical_prediction(
    probabilities: Tensor | Any, labels: Tensor | Any, num_classes: int | None = None
) -> EmpiricalPrediction:
    """Predict each label from its row, by the conditionals P(y|z) that all rows and labels together give.

    With J(y, z) the sum of theta_nz over the rows of label y, P(y|z) = J(y, z) / sum_y J(y, z); a column without mass
    takes no part.

    Args:
        probabilities: theta, [N, C_s] float32, float64, float16 or bfloat16, any strides. What they hold is not looked
            at: ``totals`` and ``lowest`` tell.
        labels: [N] integers in 0 .. num_classes-1.
        num_classes: number of classes C; classes without samples are allowed. Default: the largest label + 1.

    Returns:
        :class:`EmpiricalPrediction`.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, or a label is out of range.

    Not differentiable: probabilities are taken as constants. Cost: two reads of the probabilities on a CPU; on a GPU
    two float64 matrix products with one-hot labels, a block of rows at a time.
    """
    probabilities = as_tensor("probabilities", probabilities).detach()
    if probabilities.dtype not in _FLOATING:
        fail("probabilities", "float32, float64, float16 or bfloat16", describe(probabilities), TypeError)
    if probabilities.dim() != 2:
        fail("probabilities", "shape [N, C_s]", describe(probabilities))
    check_device("probabilities", probabilities.device)
    labels = check_labels(labels, "probabilities", probabilities, probabilities.shape[0])
    if num_classes is None:
        num_classes = int(labels.max()) + 1 if labels.numel() else 0
    if not torch.compiler.is_compiling():
        check_positive_int("num_classes", num_classes, minimum=0)
        check_label_range(labels, num_classes)
        if num_classes > len(labels):  # classes without samples take no room
            labels, num_classes = torch.unique(labels, return_inverse=True)[1], len(labels)
    return EmpiricalPrediction(*torch.ops.transferops.empirical_prediction(probabilities, labels, num_classes))


def composed_prediction(
    probabilities: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op by way of torch's own: the same steps for a device that has no kernel of its own here."""
    rows, columns = probabilities.shape
    step = max(_BLOCK_ELEMENTS // max(columns, num_classes, 1), 1)
    blocks = list(zip(torch.split(probabilities, step), torch.split(labels, step))) if rows else []
    joint = probabilities.new_zeros(num_classes, columns, dtype=torch.float64)
    totals, lowest = [joint.new_zeros(0)], [joint.new_zeros(0)]
    for block, own in blocks:
        values = block.double()
        members = torch.nn.functional.one_hot(own, num_classes).double()
        joint.addmm_(members.mT, values)
        totals.append(values.sum(1))
        lowest.append(values.amin(1) if columns else totals[-1] + torch.inf)
    mass = joint.sum(0)
    conditional = torch.where(mass > 0, joint / mass, 0.0)
    predictions = [(conditional[own] * block.double()).sum(1) for block, own in blocks]
    return torch.cat([joint.new_zeros(0), *predictions]), mass, torch.cat(totals), torch.cat(lowest)


def _fake_empirical_prediction(
    probabilities: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = (probabilities.new_empty([size], dtype=torch.float64) for size in probabilities.shape)
    return rows, columns, torch.empty_like(rows), torch.empty_like(rows)


torch.library.register_kernel("transferops::empirical_prediction", "cuda", composed_prediction)
torch.library.register_fake("transferops::empirical_prediction", _fake_empirical_prediction)

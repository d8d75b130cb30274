"""The published form of layer variational analysis, for comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transferops._validate import as_tensor, describe, fail
from transferops.adapt.head_rows import check_finite, check_matrix


def published_head(
    features: Tensor | Any, targets: Tensor | Any, weight: Tensor | Any, bias: Tensor | Any | None = None
) -> tuple[Tensor, Tensor | None]:
    """W + (pinv(Z) Q)^T with Q = Y - Z W^T - b: the paper's pseudo-inverse in exact mode, arXiv 2302.01798 [paper].

    It fits the samples as closely as it can at any cost: near N = p, where the smallest singular values are tiny, the
    change becomes huge. :class:`transferops.adapt.HeadSolver` with a penalty does not. Computed in the dtype of the
    features, with torch's default cut of singular values.

    Args:
        features: [N, p] float32 or float64.
        targets: [N, c].
        weight: [c, p], the pretrained head.
        bias: [c]; taken along as the weight of a constant feature. None for a head without.

    Returns:
        Weight [c, p] and bias [c] or None, in the dtype of the features.

    Raises:
        TypeError, ValueError: shapes disagree, or a number is NaN or infinite.
    """
    z = check_matrix("features", features, "[N, p]")
    y, w = check_matrix("targets", targets, "[N, c]").to(z), check_matrix("weight", weight, "[c, p]").to(z)
    if z.dtype not in (torch.float32, torch.float64):
        fail("features", "float32 or float64", describe(z), TypeError)
    if len(z) == 0 or len(y) != len(z):
        fail("targets", f"{max(len(z), 1)} rows, one for each row of features", describe(y))
    if list(w.shape) != [y.shape[1], z.shape[1]]:
        fail("weight", f"shape {[y.shape[1], z.shape[1]]}", describe(w))
    for name, values in (("features", z), ("targets", y), ("weight", w)):
        check_finite(name, values)
    if bias is None:
        return w + (torch.linalg.pinv(z) @ (y - z @ w.mT)).mT, None
    b = as_tensor("bias", bias).detach().to(z)
    if list(b.shape) != [len(w)]:
        fail("bias", f"shape [{len(w)}]", describe(b))
    check_finite("bias", b)
    change = torch.linalg.pinv(torch.cat([z, z.new_ones(len(z), 1)], 1)) @ (y - z @ w.mT - b)
    return w + change[:-1].mT, b + change[-1]

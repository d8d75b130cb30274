"""LogME in the peers' terms: targets as their flag ``regression`` means them, and the weights of the linear model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transferops import scores
from transferops._validate import as_tensor, describe, fail

_MOST_CLASSES = 1_000_000


def real_targets(targets: Tensor | Any, regression: bool) -> Tensor:
    """Targets as a tensor: in float64 for regression, which the scores tell from classification by the dtype.

    Raises:
        TypeError: no array, complex numbers, or floating-point targets without ``regression``.
    """
    values = as_tensor("labels", targets)
    if values.is_complex():
        fail("labels", "real numbers", describe(values), TypeError)
    if values.is_floating_point() and not regression:
        fail("labels", "integers, or regression=True", describe(values), TypeError)
    return values.double() if regression else values


def posterior_mean(features: Tensor | Any, targets: Tensor | Any, regression: bool) -> NDArray[np.float64]:
    """The weights of the Bayesian linear model at the maximum of its evidence.

    Args:
        features: [N, D] floating point.
        targets: [N] integers, or with ``regression`` numbers [N] or [N, M].
        regression: whether the targets are numbers to be regressed on.

    Returns:
        m = (F^T F + lambda I)^-1 F^T y for every output, [M, D]; of class labels for those of 0 .. max, zero for one
        without samples.

    Raises:
        TypeError, ValueError: as :func:`transferops.scores.log_me`; a label is negative or a million or more.
    """
    features, values = as_tensor("features", features).detach(), real_targets(targets, regression)
    score = scores.LogMe(regression=regression).update(features, values)
    rows = values.reshape(len(values), -1)
    if not regression:
        present, index = torch.unique(values.long(), return_inverse=True)
        if present[0] < 0:
            fail("labels", "classes from 0", f"{int(present[0])}")
        if present[-1] >= _MOST_CLASSES:
            expected = f"classes below {_MOST_CLASSES}, as there is a row of weights for each"
            fail("labels", expected, f"{int(present[-1])}")
        rows = torch.nn.functional.one_hot(index).double()
    penalties = torch.tensor(score.details().penalties, dtype=torch.float64, device=features.device)
    wide = features.double()
    few = len(wide) <= wide.shape[1]
    # (F^T F + lambda)^-1 F^T y = F^T (F F^T + lambda)^-1 y, by the smaller of the two matrices.
    spectrum, vectors = torch.linalg.eigh(wide @ wide.mT if few else wide.mT @ wide)
    kept = spectrum > len(spectrum) * torch.finfo(torch.float64).eps * spectrum[-1]
    inverse = kept / torch.where(kept, spectrum + penalties.unsqueeze(1), 1.0)  # [M, r]
    right = rows if few else wide.mT @ rows
    means = (inverse * (right.mT @ vectors)) @ vectors.mT
    means = means @ wide if few else means
    if not regression:
        weights = means.new_zeros(int(present[-1]) + 1, means.shape[1])
        weights[present] = means
        means = weights
    result: NDArray[np.float64] = means.cpu().numpy()
    return result

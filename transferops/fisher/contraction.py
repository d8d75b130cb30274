"""From the derivatives of the outputs along K directions to the K x K matrix of one batch.

A tangent is T_k = J delta_k, the derivative of the outputs [N, C] along direction k. The softmax form is one op on
the devices that this build has kernels for; elsewhere products are formed and summed in float64 whatever the inputs'
precision, a slice of the samples at a time, so that no float64 copy of all the tangents is held.
"""

from __future__ import annotations

import torch

from transferops import ops
from transferops._extension import has_kernels
from transferops._validate import check_tensor, describe, fail

_SLICE_ELEMENTS = 1 << 22  # of one float64 slice of the tangents: 32 MiB


def softmax_fisher_gram(logits: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
    """Gram matrix of tangents under the Fisher information of a softmax output, summed over samples
    [derived].

    A_kl = sum_n T_kn (diag p_n - p_n p_n^T) T_ln, p_n = softmax(z_n), formed as the sum over n and c of
    p_nc (T_knc - m_kn) (T_lnc - m_ln) with m_kn = sum_c p_nc T_knc: centred, so that a common shift of the
    logits cancels exactly and the matrix is positive semidefinite to rounding.

    Args:
        logits: z, floating point [N, C].
        tangents: T, floating point [K, N, C], on the same device.

    Returns:
        A, float64 [K, K], on the device of the tangents.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices do not fit.
    """
    _check_floating("logits", logits, dimensions=2)
    _check_floating("tangents", tangents, dimensions=3)
    if tangents.shape[1:] != logits.shape or tangents.device != logits.device:
        expected = f"shape [K, {logits.shape[0]}, {logits.shape[1]}] on {logits.device}, as the logits"
        fail("tangents", expected, describe(tangents))
    if has_kernels(logits.device):
        return ops.softmax_fisher_gram(logits, tangents)
    return _gram(tangents, logits)


def tangent_gram(tangents: torch.Tensor) -> torch.Tensor:
    """Gram matrix of tangents under unit-variance regression, A_kl = sum_n sum_c T_knc T_lnc [derived].

    Args:
        tangents: T, floating point [K, N, C].

    Returns:
        A, float64 [K, K], on the device of the tangents.

    Raises:
        TypeError: ``tangents`` is not a floating-point tensor.
        ValueError: ``tangents`` does not have three dimensions.
    """
    _check_floating("tangents", tangents, dimensions=3)
    return _gram(tangents, None)


def _gram(tangents: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
    directions, samples, classes = tangents.shape
    gram = tangents.new_zeros((directions, directions), dtype=torch.float64)
    step = max(1, _SLICE_ELEMENTS // max(1, directions * classes))
    for start in range(0, samples, step):
        part = tangents[:, start : start + step].to(torch.float64, copy=True)
        if logits is not None:
            probabilities = logits[start : start + step].to(torch.float64).softmax(-1)
            part -= torch.einsum("knc,nc->kn", part, probabilities).unsqueeze(-1)
            part *= probabilities.sqrt()
        rows = part.flatten(1)
        gram.addmm_(rows, rows.T)
    return gram


def _check_floating(argument: str, value: torch.Tensor, *, dimensions: int) -> None:
    check_tensor(argument, value)
    if not value.is_floating_point():
        fail(argument, "a floating-point tensor", describe(value), TypeError)
    if value.dim() != dimensions:
        fail(argument, f"{dimensions} dimensions", describe(value))

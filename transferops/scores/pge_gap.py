"""The gap between gradient expectations, and what stands beside it.

[paper: arXiv 2211.16299] gap(S, T) = |g_S - g_T| / (|g_S| |g_T|), smaller = more transferable. [derived] It equals
| g_S / |g_S|^2 - g_T / |g_T|^2 |, so that all gaps between K tasks follow from one K x K Gram matrix. It is not scale
free: expectations ten times as large give a tenth of it. So the cosine stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import describe, fail


def pge_gap(source_expectation: Sequence[Tensor], target_expectation: Sequence[Tensor]) -> float:
    """The published gap between two expectations: smaller means more transferable.

    Args:
        source_expectation, target_expectation: lists of tensors of the same shapes, floating point.

    Returns:
        |g_S - g_T| / (|g_S| |g_T|), from sums in float64; not scale free. Nearly equal expectations give gaps that are
        accurate to about 1e-8 of 1 / |g|.

    Raises:
        TypeError: an argument is no list of floating-point tensors.
        ValueError: shapes or devices disagree, or an expectation is zero or not finite.
    """
    return float(gaps(_gram_of_two(source_expectation, target_expectation))[0, 1])


def pge_cosine(source_expectation: Sequence[Tensor], target_expectation: Sequence[Tensor]) -> float:
    """The cosine between two expectations, in [-1, 1]: larger means more transferable [derived].

    Arguments and errors are those of :func:`pge_gap`.
    """
    return float(cosines(_gram_of_two(source_expectation, target_expectation))[0, 1])


def _gram_of_two(source: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    for name, tensors in (("source_expectation", source), ("target_expectation", target)):
        if not isinstance(tensors, (list, tuple)) or not all(isinstance(x, Tensor) for x in tensors):
            fail(name, "a list of tensors", describe(tensors), TypeError)
    gram = ops.gradient_gram([list(source), list(target)]).detach().cpu()
    for index, name in enumerate(("source_expectation", "target_expectation")):
        if not 0 < float(gram[index, index]) < math.inf:
            fail(name, "a non-zero, finite expectation", f"squared norm {float(gram[index, index])}")
    return gram


def gaps(gram: Tensor) -> Tensor:
    """|g_k - g_l| / (|g_k| |g_l|) from inner products [K, K]."""
    square = gram.diagonal()
    apart = (square.unsqueeze(0) + square.unsqueeze(1) - 2 * gram).clamp(min=0).fill_diagonal_(0)
    return apart.sqrt() / torch.outer(square.sqrt(), square.sqrt())


def cosines(gram: Tensor) -> Tensor:
    """Cosines from inner products [K, K]."""
    norms = gram.diagonal().sqrt()
    return (gram / torch.outer(norms, norms)).clamp(-1, 1).fill_diagonal_(1)


def weigh(gram: Tensor, weights: Tensor) -> Tensor:
    """Inner products [K, K] of weighted means over groups, from those of the groups [K, G, K, G]."""
    shares = weights / weights.sum(1, keepdim=True)
    whole = torch.einsum("kg,kglh,lh->kl", shares, gram, shares)
    return (whole + whole.mT) / 2


def jackknife(gram: Tensor, weights: Tensor, functions: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """Standard errors of functions of the Gram matrix, by leaving out one group of restarts at a time in all tasks.

    With h_j = n / m_j for a group of m_j of n: pseudovalues h_j f - (h_j - 1) f_(-j), whose variance about their mean
    weighted by 1 - m_j / n is taken, over h_j - 1.
    """
    groups = weights.shape[1]
    if groups < 2:
        return [torch.full((gram.shape[0],) * 2, math.nan, dtype=torch.float64) for _ in functions]
    share = (weights / weights.sum(1, keepdim=True)).mean(0)  # groups hold the same restarts in every task
    without = []
    for left_out in range(groups):
        kept = weights.clone()
        kept[:, left_out] = 0
        without.append(weigh(gram, kept))
    errors = []
    for function in functions:
        whole = function(weigh(gram, weights))
        partial = torch.stack([function(g) for g in without])
        ratio = (1 / share).view(-1, 1, 1)
        pseudo = ratio * whole - (ratio - 1) * partial
        centre = groups * whole - ((1 - share).view(-1, 1, 1) * partial).sum(0)
        errors.append(((pseudo - centre).square() / (ratio - 1)).mean(0).sqrt())
    return errors

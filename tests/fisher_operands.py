"""Random operands of the Fisher ops, and one call of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for the same shape; generated in float64 for every dtype."""
    generator = torch.Generator().manual_seed(sum((i + 1) * size for i, size in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """One call of each op."""
    a, b, d = (random(*shape, dtype=dtype) for shape in [(4, 3, 5), (4, 3, 2), (2, 2, 5)])
    x, g, w = (random(*shape, dtype=dtype) for shape in [(3, 4, 6, 5), (3, 6, 3, 3), (2, 6, 2, 3, 3)])
    window = ([3, 3], [2, 1], [1, 0], [1, 1], 2)
    return {
        "linear_fisher_diagonal": (a, b),
        "linear_fisher_projection": (a, b, list(d)),
        "linear_grad_norm": (a, b),
        "conv_fisher_diagonal": (x, g, *window),
        "conv_fisher_projection": (x, g, list(w), *window),
        "conv_grad_norm": (x, g, *window),
        "softmax_fisher_gram": (random(5, 7, dtype=dtype), random(3, 5, 7, dtype=dtype)),
    }

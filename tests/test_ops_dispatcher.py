"""Ops called through torch's dispatcher, as C++ programs and compiled models do: past the checks in Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from transferops import ops

OPS = torch.ops.transferops
X = torch.arange(12.0).reshape(4, 3)
M, G = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
STACKED = [torch.ones(5, 3), torch.ones(4, 2)]
IMAGE = torch.ones(2, 3, 4, 4)
WINDOW: Any = ([3, 3], [1, 1], [0, 0], [1, 1], 1)


def half(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.half() for tensor in tensors]


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "integers": (
        lambda: OPS.sample_gram(X.int()),
        "features: expected float32, float64, float16 or bfloat16, got another dtype",
    ),
    "labels of another length": (
        lambda: OPS.class_moments(X, torch.zeros(3, dtype=torch.int64), 2),
        "labels: expected shape [4], one label per row of features, got [3]",
    ),
    "gradients at other places": (
        lambda: OPS.conv_grad_norm(IMAGE, torch.ones(3, 3, 2, 2), *WINDOW),
        "grad_outputs: expected 2 samples of 2 spatial dimensions, got shape [3, 3, 2, 2]",
    ),
    "no positions": (
        lambda: OPS.conv_grad_norm(IMAGE[:, :, 0, 0], IMAGE, *WINDOW),
        "inputs: expected shape [N, C, *spatial] with 1 to 3 spatial dimensions, got [2, 3]",
    ),
    "a gradient too few": (
        lambda: OPS.gradient_expectation_(M, [], G[:1], False, 0),
        "gradients: expected 2 tensors, as means, got 1",
    ),
    "a square too few": (
        lambda: OPS.gradient_expectation_(M, M[:1], G, False, 0),
        "squares: expected 2 tensors, as means, or none, got 1",
    ),
    "samples that differ in number": (
        lambda: OPS.gradient_expectation_(M, [], STACKED, True, 0),
        "gradients: expected 5 samples at index 1, got 4",
    ),
    "means of half precision": (
        lambda: OPS.gradient_expectation_(half(M), [], G, False, 0),
        "means: expected float32 or float64, got another dtype at index 0",
    ),
    "squares of another dtype": (
        lambda: OPS.gradient_expectation_(M, [m.double() for m in M], G, False, 0),
        "squares: expected the dtype of means, got another at index 0",
    ),
    "lists of different lengths": (
        lambda: OPS.gradient_expectation_gram_([*M, M[0]], [], G, False, [0], 2),
        "means: expected tensors of 2 lists of equal length, got 3",
    ),
    "joint means of half precision": (
        lambda: OPS.gradient_expectation_gram_(half(M), [], G, False, [0], 1),
        "means: expected float32 or float64, got another dtype",
    ),
    "joint samples that differ in number": (
        lambda: OPS.gradient_expectation_gram_(M, [], STACKED, True, [0], 1),
        "gradients: expected 5 samples at index 1, got 4",
    ),
    "joint gradients of two dtypes": (
        lambda: OPS.gradient_expectation_gram_(M, [], [G[0], G[1].double()], False, [0], 1),
        "gradients: expected one dtype for all tensors, got another at index 1",
    ),
    "gradients of two dtypes": (
        lambda: OPS.gradient_gram([G[0], G[0].double()], 2),
        "gradients: expected one dtype for all tensors, got another at index 1",
    ),
    "directions of another size": (
        lambda: OPS.gradient_fisher_gram(X, X[:, :2]),
        "directions: expected shape [K, P] with P = 3, got [4, 2]",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case: str) -> None:
    call, message = REFUSALS[case]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("squares", [False, True])
def test_moments_in_an_order_of_their_own(squares: bool, generator: torch.Generator) -> None:
    """Dense, but with columns one after the other, beside gradients whose rows are, or which have gaps."""
    means = [torch.zeros(5, 4).mT]
    second = [torch.zeros(5, 4).mT] if squares else None
    gradients = [torch.randn(8, 10, generator=generator)[::2, ::2] for _ in range(3)]
    for count, gradient in enumerate(gradients):
        ops.gradient_expectation_(means, second, [gradient], count)
    stacked = torch.stack(gradients).double()
    torch.testing.assert_close(means[0].double(), stacked.mean(0), rtol=1e-6, atol=1e-6)
    if second is not None:
        expected = (stacked - stacked.mean(0)).square().sum(0)
        torch.testing.assert_close(second[0].double(), expected, rtol=1e-5, atol=1e-6)

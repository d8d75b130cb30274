"""Elements further apart than 2^31, in sparse files, and shapes of more elements than that, without data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transferops import ops

FAR = 2**31 + 64  # elements


@pytest.fixture
def far(tmp_path: Path) -> Callable[..., Tensor]:
    """Copies a tensor to a sparse file, its steps along one dimension FAR elements; only its own pages are stored."""

    def place(values: Tensor, dimension: int = 0) -> Tensor:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.bin"
        size = FAR * values.shape[dimension]
        with path.open("wb") as file:
            file.truncate(size * values.element_size())
        stored = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
        strides = list(values.movedim(dimension, 0)[0].contiguous().stride())
        strides.insert(dimension, FAR)
        view = stored.as_strided(values.shape, strides)
        view.copy_(values)
        return view

    return place


def _some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strides_past_31_bits(far: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Whichever dimension it is: the same bits as of contiguous tensors."""
    x, labels = _some(3, 5, dtype=dtype), torch.tensor([0, 1, 1])
    a, b, moves = _some(2, 3, 4, dtype=dtype), _some(2, 3, 5, dtype=dtype), _some(2, 5, 4)
    image, signal = _some(2, 2, 4, 3, dtype=dtype), _some(2, 2, 4, 3, dtype=dtype)
    window = ((3, 3), 1, 1)
    for d in (0, 1):
        wide = far(x, d)
        assert max(wide.stride()) >= 2**31
        for found, expected in (
            (ops.class_moments(wide, labels), ops.class_moments(x, labels)),
            (ops.sample_gram(wide), ops.sample_gram(x)),
            (ops.norm_moments(wide, x.double().mean(0)), ops.norm_moments(x, x.double().mean(0))),
            (ops.gradient_fisher_gram(wide, x), ops.gradient_fisher_gram(x, x)),
        ):
            assert all(torch.equal(left, right) for left, right in zip(found, expected))
        assert torch.equal(ops.weighted_gram(wide, x[0]), ops.weighted_gram(x, x[0]))
        assert torch.equal(ops.gradient_gram([[wide], [x]]), ops.gradient_gram([[x], [x]]))
        assert torch.equal(ops.softmax_fisher_gram(wide, x.unsqueeze(0)), ops.softmax_fisher_gram(x, x.unsqueeze(0)))
    for d in (0, 1, 2):
        left, right = far(a, d), far(b, d)
        assert torch.equal(ops.linear_fisher_diagonal(left, right), ops.linear_fisher_diagonal(a, b))
        assert torch.equal(ops.linear_fisher_projection(left, right, moves), ops.linear_fisher_projection(a, b, moves))
        assert torch.equal(ops.linear_grad_norm(left, right), ops.linear_grad_norm(a, b))
        assert torch.equal(ops.softmax_fisher_gram(a[0], far(a, d)[:1]), ops.softmax_fisher_gram(a[0], a[:1]))
    for d in range(4):
        left, right = far(image, d), far(signal, d)
        assert torch.equal(
            ops.conv_fisher_diagonal(left, right, *window), ops.conv_fisher_diagonal(image, signal, *window)
        )
        assert torch.equal(ops.conv_grad_norm(left, right, *window), ops.conv_grad_norm(image, signal, *window))


def test_shapes_past_31_bits() -> None:
    """On the meta device: shapes are those that the kernels would give, and no product of sizes wraps."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, width = 2**33, 2**17  # features of 2^50 elements, Gram matrices of 2^34
    features, labels = meta(rows, width), meta(rows, dtype=torch.int64)
    moments = ops.class_moments(features, labels, 2**20, validate=False)
    assert [list(x.shape) for x in moments] == [[2**20], [2**20, width], [width, width], [width]]
    assert ops.sample_gram(features.mT, validate=False).gram.numel() == 2**34
    assert ops.norm_moments(features, meta(width, dtype=torch.float64), validate=False).cubic.shape == (width,)
    a, b = meta(2**20, 2**10, 2**16), meta(2**20, 2**10, 2**17)
    assert ops.linear_fisher_diagonal(a, b).numel() == 2**33
    assert ops.linear_grad_norm(a, b).shape == (2**20,)
    assert ops.linear_fisher_projection(a, b, meta(2**12, 2**17, 2**16)).numel() == 2**32
    image = meta(2**16, 2**9, 2**7, 2**7)
    assert ops.conv_fisher_diagonal(image, image, (3, 3), 1, 1).shape == (2**9, 2**9, 3, 3)
    assert ops.softmax_fisher_gram(meta(2**20, 2**12), meta(2**17, 2**20, 2**12)).numel() == 2**34
    assert ops.gradient_gram([[meta(2**40)], [meta(2**40)]]).shape == (2, 2)
    assert ops.weighted_gram(meta(2**17, 2**20), meta(2**20)).numel() == 2**34
    assert ops.gradient_fisher_gram(meta(2**33, 2**10), meta(3, 2**10)).norms.shape == (2**33,)


def test_a_convolution_too_wide_is_refused() -> None:
    """Sizes whose product would wrap are no way to a wrong output size."""
    image = _some(1, 1, 4, 4)
    with pytest.raises(ValueError, match="grad_outputs: expected shape"):
        ops.conv_fisher_diagonal(image, image, (3, 3), 1, 2**40)

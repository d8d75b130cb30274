"""The Fisher ops on a GPU against float64 on the CPU, with bounds from the arithmetic of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from transferops import ops

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [  # N, T, I, O
    (1, 1, 1, 1),
    (3, 2, 3, 17),
    (2, 17, 65, 3),
    (5, 33, 129, 130),
    (17, 197, 192, 200),
    (3, 1030, 64, 128),
    (300, 5, 24, 40),
    (130, 1, 192, 200),  # projections by contraction
    (43, 3, 300, 260),  # norms by products between positions too
]
CONVOLUTIONS: dict[str, tuple[int, tuple[int, ...], int, int, tuple[int, ...], dict[str, Any]]] = {
    "1d": (3, (19,), 5, 7, (3,), {"padding": 1}),
    "2d": (5, (9, 8), 16, 24, (3, 3), {"padding": 1}),
    "3d": (2, (5, 6, 4), 3, 5, (2, 3, 1), {"stride": (1, 2, 1), "padding": (0, 1, 0), "dilation": (2, 1, 1)}),
    "uneven": (4, (9, 8), 4, 6, (3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
    "depthwise": (3, (8, 8), 16, 16, (3, 3), {"padding": 1, "groups": 16}),
    "1x1": (2, (4, 4), 24, 10, (1, 1), {}),
    "ResNet": (16, (8, 8), 64, 72, (3, 3), {"padding": 1}),
}


def random_like(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def unit(dtype: torch.dtype) -> float:
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def gradient_error(dtype: torch.dtype, positions: int) -> float:
    """Of an element of G_n over sum_t |b_t| |a_t|.

    As in tests/kernels, but a tensor core of a GPU rounds each of the k products that it adds at a time, and the sum,
    towards zero at the last bit of the largest: 2 (k + 1) u for a step, k = 16 of 16-bit types and 8 of tf32.
    """
    if dtype == torch.float64:
        return (positions + 1) * unit(dtype)
    if dtype == torch.float32 or positions == 1:  # diagonals at one position are sums of float32 products of squares
        return (8 + 6 * 2 * 9 + -(-positions // 16)) * unit(dtype)
    return -(-positions // 16) * 2 * 17 * unit(dtype)


def check_family(
    gradients: Tensor, magnitudes: Tensor, positions: int, directions: Tensor, calls: list[Callable[[], Tensor]]
) -> None:
    """Diagonal, projection and norm against G_n in float64 and sum_t |b_t| |a_t|, both [N, *weight]; run twice.

    Norms and projections are within the bound of one of their two ways (tests/kernels/fisher_reference.py).
    """
    results = [call() for call in calls]
    for call, result in zip(calls, results):
        assert torch.equal(call(), result)
        assert result.is_cuda
    dtype = directions.dtype
    error = gradient_error(dtype, positions) * magnitudes
    largest = gradients.abs() + error
    u = unit(dtype)
    samples = len(gradients)
    diagonal, projection, norm = (result.cpu().double() for result in results)
    squares = (2 * gradients.abs() + error) * error
    tolerance = (squares + (samples + 2) * u * largest**2).sum(0)
    assert ((diagonal - gradients.square().sum(0)).abs() <= 1.01 * tolerance).all()
    chain = (24 + 5 + 8 + 2 + 64) * u  # 64: tiles of a slot, at most, in these shapes
    rows, columns = gradients.shape[1], gradients[0, 0].numel()
    between = gradient_error(dtype, columns) + gradient_error(dtype, rows) + 35 * u
    by_tiles = (squares + chain * largest**2).flatten(1).sum(1)
    tolerance = torch.maximum(by_tiles, between * magnitudes.square().flatten(1).sum(1))
    assert ((norm - gradients.square().flatten(1).sum(1)).abs() <= 1.01 * tolerance).all()
    d = directions.to(torch.float64 if dtype == torch.float64 else torch.float32).double().flatten(1)
    moved = gradient_error(torch.float64 if dtype == torch.float64 else torch.float32, columns) + 35 * u
    by_tiles = (error + chain * largest).flatten(1) @ d.abs().mT
    tolerance = torch.maximum(by_tiles, moved * (magnitudes.flatten(1) @ d.abs().mT))
    assert ((projection - gradients.flatten(1) @ d.mT).abs() <= 1.01 * tolerance).all()


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    samples, positions, columns, rows = shape
    a = random_like(samples, positions, columns, dtype=dtype, seed=0)
    b = random_like(samples, positions, rows, dtype=dtype, seed=1)
    directions = random_like(7, rows, columns, dtype=dtype, seed=2)
    x, y, d = a.cuda(), b.cuda(), directions.cuda()
    check_family(
        b.double().mT @ a.double(),
        b.double().abs().mT @ a.double().abs(),
        positions,
        directions,
        [
            lambda: ops.linear_fisher_diagonal(x, y),
            lambda: ops.linear_fisher_projection(x, y, d),
            lambda: ops.linear_grad_norm(x, y),
        ],
    )


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv(case: str, channels_last: bool, dtype: torch.dtype) -> None:
    samples, size, channels, out_channels, kernel, window = CONVOLUTIONS[case]
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    a = random_like(samples, channels, *size, dtype=dtype, seed=0)
    groups = window.get("groups", 1)
    weight = torch.zeros(out_channels, channels // groups, *kernel, dtype=torch.float64, requires_grad=True)
    b = random_like(*conv(a.double(), weight, **window).shape, dtype=dtype, seed=1)
    directions = random_like(7, *weight.shape, dtype=dtype, seed=2)

    def gradients(inputs: Tensor, grads: Tensor) -> Tensor:
        each = [torch.autograd.grad(conv(i[None], weight, **window), weight, g[None])[0] for i, g in zip(inputs, grads)]
        return torch.stack(each)

    x, y, d = a.cuda(), b.cuda(), directions.cuda()
    if channels_last:
        x, y = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, y))
    spatial = {key: window.get(key, default) for key, default in {"stride": 1, "padding": 0, "dilation": 1}.items()}
    arguments = {**spatial, "groups": groups}
    check_family(
        gradients(a.double(), b.double()),
        gradients(a.double().abs(), b.double().abs()),
        b[0, 0].numel(),
        directions,
        [
            lambda: ops.conv_fisher_diagonal(x, y, kernel, **arguments),
            lambda: ops.conv_fisher_projection(x, y, d, kernel, **arguments),
            lambda: ops.conv_grad_norm(x, y, kernel, **arguments),
        ],
    )


@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 3, 2), (5, 4096, 10), (8, 300, 1000), (20, 33, 515), (70, 9, 130), (3, 7, 50257)], ids=str
)
def test_softmax_fisher_gram(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    logits = (3 * random_like(*shape[1:], dtype=torch.float64, seed=0)).to(dtype)
    tangents = random_like(*shape, dtype=dtype, seed=1) + 2
    z, t = logits.double(), tangents.double()
    p = z.softmax(1)
    y = t - (p * t).sum(2, keepdim=True)
    want = torch.einsum("nc,knc,lnc->kl", p, y, y)
    x, s = logits.cuda(), tangents.cuda()
    got = ops.softmax_fisher_gram(x, s)
    assert torch.equal(got, ops.softmax_fisher_gram(x, s))
    assert torch.equal(got, got.mT)
    # A probability: 8 u + |d| u, d the distance to the largest logit, and as much again for their sum.
    distance = z.amax(1, keepdim=True) - z
    error = (8 + distance + distance.amax(1, keepdim=True) + 4 * (-(-shape[2] // 32) + 6)) * unit(dtype)
    tolerance = torch.einsum("nc,knc,lnc->kl", p * error, y.abs(), y.abs())
    rounding = shape[1] * shape[2] * 2.0**-52 * torch.einsum("nc,knc,lnc->kl", p, t.abs(), t.abs())
    assert ((got.cpu() - want).abs() <= 1.01 * tolerance + rounding).all()


@GPU
def test_positions_that_cancel() -> None:
    """Only rounding is left of them: at most a few eps of a product (three TF32 products of it, added up), squared."""
    a = random_like(4, 1, 33, dtype=torch.float32, seed=0).cuda()
    b = random_like(4, 1, 40, dtype=torch.float32, seed=1).cuda()
    got = ops.linear_fisher_diagonal(a.expand(4, 2, 33), torch.cat([b, -b], 1))
    product = (b.mT @ a).double()
    assert (got <= (20 * torch.finfo(torch.float32).eps * product).square().sum(0)).all()


@GPU
def test_strides_and_streams() -> None:
    a = random_like(6, 20, 48, dtype=torch.float32, seed=0).cuda()
    b = random_like(6, 20, 33, dtype=torch.float32, seed=1).cuda()
    want = ops.linear_fisher_diagonal(a, b)
    turned = a.mT.contiguous().mT, b.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.linear_fisher_diagonal(*turned), want)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.linear_fisher_diagonal(a, b)
    stream.synchronize()
    assert torch.equal(got, want)


@GPU
def test_directions_need_not_be_stacked() -> None:
    """Parts of one tensor are taken where they are, others are put together: with the same result."""
    a, b, d = torch.randn(5, 7, 90).cuda(), torch.randn(5, 7, 70).cuda(), torch.randn(3, 70, 90).cuda()
    want = ops.linear_fisher_projection(a, b, d)
    for apart in (list(d), [x.clone() for x in d], [d[0], d[1].double(), d[2].T.contiguous().T]):
        assert torch.equal(ops.linear_fisher_projection(a, b, apart), want)
    assert torch.equal(ops.linear_fisher_projection(a, b, [d[2], d[0]]), want[:, [2, 0]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty(shape: tuple[int, int, int, int], device: str) -> None:
    samples, positions, columns, rows = shape
    a, b = torch.empty(samples, positions, columns, device=device), torch.empty(samples, positions, rows, device=device)
    d, z = torch.empty(2, rows, columns, device=device), torch.empty(samples, positions, device=device)
    results = [ops.linear_fisher_diagonal(a, b), ops.linear_fisher_projection(a, b, d), ops.linear_grad_norm(a, b)]
    if positions:  # a convolution has at least one
        x, g, w = a.mT, b.mT, d.unsqueeze(-1)
        results += [ops.conv_fisher_diagonal(x, g, (1,)), ops.conv_fisher_projection(x, g, w, (1,))]
        results += [ops.conv_grad_norm(x, g, (1,))]
    if not samples or not positions:
        results += [ops.softmax_fisher_gram(z, torch.empty(3, samples, positions, device=device))]
    for result in results:
        assert result.device.type == device
        assert (result == 0).all()


@GPU
def test_no_per_sample_gradient_in_memory() -> None:
    """The peak stays far below the [N, O, I] that is summed."""
    a, b = torch.randn(64, 64, 1024).cuda(), torch.randn(64, 64, 1024).cuda()
    ops.linear_fisher_diagonal(a, b)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_fisher_diagonal(a, b)
    assert torch.cuda.max_memory_allocated() - before < 64 * 1024 * 1024 * 4 / 4

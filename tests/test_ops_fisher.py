"""The Fisher ops against per-sample gradients formed in float64, with error bounds from the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fisher_operands import DTYPES, random, result_dtype
from torch import Tensor
from torch.nn import functional as F

from transferops import ops

# N, T, I, O: every remainder of the register tile (8 by up to 3 panels of 16 or 8), one position (closed forms), few
# and many (both routes of the projection and of the norm), more than one run of 512 positions, many samples, weights
# whose tasks take more than 128 rows.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 17),
    (3, 1, 17, 33),
    (5, 2, 33, 9),
    (4, 5, 65, 49),
    (2, 17, 49, 65),
    (33, 65, 2, 3),
    (3, 65, 49, 33),
    (2, 600, 50, 20),
    (2, 1030, 5, 70),
    (700, 3, 20, 130),
    (600, 1, 100, 30),
    (2, 9, 70, 300),
    (3, 75, 130, 150),
    (3, 1, 700, 1201),
    (2, 3, 700, 1201),
]
# samples, spatial, channels in and out, kernel, stride, padding, dilation, groups
CONVOLUTIONS: dict[str, tuple[int, tuple[int, ...], int, int, tuple[int, ...], Any, Any, Any, int]] = {
    "1d": (2, (7,), 3, 4, (3,), 1, 1, 1, 1),
    "2d": (3, (6, 5), 4, 6, (3, 3), 1, 1, 1, 1),
    "2d uneven": (2, (9, 8), 4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2),
    "3d": (2, (5, 6, 4), 3, 5, (2, 3, 1), (1, 2, 1), (0, 1, 0), (2, 1, 1), 1),
    "channels beyond a tile": (2, (8, 8), 20, 40, (3, 3), 1, 1, 1, 1),
    "channels that fill a panel": (2, (4, 4), 32, 16, (3, 3), 1, 1, 1, 1),
    "depthwise": (3, (8, 8), 16, 16, (3, 3), 1, 1, 1, 16),
    "depthwise 1d, long": (2, (5003,), 3, 6, (5,), 1, 2, 1, 3),
    "depthwise 2d, strided": (3, (9, 14), 4, 8, (3, 5), (2, 3), (1, 2), (3, 1), 4),
    "depthwise 3d, uneven": (2, (5, 6, 7), 3, 3, (2, 3, 1), (1, 2, 3), (1, 0, 0), (2, 1, 1), 3),
    "few channels to a group": (2, (7, 7), 8, 12, (3, 3), 2, 1, 1, 4),
    "1x1": (2, (4, 4), 24, 10, (1, 1), 1, 0, 1, 1),
    "1x1 strided, grouped": (2, (5, 4), 24, 10, (1, 1), 2, 0, 1, 2),
    "1x1 padded": (2, (3, 3), 5, 4, (1, 1), 1, 1, 1, 1),
    "one position": (3, (3, 3), 24, 10, (3, 3), 1, 0, 1, 1),
    "one padded position": (3, (1, 1), 6, 10, (3, 3), 1, 1, 1, 2),
    "few positions, many channels": (3, (2, 2), 70, 90, (3, 3), 1, 1, 1, 1),
    "many positions": (2, (30, 30), 3, 8, (5, 5), 1, 2, 1, 1),
    "stride beyond the kernel": (2, (7, 7), 3, 4, (2, 2), 3, 0, 1, 1),
}

LINEAR: dict[Callable[..., Tensor], Callable[[Tensor], tuple[Tensor, ...]]] = {
    ops.linear_fisher_diagonal: lambda d: (),
    ops.linear_fisher_projection: lambda d: (d,),
    ops.linear_grad_norm: lambda d: (),
}
CONV: dict[Callable[..., Tensor], Callable[[Tensor], tuple[Tensor, ...]]] = {
    ops.conv_fisher_diagonal: lambda d: (),
    ops.conv_fisher_projection: lambda d: (d,),
    ops.conv_grad_norm: lambda d: (),
}


def linear_gradients(inputs: Tensor, grads: Tensor) -> Tensor:
    return torch.einsum("nto,nti->noi", grads.double(), inputs.double())


def conv_gradients(inputs: Tensor, grads: Tensor, kernel: tuple[int, ...], *window: Any) -> Tensor:
    """Per-sample gradients by autograd, one sample at a time: [N, C_out, C_in / groups, *kernel]."""
    conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[inputs.dim() - 3]
    weight = torch.zeros(grads.shape[1], inputs.shape[1] // window[-1], *kernel, dtype=torch.float64)
    weight.requires_grad_()
    rows = []
    for x, b in zip(inputs.double(), grads.double()):
        output = conv(x.unsqueeze(0), weight, None, *window)
        rows.append(torch.autograd.grad(output, weight, b.unsqueeze(0))[0])
    return torch.stack(rows)


def check_all(inputs: Tensor, grads: Tensor, positions: int, gradients: Callable[..., Tensor], *window: Any) -> None:
    """All three ops on one layer.

    With M_n = sum_t |b_nt| |a_nt|^T >= |G_n|: a sum of T products is within T eps M_n, so its square, and sums of
    squares, within (2 T + number of terms) eps sum M_n^2. A projection adds to that of T products a short sum in a
    tile, or sums I and O products in turn, and the rounding of the direction. So does the norm, either way.
    """
    kind = "conv" if window else "linear"
    g, m = gradients(inputs, grads, *window), gradients(inputs.abs(), grads.abs(), *window)
    samples, dtype = len(g), result_dtype(inputs.dtype)
    eps = torch.finfo(dtype).eps
    rows, columns = g.shape[1], g[0, 0].numel()

    got = getattr(ops, f"{kind}_fisher_diagonal")(inputs, grads, *window)
    assert got.dtype == dtype
    assert got.shape == g.shape[1:]
    assert ((got - g.square().sum(0)).abs() <= (2 * positions + samples + 8) * eps * m.square().sum(0)).all()

    for count in (0, 1, 3):
        directions = random(count, *g.shape[1:], dtype=torch.float64)
        got = getattr(ops, f"{kind}_fisher_projection")(inputs, grads, directions, *window)
        assert got.dtype == dtype
        assert got.shape == (samples, count)
        want, magnitude = g.flatten(1) @ directions.flatten(1).T, m.flatten(1) @ directions.flatten(1).abs().T
        assert ((got - want).abs() <= (positions + rows + columns + 32) * eps * magnitude).all()

    got = getattr(ops, f"{kind}_grad_norm")(inputs, grads, *window)
    assert got.dtype == dtype
    assert got.shape == (samples,)
    bound = (2 * positions + rows + columns + 32) * eps * m.square().flatten(1).sum(1)
    assert ((got - g.square().flatten(1).sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("samples", "positions", "inputs", "outputs"), SHAPES)
def test_linear_matches_reference(samples: int, positions: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    a, b = random(samples, positions, inputs, dtype=dtype), random(samples, positions, outputs, dtype=dtype)
    check_all(a, b, positions, linear_gradients)


@pytest.mark.parametrize("positions", [1, 2, 3, 5, 17, 33, 49, 65])
@pytest.mark.parametrize("inputs", [1, 2, 3, 5, 17, 33, 49, 65])
@pytest.mark.parametrize("outputs", [1, 2, 3, 5, 17, 33, 49, 65])
def test_linear_of_every_remainder(inputs: int, outputs: int, positions: int) -> None:
    check_all(random(3, positions, inputs), random(3, positions, outputs), positions, linear_gradients)


def convolution(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Inputs, gradients at the outputs and the window of a named case."""
    samples, spatial, channels, outputs, kernel, stride, padding, dilation, groups = CONVOLUTIONS[case]
    conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(spatial) - 1]
    window = (stride, padding, dilation, groups)
    weight = torch.empty(outputs, channels // groups, *kernel, device="meta")
    size = conv(torch.empty(1, channels, *spatial, device="meta"), weight, None, *window).shape[2:]
    grads = random(samples, outputs, *size, dtype=dtype)
    return random(samples, channels, *spatial, dtype=dtype), grads, (kernel, *window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_matches_reference(case: str, dtype: torch.dtype) -> None:
    inputs, grads, window = convolution(case, dtype)
    check_all(inputs, grads, grads[0, 0].numel(), conv_gradients, *window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_positions_is_one_position(dtype: torch.dtype) -> None:
    a, b, d = random(37, 50, dtype=dtype), random(37, 19, dtype=dtype), random(2, 19, 50)
    for op, rest in LINEAR.items():
        assert torch.equal(op(a, b, *rest(d)), op(a.unsqueeze(1), b.unsqueeze(1), *rest(d)))


@pytest.mark.parametrize("positions", [1, 2, 20, 600])
def test_strides_do_not_matter(positions: int) -> None:
    wide_a, wide_b = random(6, positions, 40), random(6, positions, 60)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[..., ::2],
        lambda x: x[::3],
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.flip(1),
        lambda x: x[:, :1].expand(-1, positions, -1),
        lambda x: x[..., :1].expand(-1, -1, 20),
    ]
    for view in views:
        a, b = view(wide_a), view(wide_b)
        d = random(2, a.shape[-1], b.shape[-1]).mT
        for op, rest in LINEAR.items():
            assert torch.equal(op(a, b, *rest(d)), op(a.contiguous(), b.contiguous(), *rest(d.contiguous())))


@pytest.mark.parametrize(
    "case", ["2d", "2d uneven", "3d", "1x1", "one position", "channels beyond a tile", "depthwise"]
)
def test_memory_format_does_not_matter(case: str) -> None:
    a, b, window = convolution(case)
    d = random(2, b.shape[1], a.shape[1] // window[-1], *window[0])
    for op, rest in CONV.items():
        want = op(a, b, *rest(d), *window)
        for view in (lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1), lambda x: x.mT.contiguous().mT):
            assert torch.equal(op(view(a), view(b), *rest(d), *window), want)


@pytest.mark.parametrize("positions", [1, 3, 70])
def test_directions_need_not_be_stacked(positions: int) -> None:
    """A list of them, wherever and however they lie, is their stack."""
    a, b, d = random(5, positions, 9), random(5, positions, 20), random(3, 20, 9)
    apart = [d[0].clone(), d[1].T.contiguous().T, d[2].double()]
    assert torch.equal(ops.linear_fisher_projection(a, b, apart), ops.linear_fisher_projection(a, b, d))
    for groups in (1, 4):  # four of one channel each do not go by tiles
        x, g, w = random(3, 4, 6, 6), random(3, 8, 6, 6), random(2, 8, 4 // groups, 3, 3)
        window: dict[str, Any] = {"kernel_size": [3, 3], "padding": 1, "groups": groups}
        apart = [w[1].clone(), w[0].to(memory_format=torch.channels_last)]
        assert torch.equal(
            ops.conv_fisher_projection(x, g, apart, **window), ops.conv_fisher_projection(x, g, w.flip(0), **window)
        )
    assert ops.linear_fisher_projection(a, b, []).shape == (5, 0)


def test_convolution_of_one_by_one_is_linear() -> None:
    a, b, d = random(4, 30, 9), random(4, 20, 9), random(2, 20, 30)
    assert torch.equal(ops.conv_fisher_diagonal(a, b, [1])[..., 0], ops.linear_fisher_diagonal(a.mT, b.mT))
    assert torch.equal(
        ops.conv_fisher_projection(a, b, d.unsqueeze(-1), [1]), ops.linear_fisher_projection(a.mT, b.mT, d)
    )
    assert torch.equal(ops.conv_grad_norm(a, b, [1]), ops.linear_grad_norm(a.mT, b.mT))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cancelling_positions_give_zero(dtype: torch.dtype) -> None:
    """b_2 = -b_1 at equal inputs. Small integers, so that products are exact: what is left is exactly 0."""
    a, b = random(5, 1, 60).mul(100).round().to(dtype), random(5, 1, 70).mul(100).round().to(dtype)
    a, b = torch.cat([a, a], 1), torch.cat([b, -b], 1)
    d = random(2, 70, 60)
    for op, rest in LINEAR.items():
        assert (op(a, b, *rest(d)) == 0).all()
    image, grads = a.mT.unsqueeze(2), b.mT.unsqueeze(2)
    for op, rest in CONV.items():
        assert (op(image, grads, *rest(d[..., None, None]), [1, 1]) == 0).all()


def test_cancelling_positions_of_any_size() -> None:
    """Fused multiply-adds leave the rounding of one product."""
    a, b = random(5, 1, 60), random(5, 1, 70)
    got = ops.linear_fisher_diagonal(torch.cat([a, a], 1), torch.cat([b, -b], 1))
    product = (b.mT @ a).double()
    assert (got <= 1.01 * (torch.finfo(torch.float32).eps / 2 * product).square().sum(0)).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0), (0, 0, 0, 0)])
def test_empty_input_gives_zeros(shape: tuple[int, int, int, int]) -> None:
    samples, positions, inputs, outputs = shape
    a, b, d = (
        torch.ones(samples, positions, inputs),
        torch.ones(samples, positions, outputs),
        torch.ones(2, outputs, inputs),
    )
    diagonal, norm = ops.linear_fisher_diagonal(a, b), ops.linear_grad_norm(a, b)
    projection = ops.linear_fisher_projection(a, b, d)
    assert diagonal.shape == (outputs, inputs)
    assert norm.shape == (samples,)
    assert projection.shape == (samples, 2)
    for tensor in (diagonal, norm, projection):
        assert (tensor == 0).all()


def test_empty_convolution_gives_zeros() -> None:
    assert ops.conv_fisher_diagonal(torch.ones(0, 3, 5), torch.ones(0, 2, 3), [3]).sum() == 0
    assert ops.conv_fisher_diagonal(torch.ones(2, 3, 2), torch.ones(2, 4, 0), [3]).sum() == 0
    assert ops.conv_grad_norm(torch.ones(2, 0, 5), torch.ones(2, 4, 3), [3]).tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("positions", [1, 3, 40])
def test_non_finite_inputs_show(value: float, positions: int) -> None:
    a, b, d = random(3, positions, 20), random(3, positions, 30), random(2, 30, 20)
    a[1, 0, 7] = value
    assert not ops.linear_fisher_diagonal(a, b)[:, 7].isfinite().any()
    assert ops.linear_grad_norm(a, b).isfinite().tolist() == [True, False, True]
    assert ops.linear_fisher_projection(a, b, d).isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("groups", [1, 4])
def test_pixels_that_no_window_reads_have_no_part(groups: int) -> None:
    """The middle one of three, and the last one behind the last stride."""
    a, b, d = random(2, 4, 3, 6), random(2, 4, 1, 2), random(3, 4, 4 // groups, 2, 2)
    window: dict[str, Any] = {"kernel_size": (2, 2), "stride": (1, 3), "dilation": (2, 1), "groups": groups}
    expected = ops.conv_fisher_diagonal(a, b, **window)
    a[:, :, 1], a[..., 2], a[..., 5] = torch.nan, torch.nan, torch.inf
    assert torch.equal(ops.conv_fisher_diagonal(a, b, **window), expected)
    torch.testing.assert_close(ops.conv_grad_norm(a, b, **window).sum(), expected.sum())
    assert ops.conv_fisher_projection(a, b, d, **window).isfinite().all()


def test_result_does_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rows = []
            for samples, positions, inputs, outputs in [
                (9, 70, 130, 300),
                (300, 1, 90, 70),
                (3, 1200, 60, 150),
                (50, 2, 40, 200),
            ]:
                a, b = random(samples, positions, inputs), random(samples, positions, outputs)
                rows += [op(a, b, *rest(random(3, outputs, inputs))) for op, rest in LINEAR.items()]
            for case in (
                "channels beyond a tile",
                "depthwise",
                "few channels to a group",
                "many positions",
                "few positions, many channels",
            ):
                a, b, window = convolution(case)
                d = random(2, b.shape[1], a.shape[1] // window[-1], *window[0])
                rows += [op(a, b, *rest(d), *window) for op, rest in CONV.items()]
            rows.append(ops.softmax_fisher_gram(random(300, 70), random(5, 300, 70)))
            results.append(rows)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))

"""The Fisher ops against per-sample gradients formed in float64, with error bounds from the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from transferops import _C, ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# N, T, I, O: every remainder of the register tile (8 by up to 3 panels of 16 or 8), one position (closed forms), few
# and many (both routes of the projection and of the norm), more than one run of 512 positions, many samples.
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
    (600, 1, 20, 30),
    (2, 9, 70, 300),
    (3, 75, 130, 150),
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


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for the same shape; generated in float64 for every dtype."""
    generator = torch.Generator().manual_seed(sum((i + 1) * size for i, size in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def gram_reference(logits: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix in float64, and the sum of absolute products, centred and not."""
    z, t = logits.double(), tangents.double()
    p = z.softmax(-1)
    centred = t - torch.einsum("nc,knc->kn", p, t).unsqueeze(-1)
    spread = t - t[..., :1]
    spread = spread.abs() + torch.einsum("nc,knc->kn", p, spread.abs()).unsqueeze(-1)
    gram = torch.einsum("nc,knc,lnc->kl", p, centred, centred)
    return gram, torch.einsum("nc,knc,lnc->kl", p, spread, spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("directions", [0, 1, 2, 3, 5, 7, 8, 13])
@pytest.mark.parametrize(
    ("samples", "classes"), [(1, 1), (5, 2), (3, 15), (3, 17), (70, 33), (3, 1024), (2, 1025), (3, 3000)]
)
def test_gram_matches_reference(samples: int, classes: int, directions: int, dtype: torch.dtype) -> None:
    """Roundings: of the differences and their mean, 3 each; of p, the size of the logits and those of exp and of the
    division; of at most 64 products summed in a lane, and of the products; all relative to sum p |T - T_0| |T' - T'_0|.
    In float64 the sums over all classes and samples count too, there and in the reference."""
    z, t = 3 * random(samples, classes, dtype=dtype), random(directions, samples, classes, dtype=dtype)
    got = ops.softmax_fisher_gram(z, t)
    want, magnitude = gram_reference(z, t)
    assert got.dtype == torch.float64
    assert got.shape == (directions, directions)
    assert torch.equal(got, got.mT)
    spread = float((z.amax(-1) - z.amin(-1)).max())
    terms = 64 if dtype != torch.float64 else 2 * samples * classes
    eps = torch.finfo(result_dtype(dtype)).eps
    assert ((got - want).abs() <= (terms + 20 + 2 * spread) * eps * magnitude).all()


def test_gram_of_tangents_shifted_in_common() -> None:
    """A shift of all of a sample's tangents counts for nothing: 0 if that is all, and no digits beyond their own."""
    z, t = random(6, 1500), random(3, 6, 1500)
    assert (ops.softmax_fisher_gram(z, torch.full((2, 6, 1500), 1e6)) == 0).all()
    moved = t + 1e4
    got, want = ops.softmax_fisher_gram(z, moved), gram_reference(z, moved)[0]
    assert (got - want).abs().max() <= 1e-5 * want.diagonal().max()


def test_gram_with_one_heavy_first_class() -> None:
    """An outlier without weight takes no digits from the rest."""
    z, t = random(4, 5000, dtype=torch.float64), random(2, 4, 5000, dtype=torch.float64)
    t[..., 0] = 1e8
    z[:, 0] = -60
    got, (want, _) = ops.softmax_fisher_gram(z, t), gram_reference(z, t)
    # Centring rounds at eps times the outlier.
    assert (got - want).abs().max() <= 5000 * torch.finfo(torch.float64).eps * 1e8 * t[..., 1:].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gram_with_an_outlier_at_the_likeliest_class(dtype: torch.dtype) -> None:
    """The point of reference lies far from the mean: about it the second moment is 5000 times the variance."""
    z, t = 0.01 * random(6, 5000, dtype=dtype), random(3, 6, 5000, dtype=dtype)
    for n in range(6):
        t[:, n, z[n].argmax()] = 1e6
    got, (want, _) = ops.softmax_fisher_gram(z, t), gram_reference(z, t)
    assert ((got - want).abs() <= 100 * torch.finfo(dtype).eps * want.diagonal().max()).all()


def test_gram_of_extreme_logits() -> None:
    """Probabilities that underflow, one class with all the mass, and masked classes."""
    z, t = torch.tensor([[0.0, -200, -1e30], [5.0, -float("inf"), 5.0]]), random(2, 2, 3)
    want, magnitude = gram_reference(z, t)
    assert ((ops.softmax_fisher_gram(z, t) - want).abs() <= 1e-5 * magnitude).all()
    assert ops.softmax_fisher_gram(torch.full((1, 3), float("nan")), random(1, 1, 3)).isnan().all()
    assert ops.softmax_fisher_gram(torch.full((1, 3), -float("inf")), random(1, 1, 3)).isnan().all()
    bad = random(2, 4, 3)
    bad[1, 2, 2] = float("nan")
    assert ops.softmax_fisher_gram(random(4, 3), bad).isnan().tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 86), (torch.float64, 707)], ids=str)
def test_gram_probabilities_are_those_of_softmax(dtype: torch.dtype, largest: int) -> None:
    """Two classes and one direction per sample, tangents (0, 1): p (1 - p) for every exponent short of underflow."""
    for gap in torch.linspace(0, largest, 3000, dtype=dtype).split(100):
        z = torch.stack([torch.zeros_like(gap), -gap], -1)
        t = torch.stack([torch.zeros(100, 100), torch.eye(100)], -1).to(dtype)
        odds = gap.double().neg().exp()
        exact = odds / (1 + odds).square()
        assert ((ops.softmax_fisher_gram(z, t).diagonal() - exact).abs() <= 8 * torch.finfo(dtype).eps * exact).all()


def test_gram_strides_and_dtypes_do_not_matter() -> None:
    z, t = random(8, 50), random(4, 8, 50)
    for view in (lambda x: x[..., ::2], lambda x: x.mT.contiguous().mT, lambda x: x.flip(-1)):
        want = ops.softmax_fisher_gram(view(z).contiguous(), view(t).contiguous())
        assert torch.equal(ops.softmax_fisher_gram(view(z), view(t)), want)
    assert torch.equal(ops.softmax_fisher_gram(z, t.half()), ops.softmax_fisher_gram(z, t.half().float()))
    assert torch.equal(ops.softmax_fisher_gram(z[:1].expand(8, 50), t), ops.softmax_fisher_gram(z[:1].repeat(8, 1), t))


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """One call of each op."""
    a, b, d = (random(*shape, dtype=dtype) for shape in [(4, 3, 5), (4, 3, 2), (2, 2, 5)])
    x, g, w = (random(*shape, dtype=dtype) for shape in [(3, 4, 6, 5), (3, 6, 3, 3), (2, 6, 2, 3, 3)])
    window = ([3, 3], [2, 1], [1, 0], [1, 1], 2)
    return {
        "linear_fisher_diagonal": (a, b),
        "linear_fisher_projection": (a, b, d),
        "linear_grad_norm": (a, b),
        "conv_fisher_diagonal": (x, g, *window),
        "conv_fisher_projection": (x, g, w, *window),
        "conv_grad_norm": (x, g, *window),
        "softmax_fisher_gram": (random(5, 7, dtype=dtype), random(3, 5, 7, dtype=dtype)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", arguments(torch.float32))
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(torch.ops.transferops, name), arguments(dtype)[name])


@pytest.mark.parametrize("name", arguments(torch.float32))
def test_backward_raises(name: str) -> None:
    first, *rest = arguments(torch.float32)[name]
    result = getattr(ops, name)(first.requires_grad_(), *rest)
    message = f"^{name}: expected no backward pass, got one: this op has no derivative$"
    with pytest.raises(RuntimeError, match=message):
        result.sum().backward()


@pytest.mark.parametrize("name", arguments(torch.float32))
def test_compiles_without_graph_break(name: str) -> None:
    op = getattr(ops, name)
    call = arguments(torch.float32)[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: op(*x) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*call), op(*call) * 2)
    if "projection" not in name and "gram" not in name:  # another number of samples
        fewer = (call[0][:2], call[1][:2], *call[2:])
        assert torch.equal(compiled(*fewer), op(*fewer) * 2)


def test_numpy_arrays_are_taken() -> None:
    a, b = random(4, 3, 5), random(4, 3, 2)
    assert torch.equal(ops.linear_fisher_diagonal(a.numpy(), b.numpy()[::-1]), ops.linear_fisher_diagonal(a, b.flip(0)))
    z, t = random(5, 7), random(3, 5, 7)
    assert torch.equal(ops.softmax_fisher_gram(np.asarray(z), np.asarray(t)), ops.softmax_fisher_gram(z, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_face_runs_the_same_kernels(dtype: torch.dtype) -> None:
    x, g, w, kernel, stride, padding, dilation, groups = arguments(dtype)["conv_fisher_projection"]
    w = w.to(result_dtype(dtype))
    window = [[1, *size] for size in (kernel, stride)] + [[0, *padding], [1, *dilation]]
    face = [(t.view(torch.uint16) if dtype == torch.bfloat16 else t).numpy() for t in (x.unsqueeze(2), g.unsqueeze(2))]
    diagonal, projection, norm = (np.full(shape, np.nan, w.numpy().dtype) for shape in (w.shape[1:], (3, 2), 3))
    _C.fisher_diagonal(*face, window, groups, diagonal)
    _C.fisher_projection(*face, w.numpy(), window, groups, projection)
    _C.grad_norm(*face, window, groups, norm)
    rest = (kernel, stride, padding, dilation, groups)
    assert (diagonal == ops.conv_fisher_diagonal(x, g, *rest).numpy()).all()
    assert (projection == ops.conv_fisher_projection(x, g, w, *rest).numpy()).all()
    assert (norm == ops.conv_grad_norm(x, g, *rest).numpy()).all()

    z, t = arguments(dtype)["softmax_fisher_gram"]
    face = [(x.view(torch.uint16) if dtype == torch.bfloat16 else x).numpy() for x in (z, t)]
    gram = np.full((3, 3), np.nan)
    _C.softmax_fisher_gram(*face, gram)
    assert (gram == ops.softmax_fisher_gram(z, t).numpy()).all()


def test_numpy_face_refuses_wrong_buffers() -> None:
    x, g = np.zeros((2, 4, 1, 6, 6), np.float32), np.zeros((2, 6, 1, 4, 4), np.float32)
    window = [[1, 3, 3], [1, 1, 1], [0, 0, 0], [1, 1, 1]]
    out = np.zeros((6, 4, 3, 3), np.float32)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x[:, :, 0], g, window, 1, out), r"inputs: expected 5 dimensions \[N, C, depth, height, width\]"),
        ((x, g.astype(np.float64), window, 1, out), "grad_outputs: expected the dtype of inputs"),
        ((x, g[:1], window, 1, out), "grad_outputs: expected the samples of inputs"),
        ((x, g, window, 3, out), "groups: expected a divisor of the channels"),
        ((x, g[..., :3], window, 1, out), "grad_outputs: expected the size of the convolution's output"),
        ((x, g, [[1, 3, 3], [1, 0, 1], [0, 0, 0], [1, 1, 1]], 1, out), "window: expected kernel, stride and dilation"),
        ((x, g, window, 1, out.astype(np.float64)), "out: expected a contiguous array of float32"),
        ((x, g, window, 1, out[:, ::2]), "out: expected a contiguous array of float32"),
        ((x, g, window, 1, out[:2]), "out: expected as many elements as the weight"),
        ((x.astype(np.int32), g, window, 1, out), "inputs: expected float32, float64, float16, or bfloat16 as uint16"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            _C.fisher_diagonal(*call)
    with pytest.raises(ValueError, match=r"tangents: expected shape \[K, N, C\] for logits \[N, C\]"):
        _C.softmax_fisher_gram(np.zeros((5, 7)), np.zeros((3, 4, 7)), np.zeros((3, 3)))


A, B, D = torch.zeros(4, 3, 5), torch.zeros(4, 3, 2), torch.zeros(1, 2, 5)
X, G = torch.zeros(2, 4, 6, 6), torch.zeros(2, 6, 4, 4)
Z, T = torch.zeros(5, 7), torch.zeros(3, 5, 7)
META = torch.empty(4, 3, 2, device="meta")
FLOATING = "expected float32, float64, float16 or bfloat16"

BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "inputs list": (
        lambda: ops.linear_grad_norm([1.0], B),
        TypeError,
        "inputs: expected a torch.Tensor, NumPy array or DLPack array, got list",
    ),
    "inputs int": (
        lambda: ops.linear_fisher_diagonal(A.int(), B),
        TypeError,
        f"inputs: {FLOATING}, got a int32 tensor of shape [4, 3, 5] on cpu",
    ),
    "inputs 4-d": (
        lambda: ops.linear_fisher_diagonal(X, X),
        ValueError,
        "inputs: expected shape [N, T, I] or [N, I], got a float32 tensor of shape [2, 4, 6, 6] on cpu",
    ),
    "grad_outputs complex": (
        lambda: ops.linear_grad_norm(A, B.to(torch.complex64)),
        TypeError,
        f"grad_outputs: {FLOATING}, got a complex64 tensor of shape [4, 3, 2] on cpu",
    ),
    "grad_outputs of another dtype": (
        lambda: ops.linear_grad_norm(A, B.half()),
        TypeError,
        "grad_outputs: expected the dtype of inputs, float32, got a float16 tensor of shape [4, 3, 2] on cpu",
    ),
    "grad_outputs on another device": (
        lambda: ops.linear_grad_norm(A, META),
        ValueError,
        "grad_outputs: expected the device of inputs, cpu, got meta",
    ),
    "grad_outputs of other samples": (
        lambda: ops.linear_grad_norm(A, B[:2]),
        ValueError,
        "grad_outputs: expected shape [4, 3, O], as the inputs, got a float32 tensor of shape [2, 3, 2] on cpu",
    ),
    "grad_outputs of other dimensions": (
        lambda: ops.linear_fisher_diagonal(A, B[:, 0]),
        ValueError,
        "grad_outputs: expected shape [4, 3, O], as the inputs, got a float32 tensor of shape [4, 2] on cpu",
    ),
    "directions transposed": (
        lambda: ops.linear_fisher_projection(A, B, D.mT),
        ValueError,
        "directions: expected shape [K, 2, 5], K of the weight's, got a float32 tensor of shape [1, 5, 2] on cpu",
    ),
    "direction alone": (
        lambda: ops.linear_fisher_projection(A, B, D[0]),
        ValueError,
        "directions: expected shape [K, 2, 5], K of the weight's, got a float32 tensor of shape [2, 5] on cpu",
    ),
    "directions int": (
        lambda: ops.linear_fisher_projection(A, B, D.long()),
        TypeError,
        f"directions: {FLOATING}, got a int64 tensor of shape [1, 2, 5] on cpu",
    ),
    "directions on another device": (
        lambda: ops.linear_fisher_projection(A, B, D.to("meta")),
        ValueError,
        "directions: expected the device of inputs, cpu, got meta",
    ),
    "conv without positions": (
        lambda: ops.conv_grad_norm(Z, Z, [3]),
        ValueError,
        "inputs: expected shape [N, C, *spatial] with 1 to 3 spatial dimensions, got a float32 tensor of shape [5, 7] "
        "on cpu",
    ),
    "kernel of another dimension": (
        lambda: ops.conv_grad_norm(X, G, [3]),
        ValueError,
        "kernel_size: expected 2 integers of at least 1, or one for all, got [3]",
    ),
    "kernel of floats": (
        lambda: ops.conv_grad_norm(X, G, [3, 3.0]),  # type: ignore[list-item]
        ValueError,
        "kernel_size: expected 2 integers of at least 1, or one for all, got [3, 3.0]",
    ),
    "stride 0": (
        lambda: ops.conv_grad_norm(X, G, [3, 3], 0),
        ValueError,
        "stride: expected 2 integers of at least 1, or one for all, got 0",
    ),
    "padding by name": (
        lambda: ops.conv_grad_norm(X, G, [3, 3], 1, "same"),  # type: ignore[arg-type]
        ValueError,
        "padding: expected 2 integers of at least 0, or one for all, got 'same'",
    ),
    "dilation negative": (
        lambda: ops.conv_grad_norm(X, G, [3, 3], 1, 0, [1, -1]),
        ValueError,
        "dilation: expected 2 integers of at least 1, or one for all, got [1, -1]",
    ),
    "groups": (
        lambda: ops.conv_fisher_diagonal(X, G, [3, 3], groups=3),
        ValueError,
        "groups: expected a divisor of the channels, 4 and 6, got 3",
    ),
    "grad_outputs of another convolution": (
        lambda: ops.conv_fisher_diagonal(X, G, [3, 3], padding=1),
        ValueError,
        "grad_outputs: expected shape [2, C_out, 6, 6], that of the convolution's output, got a float32 tensor of "
        "shape [2, 6, 4, 4] on cpu",
    ),
    "grad_outputs with fewer dimensions": (
        lambda: ops.conv_fisher_diagonal(X, G[0], [3, 3]),
        ValueError,
        "grad_outputs: expected 4 dimensions, as the inputs, got a float32 tensor of shape [6, 4, 4] on cpu",
    ),
    "conv directions": (
        lambda: ops.conv_fisher_projection(X, G, torch.zeros(2, 6, 4, 3), [3, 3]),
        ValueError,
        "directions: expected shape [K, 6, 4, 3, 3], K of the weight's, got a float32 tensor of shape [2, 6, 4, 3] "
        "on cpu",
    ),
    "logits 3-d": (
        lambda: ops.softmax_fisher_gram(T, T),
        ValueError,
        "logits: expected shape [N, C], got a float32 tensor of shape [3, 5, 7] on cpu",
    ),
    "tangents of other classes": (
        lambda: ops.softmax_fisher_gram(Z, T[..., 1:]),
        ValueError,
        "tangents: expected shape [K, 5, 7] on cpu, as the logits, got a float32 tensor of shape [3, 5, 6] on cpu",
    ),
    "tangents int": (
        lambda: ops.softmax_fisher_gram(Z, T.int()),
        TypeError,
        f"tangents: {FLOATING}, got a int32 tensor of shape [3, 5, 7] on cpu",
    ),
    # What C++ callers and torch.ops see.
    "op: shapes": (
        lambda: torch.ops.transferops.linear_grad_norm(A, B[:2]),
        RuntimeError,
        "grad_outputs: expected the shape of inputs but for the last dimension, [4, 3, 5], got [2, 3, 2]",
    ),
    "op: dtypes": (
        lambda: torch.ops.transferops.linear_grad_norm(A, B.half()),
        RuntimeError,
        "grad_outputs: expected the dtype of inputs, got another",
    ),
    "op: directions": (
        lambda: torch.ops.transferops.linear_fisher_projection(A, B, D.mT),
        RuntimeError,
        "directions: expected shape [K, 2, 5], got [1, 5, 2]",
    ),
    "op: convolution": (
        lambda: torch.ops.transferops.conv_grad_norm(X, G, [3, 3], [1, 1], [1, 1], [1, 1], 1),
        RuntimeError,
        "grad_outputs: expected the spatial size of the convolution's output, got shape [2, 6, 4, 4]",
    ),
    "op: groups": (
        lambda: torch.ops.transferops.conv_grad_norm(X, G, [3, 3], [1, 1], [0, 0], [1, 1], 3),
        RuntimeError,
        "groups: expected a divisor of 4 and 6 channels, got 3",
    ),
    "op: stride": (
        lambda: torch.ops.transferops.conv_grad_norm(X, G, [3, 3], [0, 1], [0, 0], [1, 1], 1),
        RuntimeError,
        "stride: expected integers of at least 1, got 0",
    ),
    "op: kernel": (
        lambda: torch.ops.transferops.conv_grad_norm(X, G, [3], [1, 1], [0, 0], [1, 1], 1),
        RuntimeError,
        "kernel_size: expected 2 integers, got 1",
    ),
    "op: tangents": (
        lambda: torch.ops.transferops.softmax_fisher_gram(Z, T[:, 1:]),
        RuntimeError,
        "tangents: expected shape [K, 5, 7], got [3, 4, 7]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_call_is_refused_with_its_message(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).split("\n")[0] == message

"""The Fisher ops against the plain PyTorch that they replace: per-sample gradients formed by batched products and then
reduced, the directions applied to the inputs, or the Gram matrices between positions.

Floor: the operations of the per-sample gradients (of the cheaper form, for the norm and at one position) at this
machine's measured float32 matrix-product rate; below 1 means that the op runs faster than that product. For
softmax_fisher_gram, the time that summing the tangents takes, which reads them once; docs/guides/fisher.md tells why
the op takes longer than that.
"""

from __future__ import annotations

import pytest
import torch
from harness import compare, sgemm_rate
from torch import Tensor
from torch.nn import functional as F

from transferops import ops


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


LINEAR = [(32, 64, 512, 512), (64, 197, 768, 768), (256, 8, 512, 512), (256, 1, 1024, 1024)]


@pytest.mark.parametrize(("samples", "positions", "inputs", "outputs"), LINEAR)
def test_linear_fisher_diagonal(benchmark: object, samples: int, positions: int, inputs: int, outputs: int) -> None:
    a, b = random(samples, positions, inputs), random(samples, positions, outputs)
    peers = {"(bmm**2).sum(0)": lambda: torch.bmm(b.mT, a).square_().sum(0)}
    if positions == 1:
        peers = {"product of squares": lambda: b[:, 0].square().T @ a[:, 0].square()}
    want = sum(torch.mm(y.T.double(), x.double()).square() for x, y in zip(a, b))
    compare(
        benchmark,
        lambda: ops.linear_fisher_diagonal(a, b),
        peers,
        floor=2 * samples * positions * inputs * outputs / sgemm_rate(),
        sizes={"N": samples, "T": positions, "I": inputs, "O": outputs},
        values={"relative error to float64": relative_error(ops.linear_fisher_diagonal(a, b), want)},
    )


@pytest.mark.parametrize("directions", [1, 5])
@pytest.mark.parametrize(("samples", "positions", "inputs", "outputs"), LINEAR)
def test_linear_fisher_projection(
    benchmark: object, samples: int, positions: int, inputs: int, outputs: int, directions: int
) -> None:
    a, b, d = (
        random(samples, positions, inputs),
        random(samples, positions, outputs),
        random(directions, outputs, inputs),
    )
    peers = {
        "contraction": lambda: torch.stack([((a @ dk.T) * b).sum((1, 2)) for dk in d], 1),
        "bmm, then mm": lambda: torch.bmm(b.mT, a).flatten(1) @ d.flatten(1).T,
    }
    want = torch.stack([((a.double() @ dk.T.double()) * b).sum((1, 2)) for dk in d], 1)
    compare(
        benchmark,
        lambda: ops.linear_fisher_projection(a, b, d),
        peers,
        floor=2 * samples * min(positions + directions, positions * directions) * inputs * outputs / sgemm_rate(),
        sizes={"N": samples, "T": positions, "I": inputs, "O": outputs, "K": directions},
        values={"relative error to float64": relative_error(ops.linear_fisher_projection(a, b, d), want)},
    )


@pytest.mark.parametrize(("samples", "positions", "inputs", "outputs"), [*LINEAR[:3], (16, 1024, 256, 256)])
def test_linear_grad_norm(benchmark: object, samples: int, positions: int, inputs: int, outputs: int) -> None:
    a, b = random(samples, positions, inputs), random(samples, positions, outputs)
    peers = {
        "ghost": lambda: ((a @ a.mT) * (b @ b.mT)).sum((1, 2)),
        "bmm": lambda: torch.bmm(b.mT, a).square_().flatten(1).sum(1),
    }
    work = min(positions * (inputs + outputs), 2 * inputs * outputs)
    want = torch.stack([torch.mm(y.T.double(), x.double()).square().sum() for x, y in zip(a, b)])
    compare(
        benchmark,
        lambda: ops.linear_grad_norm(a, b),
        peers,
        floor=samples * positions * work / sgemm_rate(),
        sizes={"N": samples, "T": positions, "I": inputs, "O": outputs},
        values={"relative error to float64": relative_error(ops.linear_grad_norm(a, b), want)},
    )


# samples, channels in and out, size of the image, kernel, stride, groups
CONV = [
    (64, 256, 256, 8, 3, 1, 1),
    (64, 64, 64, 32, 3, 1, 1),
    (64, 64, 128, 32, 3, 2, 1),
    (64, 3, 64, 32, 3, 1, 1),
    (16, 3, 64, 64, 7, 2, 1),
    (16, 64, 64, 32, 3, 1, 64),
    (16, 96, 96, 14, 5, 1, 96),
]


@pytest.mark.parametrize("quantity", ["diagonal", "projection", "norm"])
@pytest.mark.parametrize(("samples", "channels", "outputs", "size", "kernel", "stride", "groups"), CONV)
def test_conv(
    benchmark: object,
    samples: int,
    channels: int,
    outputs: int,
    size: int,
    kernel: int,
    stride: int,
    groups: int,
    quantity: str,
) -> None:
    side, pad = size // stride, kernel // 2
    x, b = random(samples, channels, size, size), random(samples, outputs, side, side)
    d = random(5, outputs, channels // groups, kernel, kernel)
    window = ([kernel, kernel], stride, pad, 1, groups)

    def gradients() -> Tensor:
        patches = F.unfold(x, kernel, 1, pad, stride).view(samples * groups, -1, side**2)
        return torch.bmm(b.view(samples * groups, -1, side**2), patches.mT).view(samples, outputs, -1)

    ours = {
        "diagonal": lambda: ops.conv_fisher_diagonal(x, b, *window),
        "projection": lambda: ops.conv_fisher_projection(x, b, d, *window),
        "norm": lambda: ops.conv_grad_norm(x, b, *window),
    }
    unfolded = {
        "diagonal": lambda: gradients().square_().sum(0),
        "projection": lambda: gradients().flatten(1) @ d.flatten(1).T,
        "norm": lambda: gradients().square_().flatten(1).sum(1),
    }
    columns, positions = channels // groups * kernel**2, side**2
    work = 2 * columns * outputs * (positions + (5 if quantity == "projection" else 0))
    if quantity == "norm":
        work = min(work, positions**2 * (groups * columns + outputs))
    got, want = ours[quantity](), unfolded[quantity]()
    compare(
        benchmark,
        ours[quantity],
        {"unfold, bmm": unfolded[quantity]},
        floor=samples * work / sgemm_rate(),
        sizes={
            "N": samples,
            "C": channels,
            "O": outputs,
            "H": size,
            "kernel": kernel,
            "stride": stride,
            "groups": groups,
        },
        values={"relative difference": relative_error(got.flatten(), want.flatten())},
    )


@pytest.mark.parametrize(("samples", "classes", "directions"), [(4096, 1000, 8), (512, 50257, 8), (4096, 1000, 1)])
def test_softmax_fisher_gram(benchmark: object, samples: int, classes: int, directions: int) -> None:
    z, t = random(samples, classes), random(directions, samples, classes, seed=1)

    def composition(z: Tensor, t: Tensor) -> Tensor:
        p = z.softmax(-1)
        centred = t - torch.einsum("nc,knc->kn", p, t).unsqueeze(-1)
        return torch.einsum("nc,knc,lnc->kl", p, centred, centred)

    got, want = ops.softmax_fisher_gram(z, t), composition(z[:512].double(), t[:, :512].double())
    first = ops.softmax_fisher_gram(z[:512], t[:, :512])
    assert got.shape == want.shape
    compare(
        benchmark,
        lambda: ops.softmax_fisher_gram(z, t),
        {"einsum": lambda: composition(z, t)},
        floor=(t.sum, 1),
        sizes={"N": samples, "C": classes, "K": directions},
        values={"relative error to float64": relative_error(first, want)},
    )

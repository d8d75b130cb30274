"""softmax_fisher_gram against float64, with error bounds from the arithmetic."""

from __future__ import annotations

import pytest
import torch
from fisher_operands import DTYPES, random, result_dtype
from torch import Tensor

from transferops import ops


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
    ("samples", "classes"), [(1, 1), (5, 2), (3, 15), (3, 17), (70, 33), (3, 1024), (2, 1025), (200, 3000)]
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

"""The gradients ops against the torch calls that they replace, on lists like those of a network's parameters, and
restarts of a gradient expectation all at once against one by one.

Floors, measured in turn with the contenders: for the running moments, the bytes that must move (gradients read, moments
read and written) at the rate at which ``Tensor.copy_`` moves as many floats (read and written bytes counted); for the
Gram matrices, the time that summing the same numbers takes, which reads them once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import compare, interleaved_minimum
from torch import Tensor, nn

from transferops import ops
from transferops.otqms.networks import network_for
from transferops.scores import PrincipalGradientExpectation

SHAPES = [(396, 396)] * 159 + [(66456,)]  # 25 M weights in 160 tensors
WEIGHTS = sum(torch.Size(shape).numel() for shape in SHAPES)
SIZES = {"tensors": len(SHAPES), "weights": WEIGHTS}


def lists(count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(count)]


def moving(count: int) -> tuple[Callable[[], object], float]:
    """Copying as many floats as a list has, which reads and writes them, and how often that is ``count`` of the two."""
    source = torch.randn(WEIGHTS)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), count / 2


def foreach_moments(means: list[Tensor], squares: list[Tensor], gradients: list[Tensor], count: int) -> None:
    apart = torch._foreach_sub(gradients, means)
    torch._foreach_add_(means, apart, alpha=1 / (count + 1))
    torch._foreach_addcmul_(squares, apart, torch._foreach_sub(gradients, means))


def foreach_gram(rows: list[list[Tensor]]) -> Tensor:
    gram = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows[: i + 1]):
            gram[i, j] = gram[j, i] = sum(x.sum() for x in torch._foreach_mul(one, other))
    return gram


def dot_gram(rows: list[list[Tensor]]) -> Tensor:
    gram = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows[: i + 1]):
            gram[i, j] = gram[j, i] = sum(torch.dot(x.flatten(), y.flatten()) for x, y in zip(one, other))
    return gram


@pytest.mark.parametrize("variance", [False, True], ids=["mean", "mean and variance"])
def test_gradient_expectation(benchmark: object, variance: bool) -> None:
    gradients, means, squares = lists(3)
    count = 3
    peers: dict[str, Callable[[], object]] = {
        "_foreach_lerp_": lambda: torch._foreach_lerp_(means, gradients, 1 / (count + 1))
    }
    if variance:
        peers = {"_foreach": lambda: foreach_moments(means, squares, gradients, count)}
    compare(
        benchmark,
        lambda: ops.gradient_expectation_(means, squares if variance else None, gradients, count),
        peers,
        floor=moving(5 if variance else 3),
        sizes=SIZES,
        values={},
    )


@pytest.mark.parametrize("count", [2, 4, 8])
def test_gradient_gram(benchmark: object, count: int) -> None:
    rows = lists(count)
    want = foreach_gram([[x.double() for x in row] for row in rows])
    compare(
        benchmark,
        lambda: ops.gradient_gram(rows),
        {"_foreach": lambda: foreach_gram(rows), "dot": lambda: dot_gram(rows)},
        floor=(lambda: [x.sum() for row in rows for x in row], 1),
        sizes={**SIZES, "K": count},
        values={"relative error to float64": float((ops.gradient_gram(rows) - want).abs().max() / want.abs().max())},
    )


@pytest.mark.parametrize("updated", [2, 1], ids=["both updated", "one updated"])
def test_gradient_expectation_gram(benchmark: object, updated: int) -> None:
    """Two expectations and their inner products, as two tasks take their next gradients, or one beside a finished one.

    The floor counts the gradients and the means that change, not the reading of a mean that does not.
    """
    means, gradients = lists(2), lists(updated)
    counts = [3] * updated

    def composed() -> Tensor:
        for mean, gradient in zip(means, gradients):
            torch._foreach_lerp_(mean, gradient, 1 / (counts[0] + 1))
        return foreach_gram(means)

    def composed_with_dot() -> Tensor:
        for mean, gradient in zip(means, gradients):
            torch._foreach_lerp_(mean, gradient, 1 / (counts[0] + 1))
        return dot_gram(means)

    def in_two_steps() -> Tensor:
        for mean, gradient in zip(means, gradients):
            ops.gradient_expectation_(mean, None, gradient, counts[0])
        return ops.gradient_gram(means)

    gram = ops.gradient_expectation_gram_(means, None, gradients, counts)
    want = foreach_gram([[x.double() for x in mean] for mean in means])
    compare(
        benchmark,
        lambda: ops.gradient_expectation_gram_(means, None, gradients, counts),
        {"_foreach": composed, "_foreach and dot": composed_with_dot, "the two ops": in_two_steps},
        floor=moving(3 * updated),
        sizes=SIZES,
        values={"relative error to float64": float((gram - want).abs().max() / want.abs().max())},
    )


@pytest.mark.parametrize("based", [False, True], ids=["plain", "differences"])
def test_weighted_gram(benchmark: object, based: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    count, size = 5, 5_000_000
    directions, base = (torch.randn(shape, generator=generator) for shape in ((count, size), (size,)))
    weights = torch.rand(size, generator=generator)

    def composed(rows: Tensor, scale: Tensor, origin: Tensor) -> Tensor:
        rows = rows - origin if based else rows
        return (rows * scale) @ rows.T

    def ours() -> Tensor:
        return ops.weighted_gram(directions, weights, base if based else None)

    want = composed(directions.double(), weights.double(), base.double())
    compare(
        benchmark,
        ours,
        {"(D w) @ D.T": lambda: composed(directions, weights, base)},
        floor=(lambda: (directions.sum(), weights.sum(), base.sum() if based else None), 1),
        sizes={"K": count, "P": size},
        values={"relative error to float64": float((ours() - want).abs().max() / want.abs().max())},
    )


def test_gradient_fisher_gram(benchmark: object) -> None:
    generator = torch.Generator().manual_seed(0)
    samples, size, count = 64, 400_000, 5
    gradients, directions = (torch.randn(shape, generator=generator) for shape in ((samples, size), (count, size)))

    def composed(rows: Tensor, moves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        products, squares = rows @ moves.T, rows.square()
        return products.T @ products / samples, squares.mean(0), squares.sum(1)

    want = composed(gradients.double(), directions.double())[0]
    got = ops.gradient_fisher_gram(gradients, directions).gram
    compare(
        benchmark,
        lambda: ops.gradient_fisher_gram(gradients, directions),
        {"products": lambda: composed(gradients, directions)},
        floor=(gradients.sum, 1),
        sizes={"N": samples, "P": size, "K": count},
        values={"relative error to float64": float((got - want).abs().max() / want.abs().max())},
    )


# Restarts, the shape of a sample, samples of a batch. The built-in networks; the shared digits are 16 x 16.
RESTARTS = {
    "perceptron": (16, (64,), 64),
    "perceptron, more restarts": (64, (64,), 64),
    "convolutions, few samples": (16, (1, 16, 16), 16),
    "convolutions": (16, (1, 16, 16), 64),
    "convolutions, many samples": (16, (1, 16, 16), 256),  # more than the cache holds: one by one, but not drawn anew
}


@pytest.mark.parametrize("case", RESTARTS)
def test_restarts(benchmark: object, case: str) -> None:
    """As many restarts at once as the library chooses.

    Peers: this library restart by restart ("one by one"), which draws each initialisation anew, and a bare loop of
    ``autograd.grad`` over networks that are there already ("plain loop"). Floor: the time of the batched restarts
    themselves, so that the ratio to it says nothing here.
    """
    restarts, shape, samples = RESTARTS[case]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, *shape, generator=generator)
    labels = torch.randint(10, (samples,), generator=generator)
    model = network_for(shape, 10)
    networks = [network_for(shape, 10) for _ in range(restarts)]
    batched, single = (PrincipalGradientExpectation(model, restarts=restarts, restart_batch=n) for n in (None, 1))
    difference = []
    for one, other in zip(*(pge.update("task", inputs, labels).expectation("task") for pge in (batched, single))):
        difference.append(float((one - other).norm() / other.norm()))

    def ours() -> object:
        return batched.update("task", inputs, labels)

    def plain() -> object:
        total: list[Tensor] = []
        for network in networks:
            loss = nn.functional.cross_entropy(network(inputs), labels)
            found = torch.autograd.grad(loss, list(network.parameters()))
            total = [a + b for a, b in zip(total, found)] if total else list(found)
        return [x / restarts for x in total]

    compare(
        benchmark,
        ours,
        {"one by one": lambda: single.update("task", inputs, labels), "plain loop": plain},
        floor=interleaved_minimum({"ours": ours}, seconds=1)["ours"],
        sizes={"restarts": restarts, "N": samples},
        values={"relative difference": max(difference)},
    )

"""How far the sources are from the target: A = Theta^T J Theta and what takes its place.

The columns of Theta are delta_i = theta_i - theta_0, J is the Fisher information of the target's training
samples at theta_0. The samples are shared between processes; the matrix is the same, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from transferops.fisher import FisherInformation, parameter_differences
from transferops.fisher.directions import Direction, select
from transferops.fisher.modes import evaluation
from transferops.otqms.distributed import World
from transferops.otqms.options import TrainingOptions
from transferops.otqms.pool import Pool

State = Mapping[str, torch.Tensor]

_DIRECTIONS_AT_ONCE = 6  # differentiated together; with batches as in training, what they need stays in the caches
_GRADIENT_SAMPLES = 2048  # of a source: its gradient at theta_0 need not be exact
_DAMPING = 0.1
_CONJUGATE_GRADIENT_STEPS = 10


def information(model: nn.Module, sources: int, options: TrainingOptions) -> FisherInformation:
    """The target's Fisher information, to be asked for A over so many sources."""
    chunks = math.ceil(sources / _DIRECTIONS_AT_ONCE)
    return FisherInformation(model, options.fisher, chunk_size=math.ceil(sources / chunks))


def gram(
    model: nn.Module,
    sources: Sequence[State],
    samples: Pool,
    options: TrainingOptions,
    world: World,
    fisher: FisherInformation | None = None,
) -> torch.Tensor:
    """A at ``model``, float64 ``[K, K]`` on the CPU.

    Args:
        model: theta_0.
        sources: The parameters theta_i, by name, in any precision and on any device.
        samples: Part 0 is the target.
        options: Estimator, parameters, and where the directions are kept.
        world: The processes that share the target's samples.
        fisher: From :func:`information` for ``model``, to save its checks; made here if ``None``.
    """
    own = world.share(samples.positions(0))
    batches = list(samples.batches(own, options.batch_size))
    selection = options.selection(model)
    if not batches:
        total = torch.zeros((len(sources), len(sources)), dtype=torch.float64)
    else:
        device, dtype = ("cpu", options.source_dtype) if options.offload else (None, None)
        directions = parameter_differences(list(sources), model, selection, device=device, dtype=dtype)
        fisher = fisher or information(model, len(directions), options)
        total = fisher.gram(directions, batches) * len(own)
    return _agreed(world.sum(total) / samples.sizes[0], world)


def released_gram(
    model: nn.Module, sources: Sequence[State], samples: Pool, options: TrainingOptions, world: World
) -> torch.Tensor:
    """What the paper's released code has in the place of A, for comparison only; not a Fisher information.

    With g_b the gradient of the mean loss of batch b, every parameter tensor of it rescaled linearly to
    [-1, 1]: (1/B) sum_b (Theta^T g_b) (Theta^T g_b)^T. Every process computes the whole.
    """
    directions = parameter_differences(list(sources), model, options.selection(model))
    parameters = {name: model.get_parameter(name) for name in directions[0]}
    total = torch.zeros((len(directions), len(directions)), dtype=torch.float64)
    count = 0
    with evaluation(model):
        for inputs, labels in samples.batches(samples.positions(0), options.batch_size):
            loss = F.cross_entropy(model(inputs), labels)
            gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
            scaled = {name: _to_unit_range(value) for name, value in gradients.items()}
            scores = torch.tensor(
                [
                    sum(float((scaled[name].double() * value.double()).sum()) for name, value in d.items())
                    for d in directions
                ],
                dtype=torch.float64,
            )
            total += torch.outer(scores, scores)
            count += 1
    return _agreed(total / count, world)


def newton_directions(
    model: nn.Module, samples: Pool, options: TrainingOptions, generator: torch.Generator, world: World
) -> list[Direction]:
    """delta_i without a source model: one damped Newton step on source i from ``model`` [derived].

    delta_i = -(J + lambda I)^-1 g_i, where g_i is the gradient of the source's mean loss at theta_0, J the
    target's exact Fisher information in the place of the source's, and lambda a tenth of J's largest
    curvature met, g^T J g / g^T g at the mean gradient g. Solved by ten steps of conjugate gradients.

    Args:
        model: theta_0.
        samples: Part 0 is the target.
        options: Which parameters.
        generator: Draws the samples of a large source that its gradient is computed on.
        world: Every process computes the whole; the first one's result counts.
    """
    selection = options.selection(model)
    parameters = {name: model.get_parameter(name) for name in select(model, selection)}
    fisher = FisherInformation(model, parameters=list(parameters))
    target = list(samples.batches(samples.positions(0)))
    gradients = []
    for part in range(1, len(samples.sizes)):
        positions = samples.positions(part)
        chosen = torch.randperm(len(positions), generator=generator)[:_GRADIENT_SAMPLES]
        gradients.append(_mean_gradient(model, parameters, samples, positions[chosen]))
    mean = {name: torch.stack([g[name] for g in gradients]).mean(0) for name in parameters}
    curvature = fisher.quadratic(mean, target) / max(_dot(mean, mean), torch.finfo(torch.float32).tiny)
    damping = _DAMPING * curvature

    def apply(vector: Direction) -> Direction:
        product = fisher.matvec(vector, target)
        return {name: product[name] + damping * value for name, value in vector.items()}

    directions = [_solve(apply, {name: -value for name, value in g.items()}) for g in gradients]
    for direction in directions:
        world.send(direction.values())
    return directions


def _agreed(matrix: torch.Tensor, world: World) -> torch.Tensor:
    """The matrix of process 0, so that all decide alike."""
    world.send([matrix])
    return matrix


def _to_unit_range(value: torch.Tensor) -> torch.Tensor:
    low, high = value.min(), value.max()
    return torch.zeros_like(value) if low == high else 2 * (value - low) / (high - low) - 1


def _mean_gradient(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], samples: Pool, positions: torch.Tensor
) -> Direction:
    total = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }
    with evaluation(model):
        for inputs, labels in samples.batches(positions):
            loss = F.cross_entropy(model(inputs), labels, reduction="sum")
            for name, gradient in zip(total, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                total[name] += gradient
    return {name: value / len(positions) for name, value in total.items()}


def _dot(a: Direction, b: Direction) -> float:
    return sum(float((a[name] * b[name]).sum(dtype=torch.float64)) for name in a)


def _solve(apply: Callable[[Direction], Direction], right: Direction) -> Direction:
    """Conjugate gradients from zero, a fixed number of steps at most."""
    solution = {name: torch.zeros_like(value) for name, value in right.items()}
    residual = {name: value.clone() for name, value in right.items()}
    direction, square = residual, _dot(residual, residual)
    start = square
    for _ in range(_CONJUGATE_GRADIENT_STEPS):
        if square <= 1e-12 * start:
            break
        product = apply(direction)
        length = square / _dot(direction, product)
        solution = {name: value + length * direction[name] for name, value in solution.items()}
        residual = {name: value - length * product[name] for name, value in residual.items()}
        square, before = _dot(residual, residual), square
        direction = {name: value + square / before * direction[name] for name, value in residual.items()}
    return solution

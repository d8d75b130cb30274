"""Adapt several layers by damped Gauss-Newton steps that have to prove themselves on held-out samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from transferops._validate import check_positive_int, describe, fail
from transferops.adapt.adapt_head import adapt_head
from transferops.fisher.batches import Batch
from transferops.fisher.modes import evaluation, function_transforms

_EASIER, _HARDER = 0.25, 8.0  # factors of the damping after a step that was kept, or not
_ITERATIONS = 40  # of conjugate gradients, at most
_PRECISION = 1e-3  # relative residual at which they stop

Vector = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One trial step.

    Attributes:
        kind: "damped" or "head".
        damping: mu of (J^T J + mu I) d = J^T r; None for the head.
        held_out: loss after it.
        kept: whether it was kept.
    """

    kind: str
    damping: float | None
    held_out: float
    kept: bool


@dataclass(frozen=True)
class LayersReport:
    """What :func:`adapt_layers` did. Losses are mean squared residuals, summed over outputs.

    Attributes:
        parameters: names of the parameters that were moved.
        held_out_before, held_out_after: on the held-out samples, by which steps were kept: not an unbiased estimate.
        steps: every trial.
    """

    parameters: tuple[str, ...]
    held_out_before: float
    held_out_after: float
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        kept = sum(step.kept for step in self.steps)
        return (
            f"{len(self.parameters)} parameters moved in {kept} of {len(self.steps)} steps: "
            f"held-out loss {self.held_out_before:.4g} -> {self.held_out_after:.4g}"
        )


def adapt_layers(
    model: nn.Module,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    layers: Sequence[str],
    *,
    steps: int = 12,
    damping: float = 0.1,
) -> tuple[nn.Module, LayersReport]:
    """Adapt the parameters of some layers to numbers as targets, and the last layer in closed form at the end.

    Levenberg-Marquardt: d = (J^T J + mu I)^-1 J^T r with J the derivative of all outputs, from products with J and J^T
    only (conjugate gradients). A step is kept only if it lowers the loss on the held-out samples, else the damping mu
    grows; so is the final exact solution of :func:`adapt_head`. The result is therefore never worse on held-out samples
    than the model was. An undamped joint step of several layers diverges [derived].

    Args:
        model: as it is; it is not changed. Runs in evaluation mode.
        batches: (inputs, targets), targets in the shape of the outputs; kept in memory.
        held_out: the same, of other samples.
        layers: paths of modules whose parameters may move; the last layer moves anyway.
        steps: trial steps before the last layer's.
        damping: of the first step, relative to the curvature along the gradient.

    Returns:
        An adapted copy and a :class:`LayersReport`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_positive_int("steps", steps, minimum=0)
    if isinstance(damping, bool) or not 0 < damping < math.inf:
        fail("damping", "a positive number", describe(damping))
    adapted = copy.deepcopy(model)
    modules = dict(adapted.named_modules())
    for name in layers:
        if name not in modules or not any(True for _ in modules[name].parameters()):
            fail("layers", "paths of modules with parameters", repr(name))
    names = [n for n, _ in adapted.named_parameters() if any(not p or n.startswith(p + ".") for p in layers)]
    own = dict(adapted.named_parameters())
    for name in names:
        if not own[name].is_floating_point():
            fail("layers", "floating point parameters", f"{name!r} of {own[name].dtype}")
    first = next(iter(own.values()), None)
    device = torch.device("cpu") if first is None else first.device
    raw = list(batches)
    training, validation = _parse("batches", raw, device), _parse("held_out", held_out, device)
    with evaluation(adapted):
        before = _loss(adapted, validation)
        history, best = _damped_steps(adapted, {n: own[n] for n in names}, training, validation, before, steps, damping)
    final, _ = adapt_head(adapted, raw)
    with evaluation(final):
        loss = _loss(final, validation)
    history.append(Step("head", None, loss, loss < best))
    if loss < best:
        adapted, best = final, loss
    return adapted, LayersReport(tuple(names), before, best, tuple(history))


def _damped_steps(
    model: nn.Module,
    parameters: Vector,
    training: list[Batch],
    validation: list[Batch],
    before: float,
    steps: int,
    damping: float,
) -> tuple[list[Step], float]:
    """Move the parameters in place; the trials, and the held-out loss at the end."""
    history: list[Step] = []
    best, gradient, mu = before, None, 0.0
    for _ in range(steps if parameters else 0):
        if gradient is None:
            gradient = _descent(model, parameters, training)
            norm = _dot(gradient, gradient)
            if norm == 0:
                break
            if mu == 0:
                mu = damping * _dot(gradient, _curvature(model, parameters, training, gradient, 0.0)) / norm or damping
        step = _solve(model, parameters, training, gradient, mu)
        old = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _move(parameters, {name: old[name] + step[name] for name in old})
        loss = _loss(model, validation)
        history.append(Step("damped", mu, loss, loss < best))
        if loss < best:
            best, gradient, mu = loss, None, mu * _EASIER
        else:
            _move(parameters, old)
            mu *= _HARDER
    return history, best


def _solve(model: nn.Module, parameters: Vector, batches: list[Batch], right: Vector, mu: float) -> Vector:
    """(J^T J + mu I)^-1 right by conjugate gradients from 0."""
    solution = {name: torch.zeros_like(value) for name, value in right.items()}
    residual, direction = dict(right), dict(right)
    square = start = _dot(residual, residual)
    for _ in range(_ITERATIONS):
        image = _curvature(model, parameters, batches, direction, mu)
        length = square / _dot(direction, image)
        solution = {n: solution[n] + length * direction[n] for n in solution}
        residual = {n: residual[n] - length * image[n] for n in residual}
        previous, square = square, _dot(residual, residual)
        if square <= _PRECISION**2 * start:
            break
        direction = {n: residual[n] + (square / previous) * direction[n] for n in residual}
    return solution


def _descent(model: nn.Module, parameters: Vector, batches: list[Batch]) -> Vector:
    """J^T r, r = y - f."""
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    point = {name: value.detach() for name, value in parameters.items()}
    for batch in batches:
        with function_transforms(gradients=True):
            outputs, pull = vjp(lambda p, batch=batch: batch.run(model, p), point)  # type: ignore[misc]
            (gradient,) = pull(batch.targets.reshape(outputs.shape).to(outputs) - outputs)
        total = {name: total[name] + gradient[name].detach() for name in total}
    return total


def _curvature(model: nn.Module, parameters: Vector, batches: list[Batch], vector: Vector, mu: float) -> Vector:
    """(J^T J + mu I) vector."""
    total = {name: mu * value for name, value in vector.items()}
    point = {name: value.detach() for name, value in parameters.items()}
    for batch in batches:

        def run(p: Vector, batch: Batch = batch) -> Tensor:
            return batch.run(model, p)

        with function_transforms(gradients=True):
            image: Tensor = jvp(run, (point,), (vector,))[1]
            _, pull = vjp(run, point)  # type: ignore[misc]
            (product,) = pull(image)
        total = {name: total[name] + product[name].detach() for name in total}
    return total


@torch.no_grad()
def _loss(model: nn.Module, batches: list[Batch]) -> float:
    """Mean over samples of the squared residual, summed over outputs; infinite if it is not a number."""
    total = sum(
        float((batch.targets.double() - batch.run(model).reshape(batch.targets.shape).double()).square().sum())
        for batch in batches
    )
    loss = total / sum(batch.samples for batch in batches)
    return loss if math.isfinite(loss) else math.inf


@torch.no_grad()
def _move(parameters: Vector, values: Vector) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def _parse(argument: str, batches: Iterable[Any], device: torch.device) -> list[Batch]:
    parsed = [Batch.parse(index, batch, device) for index, batch in enumerate(batches)]
    if not parsed:
        fail(argument, "at least one batch", "none")
    for batch in parsed:
        if not isinstance(batch.targets, Tensor) or not batch.targets.is_floating_point():
            fail(argument, "numbers as targets", describe(batch.targets), TypeError)
    return parsed

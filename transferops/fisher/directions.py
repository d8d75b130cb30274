"""Directions in parameter space: dictionaries from parameter name to tensor, never flattened."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from transferops._validate import describe, fail

Direction = dict[str, torch.Tensor]
Selection = Callable[[str], bool] | Collection[str] | None


def parameter_differences(
    models: Sequence[nn.Module | Mapping[str, torch.Tensor]],
    reference: nn.Module,
    parameters: Selection = None,
) -> list[Direction]:
    """delta_k = theta_k - theta_0 over the trainable parameters of a reference model.

    Trainable are the parameters of ``reference`` that require a gradient; a tied parameter appears once,
    under its first name. Buffers, such as batch-norm statistics, are not parameters.

    Args:
        models: the K models theta_k of the same architecture, or their state dictionaries.
        reference: the model theta_0.
        parameters: which of the trainable parameters to take: a predicate on names, or the names. All if
            None. Use it to leave out parts whose shapes differ, such as heads over different classes.

    Returns:
        One dictionary per model, name to difference, detached, on the device of the reference's parameter
        and in at least float32 (a difference of half-precision weights is formed in float32).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: no parameter is selected, a name is unknown, or a model lacks a parameter or has it in
            another shape.
    """
    if not isinstance(reference, nn.Module):
        fail("reference", "a torch.nn.Module", describe(reference), TypeError)
    if isinstance(models, (nn.Module, Mapping)):
        got = f"one {type(models).__name__}"
        fail("models", "a sequence of modules or state dictionaries", got, TypeError)
    selected = select(reference, parameters)
    differences = []
    for k, model in enumerate(models):
        if isinstance(model, nn.Module):
            values: Mapping[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        elif isinstance(model, Mapping):
            values = model
        else:
            fail(f"models[{k}]", "a torch.nn.Module or a state dictionary", describe(model), TypeError)
        differences.append({n: _difference(f"models[{k}]", n, values, base) for n, base in selected.items()})
    return differences


def select(reference: nn.Module, parameters: Selection) -> Direction:
    """The trainable parameters, or those of them that a predicate or a collection of names picks, detached."""
    trainable = {name: p.detach() for name, p in reference.named_parameters() if p.requires_grad}
    if callable(parameters):
        selected = {name: p for name, p in trainable.items() if parameters(name)}
    elif parameters is not None:
        if isinstance(parameters, str):
            fail("parameters", "a predicate or a collection of names", describe(parameters), TypeError)
        unknown = [name for name in parameters if name not in trainable]
        if unknown:
            fail("parameters", "names of trainable parameters of the reference", repr(unknown[0]))
        selected = {name: p for name, p in trainable.items() if name in set(parameters)}
    else:
        selected = trainable
    if not selected:
        fail("parameters", f"at least one of {len(trainable)} trainable parameters to be selected", "none")
    return selected


def _difference(argument: str, name: str, values: Mapping[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    if name not in values:
        fail(argument, f"a parameter named {name!r}, as in the reference", "no such parameter")
    value = values[name].detach()
    if value.shape != base.shape:
        expected = f"{name!r} of shape {list(base.shape)}, as in the reference"
        fail(argument, expected, f"shape {list(value.shape)}")
    dtype = torch.promote_types(torch.promote_types(value.dtype, base.dtype), torch.float32)
    return value.to(base.device, dtype) - base.to(dtype)


def check_directions(directions: Any, model: nn.Module, movable: Direction) -> list[Direction]:
    """K directions, each under the first name of the parameters it moves; ``movable`` are those that may be named."""
    if isinstance(directions, (Mapping, torch.Tensor, str)) or not isinstance(directions, Sequence):
        expected = "a list of dictionaries from parameter name to tensor"
        fail("directions", expected, describe(directions), TypeError)
    if not directions:
        fail("directions", "at least one direction", "none")
    checked = [check_direction(f"directions[{k}]", d, model, movable) for k, d in enumerate(directions)]
    if not any(checked):
        fail("directions", "at least one parameter to move", "empty dictionaries")
    return checked


def check_direction(argument: str, direction: Any, model: nn.Module, movable: Direction) -> Direction:
    """One direction under the first name of each parameter."""
    if not isinstance(direction, Mapping):
        fail(argument, "a dictionary from parameter name to tensor", describe(direction), TypeError)
    first_name = {id(p): name for name, p in model.named_parameters()}
    canonical = {name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    renamed: Direction = {}
    for name, value in direction.items():
        if name not in canonical:
            fail(argument, "names of the model's parameters", repr(name))
        if canonical[name] not in movable:
            fail(argument, "names of the selected parameters", repr(name))
        entry = f"{argument}[{name!r}]"
        _check_value(entry, value, movable[canonical[name]])
        other = renamed.setdefault(canonical[name], value)
        if other is not value and not torch.equal(other, value):
            fail(entry, f"the values of {canonical[name]!r}, to which it is tied", "others")
    return renamed


def _check_value(argument: str, value: Any, parameter: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        fail(argument, "a floating-point tensor", describe(value), TypeError)
    if value.shape != parameter.shape:
        fail(argument, f"shape {list(parameter.shape)}, as the parameter", f"shape {list(value.shape)}")
    if value.device != parameter.device:
        fail(argument, f"a tensor on {parameter.device}, as the parameter", f"one on {value.device}")


def moved_by(directions: Sequence[Direction], movable: Direction) -> Direction:
    """The parameters that at least one direction moves."""
    return {name: p for name, p in movable.items() if any(name in direction for direction in directions)}


def stack(directions: Sequence[Direction], name: str, parameter: torch.Tensor) -> torch.Tensor:
    """[K, *shape] of one parameter, zero where a direction leaves it out, in its dtype."""
    return torch.stack(
        [d[name].detach().to(parameter.dtype) if name in d else torch.zeros_like(parameter) for d in directions]
    )


def check_finite(results: Iterable[torch.Tensor], directions: Mapping[str, Direction]) -> None:
    """Raise if a result is not finite, naming the direction at fault if there is one, else the model.

    Finite sums have finite terms, so the directions need reading only when something is wrong.
    """
    if all(bool(value.sum().isfinite() or value.isfinite().all()) for value in results):
        return
    for argument, direction in directions.items():
        for name, value in direction.items():
            if not value.isfinite().all():
                fail(f"{argument}[{name!r}]", "finite values", "infinities or NaN among them")
    fail("model", "finite outputs and derivatives", "infinities or NaN among them")

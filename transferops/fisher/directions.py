"""Directions in parameter space: dictionaries from parameter name to tensor, never flattened."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from transferops._validate import describe, fail

Direction = dict[str, torch.Tensor]


def parameter_differences(
    models: Sequence[nn.Module | Mapping[str, torch.Tensor]],
    reference: nn.Module,
    parameters: Callable[[str], bool] | Collection[str] | None = None,
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
    selected = _select(reference, parameters)
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


def _select(reference: nn.Module, parameters: Callable[[str], bool] | Collection[str] | None) -> Direction:
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


def _difference(
    argument: str, name: str, values: Mapping[str, torch.Tensor], base: torch.Tensor
) -> torch.Tensor:
    if name not in values:
        fail(argument, f"a parameter named {name!r}, as in the reference", "no such parameter")
    value = values[name].detach()
    if value.shape != base.shape:
        expected = f"{name!r} of shape {list(base.shape)}, as in the reference"
        fail(argument, expected, f"shape {list(value.shape)}")
    dtype = torch.promote_types(torch.promote_types(value.dtype, base.dtype), torch.float32)
    return value.to(base.device, dtype) - base.to(dtype)

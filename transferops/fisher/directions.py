"""Directions in parameter space: by parameter name, never flattened, and at the device only one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transferops._transfer import to_device
from transferops._validate import describe, fail

Direction = dict[str, Tensor]
Selection = Callable[[str], bool] | Collection[str] | None


class LowRank(NamedTuple):
    """A parameter's part of a direction as a product, such as a LoRA update: left @ right, in the parameter's shape.

    Attributes:
        left: [O, r] with O the parameter's leading dimension; for LoRA, B times its scaling.
        right: [r, P / O] with P the number of elements; for LoRA, A.
    """

    left: Tensor
    right: Tensor


class Difference(NamedTuple):
    """A parameter's part of the direction from one model to another; formed when it is needed."""

    value: Tensor
    base: Tensor


Move = Tensor | LowRank | Difference
"""One parameter's part of a direction."""

GivenDirection = Mapping[str, Tensor | LowRank] | nn.Module | Tensor
"""A direction as :meth:`transferops.fisher.FisherInformation.gram` takes it."""


def parameter_differences(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    reference: nn.Module,
    parameters: Selection = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> list[Direction]:
    """delta_k = theta_k - theta_0 over the trainable parameters of a reference model.

    Trainable are the parameters of ``reference`` that require a gradient; a tied parameter appears once,
    under its first name. Buffers, such as batch-norm statistics, are not parameters.

    Args:
        models: the K models theta_k of the same architecture, or their state dictionaries.
        reference: the model theta_0.
        parameters: which of the trainable parameters to take: a predicate on names, or the names. All if
            None. Use it to leave out parts whose shapes differ, such as heads over different classes.
        dtype: in which to keep the differences, formed in at least float32 whatever it is; that if None. bfloat16
            halves the memory of K directions at a relative error of 2^-9 in each of their elements.
        device: where to keep them; that of the reference's parameter if None. From "cpu" they are brought to the
            model one parameter at a time.

    Returns:
        One dictionary per model, name to difference, detached.

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
    if dtype is not None and not dtype.is_floating_point:
        fail("dtype", "a floating-point type", str(dtype))
    selected = select(reference, parameters)
    differences = []
    for k, model in enumerate(models):
        if isinstance(model, nn.Module):
            values: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        elif isinstance(model, Mapping):
            values = model
        else:
            fail(f"models[{k}]", "a torch.nn.Module or a state dictionary", describe(model), TypeError)
        parts = differences_from(f"models[{k}]", values, selected)
        differences.append({name: dense(part, selected[name]).to(device, dtype) for name, part in parts.items()})
    return differences


def differences_from(argument: str, values: Mapping[str, Tensor], selected: Direction) -> dict[str, Difference]:
    """The parts of the direction from some parameters to values of the same names."""
    parts = {}
    for name, base in selected.items():
        if name not in values:
            fail(argument, f"a parameter named {name!r}, as in the reference", "no such parameter")
        value = values[name].detach()
        if value.shape != base.shape:
            expected = f"{name!r} of shape {list(base.shape)}, as in the reference"
            fail(argument, expected, f"shape {list(value.shape)}")
        parts[name] = Difference(value, base)
    return parts


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
    for name, p in selected.items():
        if p.is_complex():
            fail("parameters", "real ones", f"{name!r} of {p.dtype}")
    return selected


def dense(move: Move, parameter: Tensor) -> Tensor:
    """A part of a direction as a tensor of the parameter's shape, on its device."""
    device = parameter.device
    if isinstance(move, LowRank):
        left, right = (to_device(factor.detach(), device).to(_at_least_float32(factor)) for factor in move)
        return (left @ right.to(left.dtype)).reshape(parameter.shape)
    if isinstance(move, Difference):
        dtype = torch.promote_types(_at_least_float32(move.value), move.base.dtype)
        return to_device(move.value, device).to(dtype) - to_device(move.base, device).to(dtype)
    return to_device(move.detach(), device)


class Directions:
    """K checked directions, kept as they were given.

    Args:
        moves: of each direction, under the first name of each parameter it moves.
        arguments: what each is called in messages.
        movable: the parameters that may move.

    Attributes:
        parameters: those that at least one direction moves.
    """

    def __init__(self, moves: Sequence[Mapping[str, Move]], arguments: Sequence[str], movable: Direction) -> None:
        self._moves = moves
        self._arguments = arguments
        self.parameters = {name: p for name, p in movable.items() if any(name in parts for parts in moves)}

    def __len__(self) -> int:
        return len(self._moves)

    def part(self, start: int, stop: int) -> Directions:
        """Some of the directions."""
        return Directions(self._moves[start:stop], self._arguments[start:stop], self.parameters)

    def moving(self, name: str) -> dict[int, Move]:
        """Which directions move a parameter, and how."""
        return {k: parts[name] for k, parts in enumerate(self._moves) if name in parts}

    def stack(self, name: str) -> Tensor:
        """[K, *shape] of one parameter, in its dtype; zero where a direction leaves it out."""
        parameter, moves = self.parameters[name], self.moving(name)
        stacked = parameter.new_zeros((len(self), *parameter.shape))
        for k, move in moves.items():
            stacked[k] = dense(move, parameter)
        return stacked

    def low_rank(self, name: str) -> bool:
        """Whether all directions that move a parameter have it as a product."""
        return all(isinstance(move, LowRank) for move in self.moving(name).values())

    def rank(self, name: str) -> int:
        """The largest of the products that move a parameter."""
        return max(move.left.shape[1] for move in self.moving(name).values() if isinstance(move, LowRank))

    def stack_factors(self, name: str) -> LowRank:
        """[K, O, r] and [K, r, P / O] of one parameter, in its dtype; zero beyond each direction's own rank."""
        parameter, moves, rank = self.parameters[name], self.moving(name), self.rank(name)
        rows = len(parameter)
        left = parameter.new_zeros((len(self), rows, rank))
        right = parameter.new_zeros((len(self), rank, parameter.numel() // rows))
        for k, move in moves.items():
            if isinstance(move, LowRank):
                left[k, :, : move.left.shape[1]] = to_device(move.left.detach(), parameter.device)
                right[k, : move.right.shape[0]] = to_device(move.right.detach(), parameter.device)
        return LowRank(left, right)

    def check_finite(self, results: Iterable[Tensor]) -> None:
        """Raise if a result is not finite, naming the direction at fault if there is one, else the model.

        Finite sums have finite terms, so the directions need reading only when something is wrong.
        """
        if are_finite(results):
            return
        for argument, parts in zip(self._arguments, self._moves):
            for name, move in parts.items():
                if not are_finite([move.value] if isinstance(move, Difference) else as_tensors(move)):
                    fail(f"{argument}[{name!r}]", "finite values", "infinities or NaN among them")
        refuse_infinite([torch.tensor(torch.nan)])


def check_directions(
    directions: Any, model: nn.Module, movable: Direction, selected: Callable[[], Direction]
) -> Directions:
    """K directions; see :func:`check_direction`."""
    if isinstance(directions, (Mapping, str, nn.Module)) or (
        not isinstance(directions, Sequence) and not (isinstance(directions, Tensor) and directions.dim() == 2)
    ):
        expected = "a list of dictionaries from parameter name to tensor, of modules or of flat vectors"
        fail("directions", expected, describe(directions), TypeError)
    if not len(directions):
        fail("directions", "at least one direction", "none")
    names = [f"directions[{k}]" for k in range(len(directions))]
    checked = [check_direction(name, d, model, movable, selected) for name, d in zip(names, directions)]
    if not any(checked):
        fail("directions", "at least one parameter to move", "empty dictionaries")
    return Directions(checked, names, movable)


def check_direction(
    argument: str, direction: Any, model: nn.Module, movable: Direction, selected: Callable[[], Direction]
) -> dict[str, Move]:
    """One direction under the first name of each parameter.

    Args:
        argument: its name in messages.
        direction: as given.
        model: the model.
        movable: the parameters that a dictionary may name.
        selected: gives the parameters over which modules and flat vectors are read.
    """
    if isinstance(direction, nn.Module):
        return dict(differences_from(argument, dict(direction.named_parameters(remove_duplicate=False)), selected()))
    if isinstance(direction, Tensor):
        return _split(argument, direction, selected())
    if not isinstance(direction, Mapping):
        expected = "a dictionary from parameter name to tensor, a module or a flat vector"
        fail(argument, expected, describe(direction), TypeError)
    first_name = {id(p): name for name, p in model.named_parameters()}
    canonical = {name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    renamed: dict[str, Move] = {}
    for name, value in direction.items():
        if name not in canonical:
            fail(argument, "names of the model's parameters", repr(name))
        if canonical[name] not in movable:
            fail(argument, "names of the selected parameters", repr(name))
        entry = f"{argument}[{name!r}]"
        _check_value(entry, value, movable[canonical[name]])
        other = renamed.setdefault(canonical[name], value)
        if other is not value and not all(map(torch.equal, as_tensors(other), as_tensors(value))):
            fail(entry, f"the values of {canonical[name]!r}, to which it is tied", "others")
    return renamed


def as_tensors(move: Tensor | LowRank | Difference) -> list[Tensor]:
    """What a part of a direction is made of."""
    return [move] if isinstance(move, Tensor) else list(move)


def are_finite(values: Iterable[Tensor]) -> bool:
    """Whether nothing is infinite or NaN, mostly from the sums alone: one answer to wait for, not one per tensor."""
    values = list(values)
    sums: dict[torch.device, list[Tensor]] = {}
    for value in values:
        sums.setdefault(value.device, []).append(value.sum())
    finite = all(bool(torch.stack(each).isfinite().all()) for each in sums.values())
    return finite or all(bool(value.isfinite().all()) for value in values)


def refuse_infinite(results: Iterable[Tensor]) -> None:
    """Raise if a result is not finite."""
    if not are_finite(results):
        fail("model", "finite outputs and derivatives", "infinities or NaN among them")


def _split(argument: str, vector: Tensor, selected: Direction) -> dict[str, Move]:
    """A flat vector over the selected parameters, in their order, as views by name."""
    sizes = [p.numel() for p in selected.values()]
    if not vector.is_floating_point():
        fail(argument, "a floating-point tensor", describe(vector), TypeError)
    if vector.shape != (sum(sizes),):
        fail(argument, f"a flat vector over the {sum(sizes)} selected elements", describe(vector))
    _check_device(argument, vector, next(iter(selected.values())))
    return {name: part.view(p.shape) for (name, p), part in zip(selected.items(), torch.split(vector, sizes))}


def _check_value(argument: str, value: Any, parameter: Tensor) -> None:
    if isinstance(value, LowRank):
        _check_factors(argument, value, parameter)
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        fail(argument, "a floating-point tensor", describe(value), TypeError)
    if value.shape != parameter.shape:
        fail(argument, f"shape {list(parameter.shape)}, as the parameter", f"shape {list(value.shape)}")
    _check_device(argument, value, parameter)


def _check_factors(argument: str, value: LowRank, parameter: Tensor) -> None:
    for factor in value:
        if not isinstance(factor, Tensor) or not factor.is_floating_point():
            fail(argument, "two floating-point factors", describe(factor), TypeError)
        _check_device(argument, factor, parameter)
    rows = len(parameter) if parameter.dim() > 1 else 0
    shapes = [list(factor.shape) for factor in value]
    if (
        not rows
        or [len(s) for s in shapes] != [2, 2]
        or (shapes[0][0], shapes[1][1])
        != (
            rows,
            parameter.numel() // rows,
        )
    ):
        expected = f"factors of a parameter of shape {list(parameter.shape)}"
        fail(argument, expected, f"factors of shapes {shapes[0]} and {shapes[1]}")
    if shapes[0][1] != shapes[1][0] or not shapes[0][1]:
        fail(argument, "factors of one rank, at least 1", f"ranks {shapes[0][1]} and {shapes[1][0]}")


def _check_device(argument: str, value: Tensor, parameter: Tensor) -> None:
    if value.device not in (parameter.device, torch.device("cpu")):
        where = f"on {parameter.device}, as the parameter" + ("" if parameter.is_cpu else ", or on cpu")
        fail(argument, f"a tensor {where}", f"one on {value.device}")


def _at_least_float32(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)

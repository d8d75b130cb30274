"""Which elements are inherited: units of a granularity, ranked by a selection, the first share alpha of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from transferops._validate import fail
from transferops.adapt.channels import Structure
from transferops.adapt.correspondence import Correspondence

GRANULARITIES = ("element", "filter", "layer", "block")
SELECTIONS = ("random", "uniform", "magnitude", "fisher")

Masks = dict[str, torch.Tensor]


class Selector:
    """Orders units, and takes the first of them.

    Args:
        select: A name in :data:`SELECTIONS`.
        seed: Of "random".
    """

    def __init__(self, select: str, seed: int) -> None:
        self.select = select
        self._generator = torch.Generator().manual_seed(seed)

    def take(self, count: int, units: int, score: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Positions of ``count`` of ``units`` units, ascending, int64.

        "random" and scores (largest first, of equals the earlier) give sets that grow with ``count``; "uniform" gives
        evenly spaced positions, which are not nested. The random numbers drawn do not depend on ``count``.

        Args:
            count: How many.
            units: Of how many.
            score: One number per unit; called if the selection goes by scores.
        """
        if self.select == "random":
            order = torch.randperm(units, generator=self._generator)
        elif count in (0, units):
            order = torch.arange(units)
        elif self.select == "uniform":
            return (2 * torch.arange(count) + 1) * units // (2 * count)
        else:
            order = score().double().cpu().sort(descending=True, stable=True).indices
        return order[:count].sort().values


def share(alpha: float, units: int) -> int:
    """alpha of ``units``, to the nearest whole number, halves up."""
    return math.floor(alpha * units + 0.5)


def element_masks(
    mapped: Mapping[str, torch.Tensor],
    owners: Mapping[str, str],
    scores: Mapping[str, torch.Tensor],
    alpha: float,
    selector: Selector,
) -> Masks:
    """Every element on its own, the same share of every tensor; the statistics of one norm share a mask.

    Args:
        mapped: Elements with a counterpart, by tensor.
        owners: By buffer name, the module whose statistics are inherited together.
        scores: Of every element, by tensor.
        alpha: The share.
        selector: Orders elements.
    """
    masks: Masks = {}
    together: dict[tuple[str, torch.Size], str] = {}
    for name, has in mapped.items():
        key = (owners.get(name, name), has.shape)
        if key in together and torch.equal(mapped[together[key]], has):
            masks[name] = masks[together[key]].clone()
            continue
        together[key] = name
        positions = has.flatten().nonzero()[:, 0]
        taken = selector.take(
            share(alpha, len(positions)),
            len(positions),
            lambda positions=positions, name=name: scores[name].flatten()[positions],  # type: ignore[misc]
        )
        mask = torch.zeros(has.numel(), dtype=torch.bool)
        mask[positions[taken]] = True
        masks[name] = mask.view(has.shape)
    return masks


def filter_masks(
    structure: Structure,
    found: Mapping[str, Correspondence],
    mapped: Mapping[str, torch.Tensor],
    scores: Mapping[str, torch.Tensor],
    alpha: float,
    selector: Selector,
) -> Masks:
    """Whole channels, the same share of every group.

    An inherited channel brings all that is its own: the rows of the weights that make it, their bias, the affine and
    the statistics of its norms, and the slices of the weights that read it. An element of a weight between two
    groups is thus inherited if the channel at either end is. Channels of the model's input bring nothing: no layer
    makes them.
    """
    produced = structure.produced()
    users: dict[int, list[tuple[str, int, int]]] = {}
    for name in found:
        axes = structure.axes[name]
        groups = [
            (dimension, position, structure.root(factor.group))
            for dimension, axis in enumerate(axes)
            for position, factor in enumerate(axis)
            if factor.kind == "group"
        ]
        made = [group for group in groups if group[2] in produced]
        for dimension, position, root in made or groups:
            users.setdefault(root, []).append((name, dimension, position))
    masks = {name: torch.zeros_like(has) for name, has in mapped.items()}
    for places in users.values():
        size = structure.axes[places[0][0]][places[0][1]][places[0][2]].size
        available, score = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.float64)
        for name, dimension, position in places:
            spread = _by_channel(structure, mapped[name], name, dimension, position)
            available |= spread.any(1)
            if name in scores:
                values = (scores[name].cpu().double() * mapped[name]).expand_as(mapped[name])
                score += _by_channel(structure, values, name, dimension, position).sum(1)
        channels = available.nonzero()[:, 0]
        taken = selector.take(
            share(alpha, len(channels)),
            len(channels),
            lambda c=channels, s=score: s[c],  # type: ignore[misc]
        )
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[channels[taken]] = True
        for name, dimension, position in places:
            masks[name] |= _along(structure, chosen, name, dimension, position)
    reached = {name for places in users.values() for name, _, _ in places}
    others = {name: has for name, has in mapped.items() if name not in reached}
    masks |= element_masks(others, {}, scores, alpha, selector)
    return {name: mask & mapped[name] for name, mask in masks.items()}


def unit_masks(
    units: Mapping[str, str],
    mapped: Mapping[str, torch.Tensor],
    scores: Mapping[str, torch.Tensor],
    alpha: float,
    selector: Selector,
) -> Masks:
    """Whole layers or blocks.

    Args:
        units: By tensor, what it is a part of.
        mapped: Elements with a counterpart, by tensor.
        scores: Of every element, by tensor; a unit's is the mean over its elements.
        alpha: The share of the units that have a counterpart.
        selector: Orders units.
    """
    members: dict[str, list[str]] = {}
    for name in mapped:
        members.setdefault(units[name], []).append(name)

    def means() -> torch.Tensor:
        totals = []
        for names in members.values():
            inside = [scores[name].cpu().double()[mapped[name]] for name in names if name in scores]
            values = torch.cat(inside) if inside else torch.zeros(0, dtype=torch.float64)
            totals.append(float(values.mean()) if len(values) else 0.0)
        return torch.tensor(totals)

    taken = set(selector.take(share(alpha, len(members)), len(members), means).tolist())
    chosen = {name for i, names in enumerate(members.values()) if i in taken for name in names}
    return {name: has & (name in chosen) for name, has in mapped.items()}


def block_of(layer: str) -> str:
    """The outermost numbered part that a layer is in, as ``layer1.0``; without any its first name."""
    parts = layer.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return parts[0]


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        fail(argument, " or ".join(repr(choice) for choice in choices), repr(value))


def _by_channel(structure: Structure, values: torch.Tensor, name: str, dimension: int, position: int) -> torch.Tensor:
    """``values`` of a tensor as [channels, everything else]."""
    sizes = [factor.size for factor in structure.axes[name][dimension]]
    split = torch.unflatten(values, dimension, sizes) if len(sizes) > 1 else values
    return split.movedim(dimension + position, 0).flatten(1) if split.ndim > 1 else split[:, None]


def _along(structure: Structure, chosen: torch.Tensor, name: str, dimension: int, position: int) -> torch.Tensor:
    """``chosen`` [channels] in a shape that broadcasts over the tensor."""
    sizes = [factor.size for factor in structure.axes[name][dimension]]
    axis = chosen.view([-1 if i == position else 1 for i in range(len(sizes))]).expand(sizes).flatten()
    return axis.view([-1 if i == dimension else 1 for i in range(len(structure.axes[name]))])

"""Which upstream element every element of a target tensor would take, shapes being allowed to differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from transferops.adapt.channels import Axis, Factor, Structure, attention_heads

Choose = Callable[[int, int, int], torch.Tensor]


@dataclass(frozen=True)
class Correspondence:
    """How one target tensor follows an upstream tensor.

    Attributes:
        source: Its name upstream.
        index: Per dimension the upstream index of every target index, -1 where there is none; int64.
    """

    source: str
    index: tuple[torch.Tensor, ...]

    def mapped(self) -> torch.Tensor:
        """Which elements have a counterpart, bool of the target's shape."""
        result = torch.ones([len(index) for index in self.index], dtype=torch.bool)
        for dimension, index in enumerate(self.index):
            result &= (index >= 0).view([-1 if i == dimension else 1 for i in range(len(self.index))])
        return result

    def gather(self, upstream: torch.Tensor) -> torch.Tensor:
        """The counterpart of every element; any element where there is none."""
        for dimension, index in enumerate(self.index):
            if index.numel() != upstream.shape[dimension] or not torch.equal(index, torch.arange(index.numel())):
                upstream = upstream.index_select(dimension, index.clamp_min(0).to(upstream.device))
        return upstream


def upstream_widths(
    structure: Structure,
    pairs: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    heads: Mapping[str, int],
) -> dict[int, int]:
    """The number of upstream channels of every group (by root).

    It is read off the tensors with an axis that is the group alone; where they disagree, most win. For heads it is
    taken from the upstream module if there is one; from a state dict heads are as wide as the target's, or, if that
    does not divide, as many. Equal shapes are taken to have equal heads: they are copied as they are.

    Args:
        structure: Of the target.
        pairs: Upstream name by target name.
        shapes: Of the upstream tensors.
        heads: Upstream heads by target tensor name, where known.
    """
    alone: dict[int, Counter[int]] = {}
    shared: dict[int, Counter[int]] = {}
    for name, source in pairs.items():
        axes = structure.axes[name]
        if len(axes) != len(shapes[source]):
            continue
        for axis, size in zip(axes, shapes[source], strict=True):
            for factor in (f for f in axis if f.kind == "group"):
                root = structure.root(factor.group)
                if len(axis) == 1:
                    alone.setdefault(root, Counter())[size] += 1
                elif name in heads and size % heads[name] == 0 and size != prod(f.size for f in axis):
                    alone.setdefault(root, Counter())[heads[name]] += 1
                else:
                    others = prod(f.size for f in axis if f is not factor)
                    guess = size // others if size % others == 0 else factor.size
                    shared.setdefault(root, Counter())[guess] += 1
    votes = {**shared, **alone}
    return {root: counter.most_common(1)[0][0] for root, counter in votes.items()}


def correspond(
    structure: Structure,
    name: str,
    source: str,
    shape: tuple[int, ...],
    widths: Mapping[int, int],
    outputs: set[int],
    choose: Choose,
) -> Correspondence | str:
    """Align a target tensor with an upstream tensor.

    Args:
        structure: Of the target.
        name: The target tensor.
        source: The upstream tensor.
        shape: Of the upstream tensor.
        widths: From :func:`upstream_widths`.
        outputs: Groups that must have equal sizes to correspond.
        choose: From (group, target size, upstream size), the upstream one larger, to the upstream channels taken.

    Returns:
        The correspondence, or why there is none.
    """
    axes = structure.axes[name]
    if len(axes) != len(shape):
        return f"{len(axes)} dimensions here, {len(shape)} upstream"
    index = []
    for axis, size in zip(axes, shape, strict=True):
        result = _axis_index(structure, axis, size, widths, choose, outputs)
        if isinstance(result, str):
            return result
        index.append(result)
    return Correspondence(source, tuple(index))


def upstream_heads(model: nn.Module) -> dict[str, int]:
    """Heads by tensor name, for the tensors of attention modules."""
    return {
        f"{prefix}.{name}".lstrip("."): heads
        for prefix, module in model.named_modules()
        if (heads := attention_heads(module)) is not None
        for name, _ in module.named_parameters()
    }


def _axis_index(
    structure: Structure, axis: Axis, size: int, widths: Mapping[int, int], choose: Choose, outputs: set[int]
) -> torch.Tensor | str:
    sizes = upstream_sizes(structure, axis, size, widths)
    if sizes is None:
        return f"{size} upstream does not fit its {' x '.join(str(f.size) for f in axis)} channels"
    index = torch.zeros(1, dtype=torch.int64)
    for factor, there in zip(axis, sizes, strict=True):
        root = structure.root(factor.group) if factor.kind == "group" else -1
        if factor.size != there and root in outputs:
            return f"{factor.size} outputs here, {there} upstream"
        if factor.size != there and factor.kind == "fixed":
            return f"{factor.size} positions here, {there} upstream"
        step = _factor_index(factor, there, root, choose)
        combined = index[:, None] * there + step[None, :]
        combined[(index < 0)[:, None] | (step < 0)[None, :]] = -1
        index = combined.flatten()
    return index


def upstream_sizes(structure: Structure, axis: Axis, size: int, widths: Mapping[int, int]) -> list[int] | None:
    """Upstream sizes of the factors of an axis that has ``size`` elements there; None if they cannot be."""
    if len(axis) == 1:
        factor = axis[0]
        expected = widths.get(structure.root(factor.group), size) if factor.kind == "group" else size
        return [size] if size == expected else None
    sizes = [widths.get(structure.root(f.group), f.size) if f.kind == "group" else f.size for f in axis]
    free = len(axis) - 1 if axis[-1].kind != "group" else 0  # what is left after the channels: positions, head width
    others = prod(s for i, s in enumerate(sizes) if i != free)
    if size % others:
        return None
    sizes[free] = size // others
    return sizes


def _factor_index(factor: Factor, there: int, root: int, choose: Choose) -> torch.Tensor:
    if factor.kind == "group" and there > factor.size:
        return choose(root, factor.size, there)
    shift = (there - factor.size) // 2 if factor.kind == "kernel" else 0
    index = torch.arange(factor.size) + shift
    return index.masked_fill((index < 0) | (index >= there), -1)

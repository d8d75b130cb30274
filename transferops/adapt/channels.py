"""Which axes of a network's tensors count the same channels: the convolution that makes them, the norm after it, what
a residual sum ties to it, and the input slices of every layer that reads them.

Here known layers give the axes of their own tensors; :mod:`transferops.adapt.channel_graph` ties layers to each other.
Attention (a module with a number of heads, and linear query, key, value and output projections) is taken
whole: its channels are heads, and a head is selected whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

WEIGHT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_QUERY_KEY_VALUE = {
    *("qkv", "to_qkv", "query_key_value", "kv", "to_kv"),
    *("q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v"),
}

Kind = Literal["group", "kernel", "slice", "fixed"]


@dataclass(frozen=True)
class Factor:
    """An axis of a tensor is a product of factors, the first one outermost.

    ``kind``: "group", channels of group ``group``; "kernel", positions of a kernel, aligned at the centre; "slice",
    aligned at the start; "fixed", only equal sizes correspond.
    """

    size: int
    kind: Kind = "fixed"
    group: int = -1


Axis = tuple[Factor, ...]


@dataclass
class Structure:
    """Axes of every tensor of a model.

    Attributes:
        axes: By tensor name, one axis per dimension.
        layers: By tensor name, the layer it belongs to; a norm that directly follows a layer belongs to it.
        traced: Whether the graph could be followed. If not, axes are tied by their size, see :meth:`tie_sizes`.
        why_not: What stopped the tracing.
    """

    axes: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    traced: bool = True
    why_not: str = ""
    _parent: list[int] = field(default_factory=list)
    _produced: set[int] = field(default_factory=set)
    _outputs: set[int] = field(default_factory=set)
    _sizes: list[int] = field(default_factory=list)

    def new_group(self, size: int, produced: bool = False) -> int:
        """A group of ``size`` channels tied to nothing yet."""
        self._parent.append(len(self._parent))
        self._sizes.append(size)
        if produced:
            self._produced.add(len(self._parent) - 1)
        return len(self._parent) - 1

    def root(self, group: int) -> int:
        """The group that stands for all it is tied to."""
        while self._parent[group] != group:
            group = self._parent[group]
        return group

    def size(self, group: int) -> int:
        return self._sizes[group]

    def tie(self, first: int, second: int) -> None:
        """Channel c of the one is channel c of the other."""
        self._parent[self.root(second)] = self.root(first)

    def mark_output(self, group: int) -> None:
        self._outputs.add(group)

    def produced(self) -> set[int]:
        """Groups (roots) that some layer of the model makes; the model's own input is not among them."""
        return {self.root(group) for group in self._produced}

    def outputs(self) -> set[int]:
        """Groups (roots) that are what the model answers with, and nothing else: one layer has them."""
        users: dict[int, set[str]] = {}
        for name, axes in self.axes.items():
            for factor in (f for axis in axes for f in axis if f.kind == "group"):
                users.setdefault(self.root(factor.group), set()).add(self.layers[name])
        return {root for root in map(self.root, self._outputs) if len(users.get(root, ())) == 1}

    def tie_sizes(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Without a graph: tie all groups of one size here and one size upstream.

        Whatever a residual sum ties is among them, so masks stay coherent, if coarser than they could be.

        Args:
            pairs: Group and its size upstream.
        """
        first: dict[tuple[int, int], int] = {}
        for group, upstream in pairs:
            self.tie(first.setdefault((self.size(group), upstream), group), group)


def attention_heads(module: nn.Module) -> int | None:
    """The number of heads, if ``module`` is attention that is taken whole."""
    heads = next((h for h in (getattr(module, a, None) for a in ("num_heads", "heads")) if isinstance(h, int)), None)
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads if module._qkv_same_embed_dim else None
    if heads is None or heads < 1:
        return None
    inputs, output = projections(module)
    if not inputs or output is None or output.in_features % heads:
        return None
    return heads if all(layer.out_features % output.in_features == 0 for layer in inputs) else None


def projections(module: nn.Module) -> tuple[list[nn.Linear], nn.Linear | None]:
    """Query, key, value and output projections of an attention module."""
    linear = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    inputs = [child for name, child in linear if name in _QUERY_KEY_VALUE]
    others = [child for name, child in linear if name not in _QUERY_KEY_VALUE]
    return inputs, others[0] if len(others) == 1 else None


class LayerAxes:
    """The axes that known layers give to their own tensors; every other tensor has its last axis as channels."""

    def __init__(self, structure: Structure, model: nn.Module) -> None:
        self.structure = structure
        self.model = model

    def claim(self) -> None:
        axes, layers = self.structure.axes, self.structure.layers
        for prefix, module in self.model.named_modules():
            for name, tensor in own_tensors(module):
                full = f"{prefix}.{name}".lstrip(".")
                layers[full] = prefix or name
                axes[full] = self._axes(module, name, tensor)
        for prefix, module in self.model.named_modules():
            if (heads := attention_heads(module)) is not None:
                self._claim_attention(prefix, module, heads)
            self._tie_own(prefix, module)

    def _axes(self, module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[Axis, ...]:
        shape, new = tensor.shape, self.structure.new_group

        def group(size: int, produced: bool) -> Axis:
            return (Factor(size, "group", new(size, produced)),)

        kernel: tuple[Axis, ...] = tuple((Factor(size, "kernel"),) for size in shape[2:])
        if isinstance(module, nn.modules.conv._ConvNd) and name == "weight":
            inner: Axis = group(shape[1], False) if module.groups == 1 else (Factor(shape[1], "slice"),)
            if module.transposed:
                inner = group(shape[1], True) if module.groups == 1 else inner
                return (group(shape[0], False), inner, *kernel)
            return (group(shape[0], True), inner, *kernel)
        if isinstance(module, (nn.Linear, nn.Bilinear)) and name == "weight":
            return (group(shape[0], True), *(group(size, False) for size in shape[1:]))
        if isinstance(module, nn.LayerNorm):
            return (*((Factor(size),) for size in shape[:-1]), group(shape[-1], False))
        if len(shape) == 0:
            return ()
        return (*((Factor(size),) for size in shape[:-1]), group(shape[-1], not isinstance(module, NORMS)))

    def _claim_attention(self, prefix: str, module: nn.Module, heads: int) -> None:
        structure, names = self.structure, {m: n for n, m in module.named_modules()}
        dot = f"{prefix}." if prefix else ""
        group = structure.new_group(heads, produced=True)

        def axis(size: int, inner: int) -> Axis:
            parts, width = size // inner, Factor(inner // heads, "slice")
            head = Factor(heads, "group", group)
            return (Factor(parts), head, width) if parts > 1 else (head, width)

        def replace(name: str, dimension: int, inner: int) -> None:
            axes = structure.axes.get(name)
            if axes is not None:
                changed = axis(axes[dimension][0].size, inner)
                structure.axes[name] = (*axes[:dimension], changed, *axes[dimension + 1 :])

        if isinstance(module, nn.MultiheadAttention):
            width = module.embed_dim
            row = structure.axes[f"{dot}in_proj_weight"]
            structure.axes[f"{dot}in_proj_weight"] = (axis(3 * width, width), row[1])
            replace(f"{dot}in_proj_bias", 0, width)
            replace(f"{dot}out_proj.weight", 1, width)
            return
        inputs, output = projections(module)
        assert output is not None
        for layer in inputs:
            for name in ("weight", "bias"):
                replace(f"{dot}{names[layer]}.{name}", 0, output.in_features)
        replace(f"{dot}{names[output]}.weight", 1, output.in_features)

    def _tie_own(self, prefix: str, module: nn.Module) -> None:
        """Bias, affine and statistics belong to the channels of their own module."""
        dot, axes, tie = f"{prefix}." if prefix else "", self.structure.axes, self.structure.tie
        if isinstance(module, WEIGHT_LAYERS) and f"{dot}bias" in axes:
            if not (len(axes[f"{dot}bias"][0]) == 1 and len(axes[f"{dot}weight"][0]) == 1):
                return  # of attention, already tied
            rows = axes[f"{dot}weight"][1 if getattr(module, "transposed", False) else 0]
            if rows[0].kind == "group" and rows[0].size == axes[f"{dot}bias"][0][0].size:
                tie(rows[0].group, axes[f"{dot}bias"][0][0].group)
        elif isinstance(module, NORMS):
            channels = [axes[f"{dot}{n}"][-1][0].group for n, t in own_tensors(module) if t.ndim]
            for other in channels[1:]:
                tie(channels[0], other)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer

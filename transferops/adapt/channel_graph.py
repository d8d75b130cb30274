"""Ties the channels of a model's layers to each other along its graph (torch.fx: no data are needed).

A value is followed by the one set of channels it carries, through reshapes and transpositions, whichever axis they are
on.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from transferops.adapt.channels import (
    NORMS,
    WEIGHT_LAYERS,
    Axis,
    Factor,
    LayerAxes,
    Structure,
    attention_heads,
    own_tensors,
    projections,
)

_SUMS = {"add", "iadd", "sub", "isub", "mul", "imul", "add_", "sub_", "mul_", "maximum", "where"}
_MIXES = {"matmul", "bmm", "baddbmm", "einsum", "mm", "linear", "conv1d", "conv2d", "conv3d", "tensordot"}
_NOT_VALUES = {"getattr", "size", "dim", "numel", "_assert", "eq", "ne", "floordiv", "type"}


def structure_of(model: nn.Module) -> Structure:
    """Find the axes of ``model``. It is not run, and not changed."""
    structure = Structure()
    LayerAxes(structure, model).claim()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            tracer = _Tracer()
            graph = tracer.trace(model)
    except Exception as error:  # whatever the user's forward raises when it meets a symbol
        structure.traced, structure.why_not = False, f"{type(error).__name__}: {error}".splitlines()[0]
        layers = [module for module in model.modules() if isinstance(module, WEIGHT_LAYERS)]
        names = {module: name for name, module in model.named_modules()}
        if layers and isinstance(layers[-1], nn.Linear):
            structure.mark_output(structure.axes[f"{names[layers[-1]]}.weight".lstrip(".")][0][0].group)
    else:
        _Follower(structure, model, graph).follow()
    return structure


class _Tracer(fx.Tracer):  # type: ignore[misc, unused-ignore]
    """Looks into containers and the user's modules, not into layers and attention."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        return attention_heads(m) is not None or m.__module__.startswith("torch.nn") or isinstance(m, WEIGHT_LAYERS)


@dataclass(frozen=True)
class _Tensor:
    """A value that is one of the model's own tensors, not yet tied to channels."""

    name: str


Value = Any  # int: a group; _Tensor; None: channels unknown


class _Follower:
    """Walks the graph and ties."""

    def __init__(self, structure: Structure, model: nn.Module, graph: fx.Graph) -> None:
        self.structure = structure
        self.modules = dict(model.named_modules())
        self.graph = graph
        self.values: dict[fx.Node, Value] = {}

    def follow(self) -> None:
        for node in self.graph.nodes:
            self.values[node] = self._value(node)

    def _value(self, node: fx.Node) -> Value:
        if node.op == "get_attr":
            return _Tensor(str(node.target)) if str(node.target) in self.structure.axes else None
        if node.op == "call_module":
            return self._through(node, str(node.target))
        if node.op == "output":
            for source in node.all_input_nodes:
                if isinstance(self.values[source], int):
                    self.structure.mark_output(self.values[source])
            return None
        if node.op == "placeholder":
            return None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        values = [self.values[source] for source in node.all_input_nodes]
        if name in _NOT_VALUES or name in _MIXES or node.target is operator.matmul:
            return None
        if name == "scaled_dot_product_attention":
            return values[-1] if len(values) > 2 else None
        if name in ("cat", "concat"):
            return self._joined(values)
        if name in _SUMS:
            return self._sum(values)
        return next((value for value in values if value is not None), None)

    def _sum(self, values: list[Value]) -> Value:
        """What is added or multiplied elementwise has the same channels."""
        groups = [value for value in values if isinstance(value, int)]
        if not groups:
            return next((value for value in values if value is not None), None)
        widest = max(groups, key=self.structure.size)
        for group in groups:
            if self.structure.size(group) == self.structure.size(widest):
                self.structure.tie(widest, group)
        for value in values:
            if isinstance(value, _Tensor):
                self._tie_tensor(value.name, widest)
        return widest

    def _joined(self, values: list[Value]) -> Value:
        """Tokens joined to tokens keep their channels; of channels joined to channels nothing is known."""
        groups = {self.structure.root(value) for value in values if isinstance(value, int)}
        tokens = any(isinstance(value, _Tensor) for value in values)
        return self._sum(values) if tokens or len(groups) == 1 else None

    def _tie_tensor(self, name: str, group: int) -> None:
        axes = self.structure.axes[name]
        size = self.structure.size(group)
        matching = [i for i, axis in enumerate(axes) if len(axis) == 1 and axis[0].size == size]
        if not matching:
            return
        last = len(axes) - 1
        if matching[-1] == last and axes[last][0].kind == "group":
            self.structure.tie(group, axes[last][0].group)
        else:  # channels on another axis, as in [1, C, 1, 1]
            plain = tuple((Factor(f.size),) if f.kind == "group" else axis for axis in axes for f in axis[:1])
            changed: Axis = (Factor(size, "group", group),)
            self.structure.axes[name] = (*plain[: matching[-1]], changed, *plain[matching[-1] + 1 :])

    def _through(self, node: fx.Node, path: str) -> Value:
        module, axes = self.modules[path], self.structure.axes
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        value = self.values[source] if source is not None else None
        if isinstance(value, _Tensor):
            value = axes[value.name][-1][0].group if axes[value.name] else None
        if attention_heads(module) is not None:
            return self._attention(module, path, value)
        if isinstance(module, WEIGHT_LAYERS):
            return self._layer(module, path, value)
        if isinstance(module, NORMS):
            affine = [f"{path}.{name}" for name, t in own_tensors(module) if t.ndim]
            if isinstance(source, fx.Node) and source.op == "call_module":
                before = str(source.target)
                if isinstance(self.modules[before], WEIGHT_LAYERS):
                    for name, _ in own_tensors(module):
                        self.structure.layers[f"{path}.{name}"] = before
            if affine and len(axes[affine[0]]) == 1:
                for name in affine:
                    axes[name] = (self._read(value, axes[name][0]),)
                if value is None and axes[affine[0]][0][0].kind == "group":
                    return axes[affine[0]][0][0].group
            return value
        if isinstance(module, nn.Embedding):
            return axes[f"{path}.weight"][1][0].group
        if isinstance(module, nn.TransformerEncoderLayer):
            return self._encoder_layer(path, value)
        if isinstance(module, nn.TransformerEncoder):
            for i in range(len(module.layers)):
                value = self._encoder_layer(f"{path}.layers.{i}", value)
            return value
        return value if next(module.parameters(), None) is None else None

    def _read(self, value: Value, axis: Axis) -> Axis:
        """The axis along which a layer reads ``value``, which may be flattened: channels, then positions."""
        factor = axis[0]
        if len(axis) > 1 or factor.kind != "group" or not isinstance(value, int):
            return axis
        width = self.structure.size(value)
        if width == factor.size:
            self.structure.tie(value, factor.group)
        elif width > 1 and factor.size % width == 0:
            return (Factor(width, "group", value), Factor(factor.size // width))
        return axis

    def _layer(self, module: nn.Module, path: str, value: Value) -> Value:
        axes = self.structure.axes
        weight = axes[f"{path}.weight"]
        transposed = bool(getattr(module, "transposed", False))
        reads, makes = (0, 1) if transposed else (1, 0)
        changed = list(weight)
        changed[reads] = self._read(value, weight[reads])
        axes[f"{path}.weight"] = tuple(changed)
        out = weight[makes][0]
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
            if transposed:
                return None
            if module.groups == module.in_channels == module.out_channels and isinstance(value, int):
                self.structure.tie(value, out.group)
        return out.group if out.kind == "group" and len(weight[makes]) == 1 else None

    def _attention(self, module: nn.Module, path: str, value: Value) -> Value:
        axes = self.structure.axes
        if isinstance(module, nn.MultiheadAttention):
            axes[f"{path}.in_proj_weight"] = (
                axes[f"{path}.in_proj_weight"][0],
                self._read(value, axes[f"{path}.in_proj_weight"][1]),
            )
            return axes[f"{path}.out_proj.weight"][0][0].group
        names = {m: n for n, m in module.named_modules()}
        inputs, output = projections(module)
        assert output is not None
        for layer in inputs:
            name = f"{path}.{names[layer]}.weight"
            axes[name] = (axes[name][0], self._read(value, axes[name][1]))
        return axes[f"{path}.{names[output]}.weight"][0][0].group

    def _encoder_layer(self, path: str, value: Value) -> Value:
        attended = self._attention(self.modules[f"{path}.self_attn"], f"{path}.self_attn", value)
        stream = self._sum([value, attended])
        hidden = self._layer(self.modules[f"{path}.linear1"], f"{path}.linear1", stream)
        stream = self._sum([stream, self._layer(self.modules[f"{path}.linear2"], f"{path}.linear2", hidden)])
        for norm in ("norm1", "norm2"):
            for name in ("weight", "bias"):
                if f"{path}.{norm}.{name}" in self.structure.axes:
                    self._tie_tensor(f"{path}.{norm}.{name}", stream)
        return stream

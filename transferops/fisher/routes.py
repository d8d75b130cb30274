"""Which parameter goes which way, and why, as far as a model's make-up tells; see :mod:`transferops.fisher.trial`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from transferops._validate import fail
from transferops.fisher.attention import in_projections
from transferops.fisher.capture import Layout
from transferops.fisher.directions import Direction
from transferops.fisher.layers import formulas, refuse_changed_gradients


@dataclass
class Routes:
    """The route of every selected parameter.

    Attributes:
        captured: modules, and of each the parameters that go by its formula: own name to name in the model.
        layout: of each of these modules, call by call, where the samples are.
        expanded: parameters that broadcast over samples and are given to each sample as a copy, of this shape.
        fallback: the others, and why.
        attention: attention modules, and the layer that stands for the projection in each.
        vectorised: whether ``torch.func`` can take the fallback: it sees all that is read of the parameters.
    """

    captured: dict[nn.Module, dict[str, str]] = field(default_factory=dict)
    layout: dict[nn.Module, tuple[Layout, ...]] = field(default_factory=dict)
    expanded: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)
    attention: dict[nn.MultiheadAttention, nn.Module] = field(default_factory=dict)
    vectorised: bool = True

    def refuse(self, name: str, why: str) -> None:
        """Move a parameter to the fallback."""
        self.expanded.pop(name, None)
        for module, own in list(self.captured.items()):
            self.captured[module] = {o: n for o, n in own.items() if n != name}
            if not self.captured[module]:
                del self.captured[module]
                self.layout.pop(module, None)
        self.fallback[name] = why

    def linear_layers(self) -> dict[str, nn.Module]:
        """Weights of which calls of one linear layer, as the model itself makes them, are all there is."""
        hidden = {id(part) for module, layer in self.attention.items() for part in (layer, *module.children())}
        return {
            own["weight"]: module
            for module, own in self.captured.items()
            if isinstance(module, nn.Linear) and "weight" in own and id(module) not in hidden
        }

    def table(self, parameters: Direction) -> list[tuple[str, str, str]]:
        """Of every parameter its name, its route, and why."""
        rows = {name: (name, "per sample", why) for name, why in self.fallback.items()}
        for name in self.expanded:
            rows[name] = (name, "copies", "broadcasts over the samples, each of which gets a copy")
        for module, own in self.captured.items():
            calls = self.layout.get(module, ())
            why = f"formula of {type(module).__name__}"
            if len(calls) > 1:
                why += f", {len(calls)} calls added up"
            if any(call.order == "shared" for call in calls):
                why += ", its output copied for each sample"
            rows.update({name: (name, "captured", why) for name in own.values()})
        return [rows[name] for name in parameters]


def plan(model: nn.Module, parameters: Direction) -> Routes:
    """The routes by type: a formula, copies for what may broadcast over samples, the fallback for the rest."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        refuse_changed_gradients(path, module)
        for own, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((f"{path}.{own}" if path else own, module, own))
    names = {id(p): name for name, p in model.named_parameters() if name in parameters}
    routes = Routes(attention=dict(in_projections(model)))
    for key, name in names.items():
        (_, module, own), *others = owners[key]
        shapes = copy_shapes(parameters[name].shape) if _may_broadcast(module, parameters[name]) else []
        if others:
            routes.fallback[name] = f"tied to {others[0][0]}"
        elif own in formulas(module):
            routes.captured.setdefault(module, {})[own] = name
        elif isinstance(module, nn.MultiheadAttention) and module in routes.attention and own.startswith("in_proj_"):
            routes.captured.setdefault(routes.attention[module], {})[own.removeprefix("in_proj_")] = name
        elif shapes:
            routes.expanded[name] = shapes[0]
        else:
            routes.fallback[name] = f"no formula for {own!r} of {type(module).__name__}"
    return routes


def copy_shapes(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The shapes in which each sample may get its own copy of a parameter that broadcasts.

    A parameter [1, ...] has a place for the samples. One of fewer dimensions may scale tokens [N, T, D], vectors
    [N, D] or maps [N, H, W, D].
    """
    if len(shape) > 1:
        return [tuple(shape[1:])] if shape[0] == 1 else []
    return [(1,) * inserted + tuple(shape) for inserted in ((1, 0, 2) if shape else (2, 1, 3))]


def _may_broadcast(module: nn.Module, parameter: Tensor) -> bool:
    # PyTorch's own layers take vectors in one shape only.
    return parameter.dim() > 1 or not type(module).__module__.startswith("torch.nn.modules.")


def kronecker_weights(model: nn.Module, parameters: Direction) -> Direction:
    """The weights of linear layers and convolutions among some parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: Direction = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            name = names.get(id(module.weight), "")
            if name in parameters:
                groups = getattr(module, "groups", 1)
                if groups != 1:
                    fail("model", "convolutions without groups", f"{groups} groups in {path!r}")
                found[name] = parameters[name]
    return found

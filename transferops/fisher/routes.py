"""Which parameter goes which way, and why, as far as a model's make-up tells; see :mod:`transferops.fisher.trial`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from transferops._validate import fail
from transferops.fisher.capture import Layout
from transferops.fisher.directions import Direction
from transferops.fisher.layers import formulas, refuse_changed_gradients


@dataclass
class Routes:
    """The route of every selected parameter.

    Attributes:
        captured: modules, and of each the parameters that go by its formula: own name to name in the model.
        layout: of each of these modules, call by call, where the samples are.
        expanded: names of parameters [1, ...] that broadcast over samples and are given to each sample as a copy.
        fallback: the others, and why.
    """

    captured: dict[nn.Module, dict[str, str]] = field(default_factory=dict)
    layout: dict[nn.Module, tuple[Layout, ...]] = field(default_factory=dict)
    expanded: list[str] = field(default_factory=list)
    fallback: dict[str, str] = field(default_factory=dict)

    def refuse(self, name: str, why: str) -> None:
        """Move a parameter to the fallback."""
        self.expanded = [other for other in self.expanded if other != name]
        for module, own in list(self.captured.items()):
            self.captured[module] = {o: n for o, n in own.items() if n != name}
            if not self.captured[module]:
                del self.captured[module]
                self.layout.pop(module, None)
        self.fallback[name] = why

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
    routes = Routes()
    for key, name in names.items():
        (_, module, own), *others = owners[key]
        if others:
            routes.fallback[name] = f"tied to {others[0][0]}"
        elif own in formulas(module):
            routes.captured.setdefault(module, {})[own] = name
        elif parameters[name].dim() > 1 and len(parameters[name]) == 1:
            routes.expanded.append(name)
        else:
            routes.fallback[name] = f"no formula for {own!r} of {type(module).__name__}"
    return routes


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

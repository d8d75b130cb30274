"""One forward pass whose layer inputs are kept, and backward passes through activations only.

Parameters are constants here, so that autograd neither computes nor stores anything for their gradients. Hooks keep
the input of every wanted layer call and receive the gradient of its output; as soon as all calls of a layer have
theirs, its per-sample gradients are handed on and, in the last backward pass, let go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from transferops._validate import fail
from transferops.fisher.attention import attend, takes
from transferops.fisher.batches import Batch
from transferops.fisher.directions import Direction
from transferops.fisher.layers import Gradients, Rows, formulas, row_dimensions

Wanted = Mapping[nn.Module, Mapping[str, str]]
"""Modules, and of each the parameters wanted: own name to name in the model."""

Consumer = Callable[[str, Gradients], None]


class Layout(NamedTuple):
    """Where in a call's input the rows of a sample are.

    Attributes:
        order: "samples" if they lie together, in the order of the samples; "positions" if the first rows of all
            samples come first; "shared" if the input is the same for all samples and the output broadcasts.
        elements: of the input, per sample; of all of it if shared.
    """

    order: str
    elements: int


class _Anchor(torch.autograd.Function):
    """Makes a tensor part of the graph at no cost: the identity, in place."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _anchored(output: Tensor, anchor: Tensor) -> Tensor:
    result: Tensor = _Anchor.apply(output, anchor)  # type: ignore[no-untyped-call]
    return result


@dataclass
class _Call:
    inputs: Tensor | None
    version: int
    order: str
    grad: Tensor | None = None


@dataclass
class _Layer:
    module: nn.Module
    parameters: Mapping[str, str]
    calls: list[_Call] = field(default_factory=list)
    pending: int = 0


def layer_path(parameters: Mapping[str, str]) -> str:
    """The name of the module whose parameters these are."""
    return next(iter(parameters.values())).rpartition(".")[0]


class Capture:
    """Context in which a model's wanted layers are watched; :meth:`forward`, then any number of :meth:`backward`.

    Args:
        model: the model, none of its parameters asking for a gradient (:func:`transferops.fisher.modes.gradients_for`).
        wanted: the layers and parameters to watch.
        expanded: parameters that broadcast over the samples, and the shape in which each sample gets its own copy,
            of which the gradient is the per-sample gradient.
        layout: of every call of a module, which has to be as it says; "samples" for all modules if None.
        attention: attention modules that compute by :func:`transferops.fisher.attention.attend` meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Wanted,
        expanded: Mapping[str, tuple[int, ...]],
        layout: Mapping[nn.Module, Sequence[Layout]] | None = None,
        attention: Mapping[nn.MultiheadAttention, nn.Module] | None = None,
    ) -> None:
        self._model = model
        self._expanded = expanded
        self._copied: Direction = {}
        self._layout = layout
        self._attention = attention or {}
        self._layers = {module: _Layer(module, parameters) for module, parameters in wanted.items()}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._sources: list[Tensor] = []
        self._recording = False
        self._recomputing = False
        self._last = False
        self._consume: Consumer | None = None
        self._samples = 0

    def __enter__(self) -> Capture:
        for layer in self._layers.values():
            # Ahead of the user's own hooks, which may change the output.
            handle = layer.module.register_forward_hook(self._record, prepend=True, with_kwargs=True)
            self._handles.append(handle)
        for module, projection in self._attention.items():
            vars(module)["forward"] = partial(self._attend, module, projection)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._attention:
            del vars(module)["forward"]
        self._layers.clear()
        self._sources.clear()
        self._consume = None

    def forward(self, batch: Batch) -> Tensor:
        """The outputs, in a graph of activations."""
        self._samples = batch.samples
        anchor = torch.zeros((), requires_grad=True)
        every = dict(self._model.named_parameters()) if self._expanded else {}
        parameters = {name: p.detach() for name, p in every.items() if name in self._expanded}
        copies = {
            name: p.reshape(1, *self._expanded[name]).expand(batch.samples, *self._expanded[name]).requires_grad_()
            for name, p in parameters.items()
        }
        self._copied = parameters
        self._sources = [anchor, *copies.values()]
        self._recording = True
        try:
            outputs = batch.run(self._model, copies or None)
        finally:
            self._recording = False
        for layer in self._layers.values():
            if self._layout is not None and len(layer.calls) != len(self._layout[layer.module]):
                self._refuse(layer, f"{len(layer.calls)} calls")
        return outputs

    def calls(self, module: nn.Module) -> list[Tensor]:
        """The inputs of the module's calls in the forward pass."""
        return [call.inputs for call in self._layers[module].calls if call.inputs is not None]

    def backward(self, outputs: Tensor, cotangent: Tensor, consume: Consumer, *, last: bool = True) -> None:
        """Hand the per-sample gradients of sum(outputs * cotangent) to ``consume``, one parameter at a time.

        Parameters on which the outputs do not depend are left out. After the ``last`` pass the graph and all
        that was kept is gone.
        """
        if not outputs.requires_grad:
            return
        self._last, self._consume = last, consume
        for layer in self._layers.values():
            layer.pending = len(layer.calls)
        self._recomputing = True
        try:
            # Precisions were settled in the forward pass; what is made of the gradients keeps theirs.
            with torch.autocast(outputs.device.type, enabled=False):
                gradients = torch.autograd.grad(
                    outputs, self._sources, cotangent, retain_graph=not last, allow_unused=True
                )
        finally:
            self._recomputing = False
        for layer in self._layers.values():
            self._emit(layer)  # those of which not every call led to the outputs
        for (name, p), gradient in zip(self._copied.items(), gradients[1:]):
            if gradient is not None:
                consume(name, Rows(gradient.reshape(-1, *p.shape)))

    def _attend(self, module: nn.MultiheadAttention, projection: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (self._recording or self._recomputing) and takes(*args, **kwargs):
            return attend(module, projection, *args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return None
        if not self._recording:
            # Activation checkpointing runs a part again in the backward pass and expects the same graph.
            again = self._recomputing and not output.requires_grad
            return _anchored(output, self._sources[0]) if again else None
        inputs = (args[0] if args else kwargs["input"]).detach()
        layer = self._layers[module]
        order = self._order(layer, inputs)
        if not output.requires_grad:
            output = _anchored(output, self._sources[0])
        if order == "shared":
            output = _spread(output, self._samples)
        call = _Call(inputs, inputs._version, order)
        layer.calls.append(call)

        def arrive(grad: Tensor) -> None:
            call.grad = grad
            layer.pending -= 1
            if layer.pending == 0:
                self._emit(layer)

        output.register_hook(arrive)  # type: ignore[no-untyped-call]
        return output

    def _order(self, layer: _Layer, inputs: Tensor) -> str:
        """Where the samples are in the next call's input."""
        if self._layout is None:
            return "samples"
        known = self._layout[layer.module]
        if len(layer.calls) >= len(known):
            self._refuse(layer, f"more than {len(known)} calls")
        order, elements = known[len(layer.calls)]
        if inputs.numel() != elements * (1 if order == "shared" else self._samples):
            self._refuse(layer, f"an input of shape {list(inputs.shape)}")
        return order

    def _refuse(self, layer: _Layer, got: str) -> NoReturn:
        fail("model", f"{layer_path(layer.parameters)!r} to be called as on the first samples", got)

    def _rows(self, layer: _Layer, call: _Call, inputs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output gradient with the samples first."""
        if call.order == "shared":
            return _spread(inputs, self._samples), grad
        dimensions = row_dimensions(layer.module)
        if call.order == "samples" or dimensions is None:
            return inputs, grad

        def turn(x: Tensor, trailing: int) -> Tensor:
            return x.reshape(-1, self._samples, *x.shape[x.dim() - trailing :]).transpose(0, 1)

        return turn(inputs, dimensions[0]), turn(grad, dimensions[1])

    def _emit(self, layer: _Layer) -> None:
        calls = []
        for call in layer.calls:
            if call.grad is not None and call.inputs is not None:
                if call.inputs._version != call.version:
                    raise RuntimeError(
                        f"model: expected inputs of {layer_path(layer.parameters)!r} to be left as they are, "
                        "got an operation that changes them in place"
                    )
                calls.append(self._rows(layer, call, call.inputs, call.grad))
            call.grad = None
            if self._last:
                call.inputs = None
        if calls and self._consume is not None:
            known = formulas(layer.module)
            for own, name in layer.parameters.items():
                self._consume(name, known[own](layer.module, calls, self._samples))


def _spread(x: Tensor, samples: int) -> Tensor:
    """What all samples share, once for each."""
    return x.expand(samples, *x.shape[1:] if x.dim() and len(x) == 1 else x.shape)

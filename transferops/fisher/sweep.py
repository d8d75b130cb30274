"""Per-sample gradients of a batch, all parameters by their routes, one sweep for each cotangent of the outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from transferops.fisher.batches import Batch
from transferops.fisher.capture import Capture
from transferops.fisher.collect import Collector
from transferops.fisher.directions import Direction
from transferops.fisher.fallback import PerSampleGradients
from transferops.fisher.layers import Gradients, Rows
from transferops.fisher.likelihood import Likelihood
from transferops.fisher.routes import Routes, plan
from transferops.fisher.trial import check, forward_size

Result = TypeVar("Result")


class Sweeper:
    """Keeps the routes of one model from batch to batch; they are checked anew for samples of another shape."""

    def __init__(self, model: nn.Module, chunk_size: int | None) -> None:
        self._model = model
        self._chunk_size = chunk_size
        self._checked: dict[Any, tuple[Any, list[object]]] = {}

    def routes(self, parameters: Direction, batch: Batch) -> Routes:
        """The checked routes of some parameters for samples like those of a batch."""

        def make() -> Routes:
            routes = plan(self._model, parameters)
            check(self._model, routes, parameters, batch)
            return routes

        return self._once(make, parameters, batch)

    def forward_size(self, parameters: Direction, layers: Mapping[str, nn.Module], batch: Batch, most: int) -> int:
        """Along how many directions of some parameters such samples' outputs can be differentiated forwards at once."""

        def make() -> int:
            return forward_size(self._model, parameters, layers, batch, most)

        return self._once(make, parameters, batch, most, *layers)

    def _once(self, make: Callable[[], Result], parameters: Direction, batch: Batch, *more: object) -> Result:
        """What was made for such parameters and samples of the model as it is, or is made now."""
        parts: list[object] = []
        for module in self._model.modules():
            parts += (module, *module._parameters.values())
        shapes = tuple((name, p.shape, p.dtype) for name, p in parameters.items())
        autocast = torch.is_autocast_enabled(next(self._model.parameters()).device.type)
        key = (make.__qualname__, shapes, tuple(map(id, parts)), batch.signature, autocast, *more)
        if key not in self._checked:
            try:
                self._checked[key] = make(), parts  # which, being kept, keep their ids
            except (RuntimeError, TypeError, ValueError, IndexError):
                with torch.no_grad():
                    batch.run(self._model)  # what is wrong with the whole batch says more
                raise
        result: Result = self._checked[key][0]
        return result

    def sweeps(
        self, parameters: Direction, batch: Batch, likelihood: Likelihood, collector: Collector
    ) -> Iterator[Tensor]:
        """Hand all per-sample gradients to a collector; yields each cotangent of the outputs when it is done."""
        routes = self.routes(parameters, batch)
        by_sample = None
        if routes.fallback:
            by_sample = PerSampleGradients(self._model, routes.fallback, self._chunk_size, routes.vectorised)
        device = next(self._model.parameters()).device.type

        def add(rows: slice, name: str, gradients: Gradients) -> None:
            # Autocast is for the model; what is made of its gradients keeps their precision. Entered only where it is
            # on: for each of many small parameters it costs more than they do.
            on = torch.is_autocast_enabled(device)
            with torch.autocast(device, enabled=False) if on else contextlib.nullcontext():
                collector.add(name, gradients, rows)

        with Capture(self._model, routes.captured, routes.expanded, routes.layout, routes.attention) as capture:
            outputs = capture.forward(batch)
            final = likelihood.count(outputs) - 1
            for m, cotangent in enumerate(likelihood.cotangents(batch, outputs)):
                collector.begin(batch.samples, m == 0)
                capture.backward(outputs, cotangent, partial(add, slice(None)), last=m == final)
                if by_sample:
                    for rows, gradients in by_sample.chunks(batch, cotangent):
                        for name, values in gradients.items():
                            add(rows, name, Rows(values))
                collector.end()
                yield cotangent

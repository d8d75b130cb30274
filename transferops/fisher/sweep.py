"""Per-sample gradients of a batch, all parameters by their routes, one sweep for each cotangent of the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

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
from transferops.fisher.trial import check


class Sweeper:
    """Keeps the routes of one model from batch to batch; they are checked anew for samples of another shape."""

    def __init__(self, model: nn.Module, chunk_size: int | None) -> None:
        self._model = model
        self._chunk_size = chunk_size
        self._checked: dict[Any, tuple[Routes, list[object]]] = {}

    def routes(self, parameters: Direction, batch: Batch) -> Routes:
        """The checked routes of some parameters for samples like those of a batch."""
        parts: list[object] = [*self._model.modules(), *self._model.parameters()]
        shapes = tuple((name, p.shape, p.dtype) for name, p in parameters.items())
        key = (shapes, tuple(map(id, parts)), batch.signature)
        if key not in self._checked:
            routes = plan(self._model, parameters)
            check(self._model, routes, parameters, batch)
            self._checked[key] = routes, parts  # which, being kept, keep their ids
        return self._checked[key][0]

    def sweeps(
        self, parameters: Direction, batch: Batch, likelihood: Likelihood, collector: Collector
    ) -> Iterator[Tensor]:
        """Hand all per-sample gradients to a collector; yields each cotangent of the outputs when it is done."""
        routes = self.routes(parameters, batch)
        by_sample = PerSampleGradients(self._model, routes.fallback, self._chunk_size)
        device = next(self._model.parameters()).device.type

        def add(rows: slice, name: str, gradients: Gradients) -> None:
            # Autocast is for the model; what is made of its gradients keeps their precision.
            with torch.autocast(device, enabled=False):
                collector.add(name, gradients, rows)

        with Capture(self._model, routes.captured, routes.expanded, routes.layout, routes.attention) as capture:
            outputs = capture.forward(batch)
            final = likelihood.count(outputs) - 1
            for m, cotangent in enumerate(likelihood.cotangents(batch, outputs)):
                collector.begin(batch.samples, m == 0)
                capture.backward(outputs, cotangent, partial(add, slice(None)), last=m == final)
                if routes.fallback:
                    for rows, gradients in by_sample.chunks(batch, cotangent):
                        for name, values in gradients.items():
                            add(rows, name, Rows(values))
                collector.end()
                yield cotangent

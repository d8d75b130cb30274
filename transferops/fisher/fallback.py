"""Per-sample gradients formed one by one, for parameters without a formula: correct for every model, at a price.

The gradients [chunk, *shape] of a few samples at a time are in memory; each chunk is one forward and one backward
pass of the whole model under torch.func, or a plain loop over samples where that refuses the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from transferops.fisher.batches import Batch
from transferops.fisher.directions import Direction
from transferops.fisher.modes import function_transforms, gradients_for, unfused_recurrence

_CHUNK_ELEMENTS = 1 << 24  # of per-sample gradients at a time: 64 MiB in float32


def pull_back(model: nn.Module, names: Collection[str], batch: Batch, cotangent: Tensor) -> Direction:
    """sum_n J_n^T b_n: the gradient of sum(outputs * cotangent) in some parameters, zero where there is none."""
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    with gradients_for(model, names):
        outputs = batch.run(model)
        if not outputs.requires_grad:
            return {name: torch.zeros_like(p.detach()) for name, p in parameters.items()}
        found = torch.autograd.grad(outputs, list(parameters.values()), cotangent, allow_unused=True)
    return {
        name: torch.zeros_like(p.detach()) if g is None else (g.to_dense() if g.is_sparse else g)
        for (name, p), g in zip(parameters.items(), found)
    }


def count_reads(model: nn.Module, names: Collection[str], batch: Batch) -> tuple[Counter[str], bool]:
    """How often the outputs' graph reads each of some parameters, and whether one past its module.

    A parameter kept in a list or a closure, too, is read there by autograd but not by ``torch.func``, which replaces
    the modules' own; in a model that ``torch.func`` refuses every read is such a one. Reads within reentrant
    checkpoints are not seen.
    """
    every: dict[str, Tensor] = dict(model.named_parameters())
    with gradients_for(model, names):
        twins: dict[str, Tensor] = {name: p.detach().requires_grad_(name in names) for name, p in every.items()}
        try:
            outputs = batch.run(model, twins)
        except RuntimeError:
            twins, outputs = every, batch.run(model)
    own = {id(twins[name]): name for name in names}
    reads: Counter[str] = Counter()
    past = twins is every
    nodes = [outputs.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        for following, _ in node.next_functions if node is not None else ():
            leaf = getattr(following, "variable", None)
            if leaf is None:
                if following not in seen:
                    seen.add(following)
                    nodes.append(following)
            elif id(leaf) in own:
                reads[own[id(leaf)]] += 1
            else:
                past = past or any(leaf is every[name] for name in names)
    return reads, past


class PerSampleGradients:
    """Gradients of some parameters, sample by sample.

    Args:
        model: the model.
        names: the parameters.
        chunk_size: samples at a time; None for as many as 64 MiB of float32 gradients hold.
        vectorised: whether to try ``torch.vmap``.
    """

    def __init__(
        self, model: nn.Module, names: Collection[str], chunk_size: int | None, vectorised: bool = True
    ) -> None:
        every = dict(model.named_parameters())
        self._model = model
        self._parameters = {name: every[name].detach() for name in names}
        size = sum(p.numel() for p in self._parameters.values())
        self._chunk = chunk_size or max(1, _CHUNK_ELEMENTS // max(1, size))
        self._vectorised = vectorised

    def chunks(self, batch: Batch, cotangent: Tensor) -> Iterator[tuple[slice, Direction]]:
        """Which samples, and their gradients of sum(outputs * cotangent): name to [chunk, *shape]."""
        for start in range(0, batch.samples, self._chunk):
            stop = min(start + self._chunk, batch.samples)
            yield slice(start, stop), self._gradients(batch.rows(start, stop), cotangent[start:stop])

    def _gradients(self, batch: Batch, cotangent: Tensor) -> Direction:
        if self._vectorised and batch.samples > 1:
            try:
                return self._vectorised_gradients(batch, cotangent)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, ValueError):
                self._vectorised = False  # what is wrong with the model itself, the loop raises again
        each = [
            pull_back(self._model, self._parameters, batch.rows(n, n + 1), cotangent[n : n + 1])
            for n in range(batch.samples)
        ]
        return {name: torch.stack([g[name] for g in each]) for name in self._parameters}

    def _vectorised_gradients(self, batch: Batch, cotangent: Tensor) -> Direction:
        names = list(batch.inputs) if isinstance(batch.inputs, dict) else None
        values = list(batch.inputs.values()) if isinstance(batch.inputs, dict) else [batch.inputs]
        dims = tuple(0 if batch.holds_samples(value) else None for value in values)

        def inner_product(parameters: Direction, weight: Tensor, *sample: Any) -> Tensor:
            rows = [v.unsqueeze(0) if d == 0 else v for v, d in zip(sample, dims)]
            inputs: Any = rows[0] if names is None else dict(zip(names, rows))
            outputs = Batch(batch.index, inputs, None, 1).run(self._model, parameters)
            return (outputs[0] * weight).sum()

        with function_transforms(gradients=True), unfused_recurrence(self._model):
            per_sample = vmap(grad(inner_product), in_dims=(None, 0, *dims))
            result: Direction = per_sample(self._parameters, cotangent, *values)
        return result

"""What every quantity of a Fisher information needs: the model, the estimator, and sweeps over batches."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transferops._transfer import ahead, is_gpu
from transferops._validate import check_positive_int, describe, fail
from transferops.fisher.batches import Batch
from transferops.fisher.collect import Collector, Scores
from transferops.fisher.directions import Direction, Directions, Selection, check_direction, check_directions, select
from transferops.fisher.exact import Tangents, push_forward
from transferops.fisher.graphs import Graphs
from transferops.fisher.likelihood import ESTIMATORS, LOSSES, Likelihood
from transferops.fisher.modes import evaluation, gradients_for, recurrent_gradients
from transferops.fisher.routes import Routes
from transferops.fisher.sweep import Sweeper

_DIRECTIONS_AT_ONCE = 5  # forwards: a few share the forward pass; each needs the memory of a pass's activations


class Estimation:
    """The arguments of :class:`transferops.fisher.FisherInformation`, checked, and the passes over a batch."""

    def __init__(
        self,
        model: nn.Module,
        estimator: str,
        loss: str,
        chunk_size: int | None,
        parameters: Selection,
        draws: int,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        autocast: torch.dtype | None,
        cuda_graphs: bool,
    ) -> None:
        if not isinstance(model, nn.Module):
            fail("model", "a torch.nn.Module", describe(model), TypeError)
        for argument, value, accepted in (("estimator", estimator, ESTIMATORS), ("loss", loss, LOSSES)):
            if value not in accepted:
                fail(argument, " or ".join(repr(a) for a in accepted), describe(value))
        if chunk_size is not None:
            check_positive_int("chunk_size", chunk_size)
        if dtype not in (None, torch.float32, torch.float64):
            fail("dtype", "torch.float32 or torch.float64", str(dtype))
        if autocast not in (None, torch.float16, torch.bfloat16):
            fail("autocast", "torch.float16 or torch.bfloat16", str(autocast))
        self.model = model
        self.estimator = estimator
        self.loss = loss
        self.seed = check_positive_int("seed", seed, minimum=0)
        self._draws = check_positive_int("draws", draws)
        self._chunk_size = chunk_size
        self._parameters = parameters
        self._dtype = dtype
        self._device = _parse_device(device)
        self._autocast = autocast
        self._sweeper = Sweeper(model, chunk_size)
        self.graphs = Graphs(model) if cuda_graphs else None

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """The model in evaluation mode, under the autocast asked for."""
        with evaluation(self.model), recurrent_gradients(self.model), contextlib.ExitStack() as stack:
            if self._autocast is not None:
                # Without autocast's cache: a weight that a pass without gradients has cast would have none in the next.
                device = next((p.device.type for p in self.model.parameters()), "cpu")
                stack.enter_context(torch.autocast(device, self._autocast, cache_enabled=False))
            yield

    def zeros(self, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """A sum over samples of what belongs to a parameter, empty yet."""
        dtype = self._dtype or torch.promote_types(parameter.dtype, torch.float32)
        return torch.zeros(tuple(shape), dtype=dtype, device=self._device or parameter.device)

    def numbers(self, *shape: int) -> Tensor:
        """A sum over samples of numbers, float64, empty yet."""
        device = self._device or next(self.model.parameters()).device
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def likelihood(self) -> Likelihood:
        """The likelihood, its random draws at their beginning."""
        return Likelihood(self.estimator, self.loss, self._draws, self.seed)

    def selected(self) -> Direction:
        """The parameters that J is over."""
        return select(self.model, self._parameters)

    def movable(self) -> Direction:
        """The parameters that a direction may name."""
        if self._parameters is not None:
            return self.selected()
        movable = {name: p.detach() for name, p in self.model.named_parameters()}
        if not movable:
            fail("model", "a module with parameters", "one without")
        return movable

    def directions(self, given: Any) -> Directions:
        """K directions, checked."""
        return check_directions(given, self.model, self.movable(), self.selected)

    def direction(self, given: Any) -> Directions:
        """One direction over selected parameters, checked."""
        selected = self.selected()
        moves = check_direction("direction", given, self.model, selected, self.selected)
        if not moves:
            fail("direction", "at least one parameter to move", "an empty dictionary")
        return Directions([moves], ["direction"], selected)

    def batches(self, given: Iterable[Any]) -> Iterator[Batch]:
        """Batches on the model's device; on a GPU each is copied there during the work on the one before."""
        device = next(self.model.parameters()).device
        return ahead(enumerate(given), lambda item: Batch.parse(*item, device), lambda batch: batch.tensors, device)

    def routes(self, parameters: Direction, batch: Batch) -> Routes:
        """The routes of some parameters for samples like those of a batch."""
        with gradients_for(self.model, ()):
            return self._sweeper.routes(parameters, batch)

    def collect(self, parameters: Direction, batch: Batch, likelihood: Likelihood, collector: Collector) -> None:
        """Hand the per-sample gradients of a batch to a collector, one sweep for each cotangent of the outputs."""
        with gradients_for(self.model, ()):
            for _ in self._sweeper.sweeps(parameters, batch, likelihood, collector):
                pass

    def gram(self, directions: Directions, batch: Batch, likelihood: Likelihood) -> Tensor:
        """sum_n Theta^T J_n Theta, float64 [K, K] on the model's device."""
        if self.estimator != "exact":
            collector = Scores(directions)
            self.collect(directions.parameters, batch, likelihood, collector)
            return collector.gram
        layers, size = self._forward_routes(directions, batch)
        if self.graphs is None or not size or not is_gpu(batch.tensors[0].device):
            return likelihood.gram(batch, *self._push_forward(directions, batch, layers, size))

        def step(tangents: Tangents, batch: Batch) -> Tensor:
            parts = (tangents.part(k, k + size) for k in range(0, tangents.size, size))
            return likelihood.gram(batch, *self._joined(parts, batch, layers))

        return self.graphs.gram(directions, likelihood.heeding(batch), layers, step, (self.loss, size))

    def response(self, direction: Directions, batch: Batch, likelihood: Likelihood) -> Tensor:
        """The cotangent of the outputs that, pulled back, is sum_n J_n v."""
        if self.estimator == "exact":
            outputs, derivatives = self._push_forward(direction, batch, *self._forward_routes(direction, batch))
            return likelihood.curvature(batch, outputs, derivatives[0])
        weighted = []
        with contextlib.closing(self._scores(direction, batch, likelihood)) as sweeps:
            for cotangent, scores in sweeps:
                weighted.append(cotangent * scores.view(-1, *[1] * (cotangent.dim() - 1)).to(cotangent.dtype))
        return torch.stack(weighted).sum(0)

    def _scores(
        self, directions: Directions, batch: Batch, likelihood: Likelihood
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Each cotangent of the outputs, and the scores [N, K] of its gradients."""
        collector = Scores(directions)
        with gradients_for(self.model, ()):
            for cotangent in self._sweeper.sweeps(directions.parameters, batch, likelihood, collector):
                yield cotangent, collector.scores

    def _push_forward(
        self, directions: Directions, batch: Batch, layers: Mapping[str, nn.Module], size: int
    ) -> tuple[Tensor, Tensor]:
        """Outputs and their derivatives along all directions, a few at a time."""
        if not size:
            return self._outputs_one_by_one(directions, batch)
        parts = (Tangents.of(directions.part(k, k + size), layers) for k in range(0, len(directions), size))
        return self._joined(parts, batch, layers)

    def _joined(
        self, parts: Iterable[Tangents], batch: Batch, layers: Mapping[str, nn.Module]
    ) -> tuple[Tensor, Tensor]:
        found = [push_forward(self.model, tangents, batch, layers) for tangents in parts]
        return found[0][0], torch.cat([derivatives for _, derivatives in found])

    def _forward_routes(self, directions: Directions, batch: Batch) -> tuple[dict[str, nn.Module], int]:
        """The layers that move by products, and along how many directions at once; 0 for none."""
        products = {name: p for name, p in directions.parameters.items() if directions.low_rank(name)}
        layers = self.routes(products, batch).linear_layers() if products else {}
        most = min(self._chunk_size or _DIRECTIONS_AT_ONCE, len(directions))
        with gradients_for(self.model, ()):
            return layers, self._sweeper.forward_size(directions.parameters, layers, batch, most)

    def _outputs_one_by_one(self, directions: Directions, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same by a backward pass for each output of a sample: the scores of its gradient."""
        with torch.no_grad():
            outputs = batch.run(self.model)
        units = Likelihood("exact", "mse", 1, self.seed)
        with contextlib.closing(self._scores(directions, batch, units)) as sweeps:
            rows = torch.stack([scores.T for _, scores in sweeps], -1)
        return outputs, rows.view(len(directions), *outputs.shape).to(outputs.dtype)


def _parse_device(device: Any) -> torch.device | None:
    if device is None:
        return None
    expected = "a device that holds values, or the name of one"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        fail("device", expected, describe(device))
    if found.type == "meta":
        fail("device", expected, repr("meta"))
    return found

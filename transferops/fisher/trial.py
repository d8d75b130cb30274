"""Routes checked on one and two samples before they are used.

A formula holds for a layer called as a module, on rows that belong to one sample each, whose parameters nothing else
reads. What a model does in its forward cannot be seen from outside, so every fast route is tried: on one sample, the
gradient must be autograd's; on two, the rows of the second must be found again, and copies of what the samples share
must have each its own part of the gradient. A parameter that fails goes to the per-sample fallback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transferops._validate import fail
from transferops.fisher.batches import Batch
from transferops.fisher.capture import Capture, Layout, layer_path
from transferops.fisher.directions import Direction, refuse_infinite
from transferops.fisher.fallback import pull_back
from transferops.fisher.layers import Gradients, one_call_only, row_dimensions
from transferops.fisher.routes import Routes, copy_shapes

# How far, relative to its norm, a gradient may be from autograd's, and a row from the same row in another batch: more
# than rounding makes, less than a wrong formula does.
_TOLERANCES = {torch.float64: (1e-5, 1e-8), torch.float32: (2e-2, 1e-3)}
_LOW_PRECISION = (0.2, 5e-2)
_NEGLIGIBLE = 1e-3  # times the tolerance: what may be missing, relative to the gradient of all parameters

Calls = Mapping[nn.Module, list[Tensor]]
Unit = nn.Module | tuple[str, tuple[int, ...]]
"""What gets copies: a layer of which the samples share the input, or a parameter in the shape of its copies."""


def check(model: nn.Module, routes: Routes, parameters: Direction, batch: Batch) -> None:
    """Complete the routes with the layout of each layer; move parameters that fail to the fallback.

    Raises:
        ValueError: the outputs of a sample depend on the rest of its batch.
    """
    sample = batch.rows(batch.samples - 1, batch.samples)
    single, outputs = _inputs(model, routes, sample)
    refuse_infinite([outputs])
    cotangent = _cotangent(outputs)
    trial = _Trial(model, routes, pull_back(model, parameters, sample, cotangent), cotangent)
    if batch.samples > 1:
        pair = batch.rows(batch.samples - 2, batch.samples)
        double, together = _inputs(model, routes, pair)
        routes.layout = _find_layout(single, double)
        if not _close(together[1:], outputs):
            lost = next((own for module, own in routes.captured.items() if module not in routes.layout), None)
            where = f" (first seen at the input of {layer_path(lost)!r})" if lost else ""
            expected = "outputs of a sample that do not depend on the rest of its batch"
            fail("model", expected, f"others for the same sample in another batch{where}")
        trial.copies(pair, outputs)
    else:
        for name, shape in list(routes.expanded.items()):
            if shape != parameters[name].shape[1:]:
                routes.refuse(name, "whether copies follow it is not to be seen from one sample")
        routes.layout = {m: tuple(Layout("samples", a.numel()) for a in single[m]) for m in routes.captured}
    for module, own in list(routes.captured.items()):
        for own_name, name in own.items():
            if not single[module]:
                routes.refuse(name, "its layer is not called as a module")
            elif module not in routes.layout:
                routes.refuse(name, "the rows of its layer's input are not the samples'")
            elif one_call_only(module, own_name) and [len(a) for a in single[module]] != [1]:
                routes.refuse(name, "several calls, or rows per sample, of a convolution")
    trial.gradients(sample)


class _Trial:
    """Gradients of the last sample by the routes against autograd's."""

    def __init__(self, model: nn.Module, routes: Routes, truth: Direction, cotangent: Tensor) -> None:
        self._model = model
        self._routes = routes
        self._truth = truth
        self._cotangent = cotangent
        self._negligible = _NEGLIGIBLE**2 * sum(_square(g) for g in truth.values())

    def gradients(self, sample: Batch) -> None:
        """Refuse captured parameters of which the gradient of the sample alone is not autograd's."""
        captured = self._routes.captured
        capture = Capture(self._model, captured, {}, attention=self._routes.attention)
        right = self._right(capture, sample, None, self._cotangent)
        for name in [name for own in captured.values() for name in own.values()]:
            # One that never comes by is right if it is zero.
            if not right.get(name, self._within(name, _square(self._truth[name]))):
                self._routes.refuse(name, "its gradient is not that of its layer's calls: read elsewhere, too")

    def copies(self, pair: Batch, outputs: Tensor) -> None:
        """Refuse copies with which the second of two samples gets another gradient, or the first a part of it."""
        routes = self._routes
        shared = [m for m, layout in routes.layout.items() if any(call.order == "shared" for call in layout)]
        weights = torch.cat([torch.zeros_like(self._cotangent), self._cotangent])

        def names(unit: Unit) -> list[str]:
            return list(routes.captured[unit].values()) if isinstance(unit, nn.Module) else [unit[0]]

        def hold(some: Sequence[Unit]) -> bool:
            modules = {unit: routes.captured[unit] for unit in some if isinstance(unit, nn.Module)}
            expanded = dict(unit for unit in some if not isinstance(unit, nn.Module))
            try:
                capture = Capture(self._model, modules, expanded, routes.layout, routes.attention)
                right = self._right(capture, pair, outputs, weights)
            except (RuntimeError, ValueError, TypeError, AssertionError, IndexError):
                return False  # shapes that the model does not take
            return all(right.get(name, False) for unit in some for name in names(unit))

        def alternatives(unit: Unit) -> list[Unit]:
            if isinstance(unit, nn.Module):
                return [unit]
            return [(unit[0], shape) for shape in copy_shapes(self._truth[unit[0]].shape)]

        units: list[Unit] = [*routes.expanded.items(), *shared]
        if hold(units):
            return
        fits = [next((fit for fit in alternatives(unit) if hold([fit])), None) for unit in units]
        good = [fit for fit in fits if fit is not None]
        good = good if hold(good) else []
        routes.expanded.update(unit for unit in good if not isinstance(unit, nn.Module))
        kept = {name for unit in good for name in names(unit)}
        for name in [name for unit in units for name in names(unit) if name not in kept]:
            routes.refuse(name, "shared by the samples in a way that copies do not follow")

    def _right(self, capture: Capture, batch: Batch, expected: Tensor | None, cotangent: Tensor) -> dict[str, bool]:
        """Of every parameter that comes by, whether the last sample has its gradient and the others have none.

        |f - g|^2 = |f|^2 - 2 f.g + |g|^2, of which the route f gives the first two terms and autograd g the last.
        """
        right: dict[str, bool] = {}

        def compare(name: str, gradients: Gradients) -> None:
            g = self._truth[name]
            inner = float(gradients.project([g])[-1])
            distance = float(gradients.norms().sum(dtype=torch.float64)) - 2 * inner + _square(g)
            right[name] = self._within(name, distance)

        with capture:
            outputs = capture.forward(batch)
            if expected is None or _close(outputs[1:], expected):
                capture.backward(outputs, cotangent, compare)
        return right

    def _within(self, name: str, squared_distance: float) -> bool:
        g = self._truth[name]
        return squared_distance <= _tolerances(g)[0] ** 2 * (_square(g) + self._negligible)


def _find_layout(single: Calls, double: Calls) -> dict[nn.Module, tuple[Layout, ...]]:
    """The layout of the layers in which a sample's rows are found again when another sample precedes it."""
    found = {}
    for module, one in single.items():
        orders = [_order(module, a, b) for a, b in zip(one, double[module])]
        if len(one) == len(double[module]) and None not in orders:
            found[module] = tuple(Layout(str(order), a.numel()) for order, a in zip(orders, one))
    return found


def _order(module: nn.Module, a: Tensor, b: Tensor) -> str | None:
    """Where the rows ``a`` of a sample are in the rows ``b`` of two, of which it is the second."""
    if a.dim() > 0 and len(b) == 2 * len(a) and _close(b[len(a) :], a):
        return "samples"
    dimensions = row_dimensions(module)
    if dimensions is None:
        return None
    if a.shape == b.shape:
        return "shared" if _close(b, a) else None
    if b.numel() == 2 * a.numel():
        rows = b.reshape(-1, 2, *b.shape[b.dim() - dimensions[0] :])[:, 1]
        return "positions" if _close(rows, a.reshape(rows.shape)) else None
    return None


def _inputs(model: nn.Module, routes: Routes, batch: Batch) -> tuple[dict[nn.Module, list[Tensor]], Tensor]:
    """The inputs of every call of the captured layers, and the outputs."""
    with Capture(model, routes.captured, {}, attention=routes.attention) as capture:
        outputs = capture.forward(batch)
        return {module: capture.calls(module) for module in routes.captured}, outputs.detach()


def _cotangent(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)


def _tolerances(values: Tensor) -> tuple[float, float]:
    low = torch.is_autocast_enabled(values.device.type)
    return _LOW_PRECISION if low else _TOLERANCES.get(values.dtype, _LOW_PRECISION)


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())


def _close(rows: Tensor, reference: Tensor) -> bool:
    if rows.shape != reference.shape:
        return False
    if not reference.is_floating_point():
        return torch.equal(rows, reference)
    tolerance = _tolerances(reference)[1]
    size = reference.abs().max() if reference.numel() else 0.0
    return bool(((rows - reference).abs() <= tolerance * size).all())

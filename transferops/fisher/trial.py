"""Routes checked on one and two samples before they are used.

A formula holds for a layer called as a module, on rows that belong to one sample each, whose parameters nothing else
reads. What a model does in its forward cannot be seen from outside, so every fast route is tried: on one sample, the
gradient must be autograd's, of parameters read by their layers' calls only; on two, in either order, the rows of the
one must be found again, and copies of what the samples share must have each its own part of the gradient. A parameter
that fails goes to the per-sample fallback. Forward-mode derivatives must be those of the gradient, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from transferops._validate import fail
from transferops.fisher.batches import Batch
from transferops.fisher.capture import Capture, Layout, layer_path
from transferops.fisher.directions import Direction, Directions, LowRank, Move, dense, refuse_infinite
from transferops.fisher.exact import Tangents, push_forward
from transferops.fisher.fallback import count_reads, pull_back
from transferops.fisher.layers import Gradients, one_call_only, row_dimensions
from transferops.fisher.routes import Routes, copy_shapes


class _Tolerances(NamedTuple):
    """How far from each other, relative to their norm, two may be: more than rounding makes, less than a wrong formula.

    Attributes:
        gradient: of a parameter from autograd's.
        row: of a layer's input or the outputs from the same in another batch.
        forward: a forward-mode derivative from the backward one.
    """

    gradient: float
    row: float
    forward: float


# Of float64, the rows leave room for a part of the model that computes in float32.
_TOLERANCES = {torch.float64: _Tolerances(1e-5, 1e-6, 1e-6), torch.float32: _Tolerances(2e-2, 1e-3, 1e-4)}
_LOW_PRECISION = _Tolerances(0.2, 5e-2, 5e-2)
_NEGLIGIBLE = 1e-3  # times the tolerance: what may be missing, relative to the gradient of all parameters
_PROBES = 2  # random directions along which forward-mode derivatives are compared

Calls = Mapping[nn.Module, list[Tensor]]
Unit = nn.Module | tuple[str, tuple[int, ...]]
"""What gets copies: a layer of which the samples share the input, or a parameter in the shape of its copies."""


def check(model: nn.Module, routes: Routes, parameters: Direction, batch: Batch) -> None:
    """Complete the routes with the layout of each layer; move parameters that fail to the fallback.

    Raises:
        ValueError: the outputs of a sample depend on the rest of its batch.
    """
    last, tolerances = batch.samples - 1, tolerances_of(*model.parameters())
    sample = batch.pick(last)
    single, outputs = _inputs(model, routes, sample)
    refuse_infinite([outputs])
    cotangent = _cotangent(outputs)
    trial = _Trial(model, routes, pull_back(model, parameters, sample, cotangent), cotangent, tolerances)
    reads, past = count_reads(model, parameters, sample)
    routes.vectorised = not past
    if batch.samples > 1:
        pair = batch.pick(0, last)
        double, together = _inputs(model, routes, pair)
        routes.layout = _find_layout(single, double, _inputs(model, routes, batch.pick(last, 0))[0], tolerances)
        if not _close(together[1:], outputs, tolerances):
            lost = next((own for module, own in routes.captured.items() if module not in routes.layout), None)
            _refuse_coupled(f" (first seen at the input of {layer_path(lost)!r})" if lost else "")
        trial.copies(pair, outputs)
    else:
        for name, shape in list(routes.expanded.items()):
            if shape != parameters[name].shape[1:]:
                routes.refuse(name, "whether copies follow it is not to be seen from one sample")
        routes.layout = {m: tuple(Layout("samples", a.numel()) for a in single[m]) for m in routes.captured}
    ragged = _may_be_ragged(model, sample, single, routes.layout)
    for module, own in list(routes.captured.items()):
        for own_name, name in own.items():
            if not single[module]:
                routes.refuse(name, "its layer is not called as a module")
            elif module not in routes.layout:
                routes.refuse(name, "the rows of its layer's input are not the samples'")
            elif module in ragged:
                routes.refuse(name, "how many rows of its layer's input a sample has may depend on its values")
            elif one_call_only(module, own_name) and [len(a) for a in single[module]] != [1]:
                routes.refuse(name, "several calls, or rows per sample, of a convolution")
            elif reads[name] > len(single[module]):
                routes.refuse(name, "read elsewhere than in its layer's calls, too")
    trial.gradients(sample)


def forward_size(
    model: nn.Module, parameters: Direction, layers: Mapping[str, nn.Module], batch: Batch, most: int
) -> int:
    """Along how many directions the outputs can be differentiated forwards at once: ``most``, 1, or 0 for none.

    The derivatives J v of a sample along random directions must have the inner product with a cotangent b that v has
    with its gradient J^T b: a part without a forward-mode derivative raises, a parameter that is read past its module
    and a rule that differs from that of the backward pass show here.

    Args:
        model: the model, none of its parameters asking for a gradient.
        parameters: those that move.
        layers: as of :func:`transferops.fisher.exact.push_forward`.
        batch: the samples.
        most: directions.

    Raises:
        ValueError: the outputs of a sample depend on the rest of its batch.
    """
    last, tolerances = batch.samples - 1, tolerances_of(*model.parameters())
    sample = batch.pick(last)
    with torch.no_grad():
        outputs = sample.run(model)
        refuse_infinite([outputs])
        if last and not _close(batch.pick(0, last).run(model)[1:], outputs, tolerances):
            _refuse_coupled("")
    cotangent = _cotangent(outputs)
    allowed = tolerances.forward * len(parameters) ** 0.5
    try:
        truth = pull_back(model, parameters, sample, cotangent)
    except NotImplementedError:  # a function of the user's own, with the one derivative and without the other
        truth, allowed = {name: torch.zeros_like(p) for name, p in parameters.items()}, math.inf
    # In a probe every parameter has a part of this size in the inner product, unless its gradient is negligible.
    unit = 10 * tolerances.row * sum(map(_square, truth.values())) ** 0.5 or 1.0
    probes = _probes(parameters, layers, {name: unit / max(unit, _square(g) ** 0.5) for name, g in truth.items()})
    wanted = [sum(float((dense(v[n], p).double() * truth[n]).sum()) for n, p in parameters.items()) for v in probes]
    moved = Directions(probes, ["probe"] * len(probes), parameters)
    for size in dict.fromkeys((most, 1)):
        step = min(size, len(probes))
        try:
            tangents = Tangents.of(moved, layers)
            parts = [
                push_forward(model, tangents.part(k, k + step), sample, layers) for k in range(0, len(probes), step)
            ]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, ValueError):
            continue
        found = torch.cat([derivatives for _, derivatives in parts]).double() * cotangent.double()
        if all(abs(float(f.sum()) - w) <= allowed * unit for f, w in zip(found, wanted)):
            return size
    return 0


def _probes(
    parameters: Direction, layers: Mapping[str, nn.Module], scales: Mapping[str, float]
) -> list[dict[str, Move]]:
    """Random directions, as products where layers take them."""
    generator = torch.Generator().manual_seed(0)

    def random(name: str) -> Move:
        p = parameters[name]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(p)

        if name in layers:
            return LowRank(normal(len(p), 1) * scales[name], normal(1, p[0].numel()))
        return normal(*p.shape) * scales[name]

    return [{name: random(name) for name in parameters} for _ in range(_PROBES)]


def _refuse_coupled(where: str) -> NoReturn:
    expected = "outputs of a sample that do not depend on the rest of its batch"
    fail("model", expected, f"others for the same sample in another batch{where}")


class _Trial:
    """Gradients of the last sample by the routes against autograd's."""

    def __init__(
        self, model: nn.Module, routes: Routes, truth: Direction, cotangent: Tensor, tolerances: _Tolerances
    ) -> None:
        self._model = model
        self._routes = routes
        self._truth = truth
        self._cotangent = cotangent
        self._tolerances = tolerances
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
            if expected is None or _close(outputs[1:], expected, self._tolerances):
                capture.backward(outputs, cotangent, compare)
        return right

    def _within(self, name: str, squared_distance: float) -> bool:
        g = self._truth[name]
        return squared_distance <= self._tolerances.gradient**2 * (_square(g) + self._negligible)


def _find_layout(
    single: Calls, second: Calls, first: Calls, tolerances: _Tolerances
) -> dict[nn.Module, tuple[Layout, ...]]:
    """The layout of the layers in which a sample's rows are found again beside another sample, second and first.

    In both places: a model that sorts its batch leaves one of the two orders as it is.
    """
    found = {}
    for module, one in single.items():
        orders = [_order(module, a, b, 1, tolerances) for a, b in zip(one, second[module])]
        swapped = [_order(module, a, b, 0, tolerances) for a, b in zip(one, first[module])]
        if orders == swapped and len(one) == len(second[module]) == len(first[module]) and None not in orders:
            found[module] = tuple(Layout(str(order), a.numel()) for order, a in zip(orders, one))
    return found


def _order(module: nn.Module, a: Tensor, b: Tensor, place: int, tolerances: _Tolerances) -> str | None:
    """Where the rows ``a`` of a sample are in the rows ``b`` of two, of which it is the first or second."""
    if a.dim() > 0 and len(b) == 2 * len(a) and _close(b[place * len(a) :][: len(a)], a, tolerances):
        return "samples"
    dimensions = row_dimensions(module)
    if dimensions is None:
        return None
    if a.shape == b.shape:
        return "shared" if _close(b, a, tolerances) else None
    if b.numel() == 2 * a.numel():
        rows = b.reshape(-1, 2, *b.shape[b.dim() - dimensions[0] :])[:, place]
        return "positions" if _close(rows, a.reshape(rows.shape), tolerances) else None
    return None


def _may_be_ragged(
    model: nn.Module, sample: Batch, single: Calls, layouts: Mapping[nn.Module, Sequence[Layout]]
) -> set[nn.Module]:
    """The layers of which other samples may have another number of rows, for all that their shapes tell."""
    laid_out: dict[nn.Module, bool] = {}  # along one dimension; and of one row, as a sample is with none but features
    for module, layout in layouts.items():
        rows = row_dimensions(module)
        for a, call in zip(single[module], layout):
            flat = rows is not None and a.dim() <= rows[0] + 1
            if call.order != "shared" and (flat or (call.order == "samples" and len(a) > 1)):
                laid_out[module] = laid_out.get(module, True) and a.dim() > 0 and len(a) == 1
    if not laid_out:
        return set()
    with torch.no_grad(), _Watch() as watch:
        sample.run(model)
    return {module for module, one_row in laid_out.items() if watch.sizes or (watch.numbers and not one_row)}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices operations whose results have sizes that depend on values, and those that read numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = self.numbers = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:  # of a fixed size for positions, not for masks
            self.sizes |= any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        else:
            self.sizes |= torch.Tag.dynamic_output_shape in func.tags
            self.sizes |= func is torch.ops.aten._pack_padded_sequence.default
            self.numbers |= torch.Tag.data_dependent_output in func.tags
        return func(*args, **(kwargs or {}))


def _inputs(model: nn.Module, routes: Routes, batch: Batch) -> tuple[dict[nn.Module, list[Tensor]], Tensor]:
    """The inputs of every call of the captured layers, and the outputs."""
    with Capture(model, routes.captured, {}, attention=routes.attention) as capture:
        outputs = capture.forward(batch)
        return {module: capture.calls(module) for module in routes.captured}, outputs.detach()


def _cotangent(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)


def tolerances_of(*values: Tensor) -> _Tolerances:
    """Those of the least precise."""
    if any(torch.is_autocast_enabled(device) for device in {v.device.type for v in values}):
        return _LOW_PRECISION
    return max(_TOLERANCES.get(dtype, _LOW_PRECISION) for dtype in {v.dtype for v in values})


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())


def _close(rows: Tensor, reference: Tensor, tolerances: _Tolerances) -> bool:
    if rows.shape != reference.shape:
        return False
    if not reference.is_floating_point():
        return torch.equal(rows, reference)
    tolerance = max(tolerances, tolerances_of(reference)).row
    size = reference.abs().max() if reference.numel() else 0.0
    return bool(((rows - reference).abs() <= tolerance * size).all())

"""Inherit a share of an upstream model's parameters: any two models of one family, whatever their widths and depths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from transferops._validate import check_positive_int, describe, fail
from transferops.adapt.channel_graph import structure_of
from transferops.adapt.channels import Structure
from transferops.adapt.correspondence import (
    Correspondence,
    correspond,
    upstream_heads,
    upstream_sizes,
    upstream_widths,
)
from transferops.adapt.inheritance_report import InheritanceReport, TensorReport
from transferops.adapt.masks import (
    GRANULARITIES,
    SELECTIONS,
    Masks,
    Selector,
    block_of,
    check_choice,
    element_masks,
    filter_masks,
    unit_masks,
)
from transferops.adapt.matching import match_names, plain_names
from transferops.fisher import FisherInformation

State = Mapping[str, torch.Tensor]


def inherit(
    target: nn.Module,
    upstream_state: nn.Module | State,
    alpha: float,
    granularity: str = "filter",
    select: str = "random",
    seed: int = 0,
    *,
    fisher: State | None = None,
    batches: Iterable[Any] | None = None,
) -> InheritanceReport:
    """Overwrite a share alpha of the target's parameters and buffers with those of an upstream model.

    Partial parameter transfer as in arXiv 2509.22056 [paper: random shares between equal networks]; other
    granularities, selections and differing shapes are [derived]. The target is changed in place, in one step after
    everything has been checked; what is not inherited keeps its value, bit for bit. alpha = 0 changes nothing;
    alpha = 1 copies whatever corresponds, so that models of equal shapes end up equal, buffers included.

    Tensors correspond as :func:`transferops.adapt.matching.match_names` says: by name, and by rescaled position where
    depths differ. Where shapes differ, channels correspond: one map for each set of tied channels (found in the
    model's graph, see :mod:`transferops.adapt.channels`), so that a layer reads the channels that another makes. A
    wider target takes the upstream channels in front; a narrower one takes the channels that ``select`` prefers.
    Kernels are aligned at their centres. Outputs or positions of different number do not correspond: such a tensor
    is left alone and the report says so.

    What is inherited:

    - "element": single elements, the share alpha of every tensor. The statistics of a norm share a mask.
    - "filter": whole channels (heads, in attention), the share alpha of every set of tied channels. A channel brings
      the rows of the weights that make it, bias, affine and statistics of its norms, and the slices of the weights
      that read it; of a weight between two layers that is 1 - (1 - alpha)^2.
    - "layer": whole layers, each with the norm that directly follows it.
    - "block": whole numbered parts (residual or transformer blocks); everything outside them by its first name.

    Which units come first: "random"; "uniform", evenly spaced; "magnitude", largest sum of squares of the upstream
    parameters (mean for layers and blocks); "fisher", largest diagonal of the upstream Fisher information, summed
    likewise. A larger alpha with the same seed contains the smaller one, except for "uniform". Counts are rounded to
    the nearest whole number.

    Args:
        target: The model to fill, initialised. Any device and floating-point dtype; upstream values are converted.
        upstream_state: A state dict, or a module (which also tells its numbers of heads).
        alpha: In [0, 1].
        granularity: See above.
        select: See above.
        seed: Of "random".
        fisher: For "fisher": diagonal by upstream parameter name, of its shape.
        batches: For "fisher" without ``fisher``: data of the upstream module, as
            :class:`transferops.fisher.FisherInformation` takes them; one Monte-Carlo draw per sample.

    Returns:
        The report.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, no tensor corresponds, a tensor that does is not finite (or is not
            in the target's dtype), or the target has parameters that are not initialised or not finite.
    """
    if not isinstance(target, nn.Module):
        fail("target", "a torch.nn.Module", describe(target), TypeError)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        fail("alpha", "a number in [0, 1]", describe(alpha))
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("select", select, SELECTIONS)
    check_positive_int("seed", seed, minimum=0)
    state = _upstream_state(upstream_state)
    importance = _importance(upstream_state, state, select, fisher, batches)
    plan = _Plan(target, upstream_state, state, importance, Selector(select, seed))
    masks = plan.masks(float(alpha), granularity)
    report = InheritanceReport(
        float(alpha), granularity, select, seed, plan.entries(masks), masks, plan.unused(masks), plan.note()
    )
    plan.write(masks)
    return report


def load_matching(model: nn.Module, state_dict: State) -> InheritanceReport:
    """Load everything from a state dict that has a place in the model, whatever the shapes.

    What ``load_state_dict(strict=False)`` still refuses: other widths, depths, heads, input channels, another number
    of classes. :func:`inherit` with alpha = 1 and evenly spaced channels where the model is narrower.

    Returns:
        The report; ``print`` it.

    Raises:
        TypeError, ValueError: As :func:`inherit`.
    """
    return inherit(model, state_dict, 1.0, "layer", "uniform")


class _Plan:
    """Two models side by side: what corresponds, what can be inherited, and why the rest cannot."""

    def __init__(
        self,
        target: nn.Module,
        upstream: nn.Module | State,
        state: State,
        importance: State | None,
        selector: Selector,
    ) -> None:
        self.state = {plain: state[name] for plain, name in plain_names(state).items()}
        self.importance = importance
        self.selector = selector
        self.tensors = _target_tensors(target)
        self.structure: Structure = structure_of(target)
        self.aliases = {name: first for name, first in _aliases(target).items() if name not in self.tensors}
        self.buffers = {name for name, _ in target.named_buffers()}
        self.names = {name: plain for plain, name in plain_names(self.tensors).items()}
        originals = {plain: name for name, plain in self.names.items()}
        here = {plain: tuple(self.tensors[name].shape) for plain, name in originals.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        self.pairs = {originals[plain]: source for plain, source in match_names(here, shapes).items()}
        self.reasons: dict[str, str] = {}
        for name, source in list(self.pairs.items()):
            mine, theirs = self.tensors[name].dtype, self.state[source].dtype
            if mine.is_floating_point != theirs.is_floating_point or mine.is_complex or theirs.is_complex:
                self.reasons[name] = f"{str(mine)[6:]} here, {str(theirs)[6:]} upstream"
                del self.pairs[name]
            elif not mine.is_floating_point and self.tensors[name].shape != shapes[source]:
                self.reasons[name] = f"a table of another shape upstream, {list(shapes[source])}"
                del self.pairs[name]
        known = upstream_heads(upstream) if isinstance(upstream, nn.Module) else {}
        plain_heads = {plain: known[name] for plain, name in plain_names(state).items() if name in known}
        heads = {name: plain_heads[source] for name, source in self.pairs.items() if source in plain_heads}
        if not self.structure.traced:
            self._tie_sizes(shapes)
        self.widths = upstream_widths(self.structure, self.pairs, shapes, heads)
        self._chosen: dict[int, torch.Tensor] = {}
        self.found: dict[str, Correspondence] = {}
        outputs = self.structure.outputs()
        for name, source in self.pairs.items():
            result = correspond(self.structure, name, source, shapes[source], self.widths, outputs, self._choose)
            if isinstance(result, str):
                self.reasons[name] = result
            else:
                self.found[name] = result
        if not self.found:
            some = next(iter(self.reasons.items()), None)
            why = f" ({some[0]}: {some[1]})" if some else ""
            fail("upstream_state", "at least one tensor that corresponds to one of the target's", f"none{why}")
        for name, found in self.found.items():
            _check_values("upstream_state", found.source, self.state[found.source], finite=name not in self.buffers)
        self.mapped = {name: found.mapped() for name, found in self.found.items()}

    def masks(self, alpha: float, granularity: str) -> Masks:
        """Inherited elements of every tensor, False throughout where nothing is."""
        structure, selector = self.structure, self.selector
        mapped = {n: has for n, has in self.mapped.items() if has.ndim and self.tensors[n].is_floating_point()}
        found = {name: self.found[name] for name in mapped}
        ranked = selector.select in ("magnitude", "fisher")
        scores = {
            name: found[name].gather(self._importance_of(found[name].source))
            for name in mapped
            if ranked and name not in self.buffers
        }
        if granularity == "element":
            owners = {name: name.rpartition(".")[0] for name in mapped if name in self.buffers}
            chosen = element_masks(mapped, owners, {**self._statistics_scores(scores), **scores}, alpha, selector)
        elif granularity == "filter":
            chosen = filter_masks(structure, found, mapped, scores, alpha, selector)
        else:
            layers = {name: structure.layers[name] for name in mapped}
            units = layers if granularity == "layer" else {name: block_of(layer) for name, layer in layers.items()}
            chosen = unit_masks(units, mapped, scores, alpha, selector)
        masks = {}
        for name, tensor in self.tensors.items():
            if name in self.mapped and name not in chosen:
                # A single number or a table of integers, such as the batches a norm has seen, goes with its module.
                module = name.rpartition(".")[0]
                rest = [mask for other, mask in chosen.items() if other.rpartition(".")[0] == module]
                whole = all(bool(mask.all()) for mask in rest) if rest else alpha == 1
                masks[name] = torch.full(tensor.shape, whole)
            else:
                masks[name] = chosen.get(name, torch.zeros(tensor.shape, dtype=torch.bool))
        return masks

    def _statistics_scores(self, scores: State) -> State:
        """Statistics have no importance of their own: the scale of their norm lends them its."""
        result = {}
        for name in self.mapped.keys() & self.buffers:
            scale = scores.get(f"{name.rpartition('.')[0]}.weight".lstrip("."))
            shape = self.mapped[name].shape
            result[name] = scale if scale is not None and scale.shape == shape else torch.zeros(shape)
        return result

    def entries(self, masks: Masks) -> tuple[TensorReport, ...]:
        """One entry per tensor, shared ones once more under their other names with nothing to count."""
        entries = []
        for name, tensor in self.tensors.items():
            source = self.found[name].source if name in self.found else None
            there = None if source is None else tuple(self.state[source].shape)
            note = self.reasons.get(name, "" if source else "no counterpart upstream")
            if source is not None:
                notes = []
                missing = int((~self.mapped[name]).sum())
                if missing:
                    notes.append(f"{missing} without counterpart upstream")
                if self.state[source].dtype != tensor.dtype:
                    notes.append(f"converted from {str(self.state[source].dtype)[6:]}")
                note = ", ".join(notes)
            copied = int(masks[name].sum())
            entries.append(TensorReport(name, source, tuple(tensor.shape), there, copied, tensor.numel(), note))
        for name, first in self.aliases.items():
            entries.append(TensorReport(name, None, (), None, 0, 0, f"the same tensor as {first}"))
        return tuple(entries)

    def unused(self, masks: Masks) -> tuple[str, ...]:
        used = {found.source for name, found in self.found.items() if bool(masks[name].any())}
        return tuple(name for name in self.state if name not in used)

    def note(self) -> str:
        if self.structure.traced:
            return ""
        return f"the graph of the model could not be followed ({self.structure.why_not}): channels are tied by number"

    def write(self, masks: Masks) -> None:
        """Change the target, after every value has been looked at."""
        values = {}
        for name, found in self.found.items():
            tensor, mask = self.tensors[name], masks[name]
            if bool(mask.any()):
                inherited = found.gather(self.state[found.source]).to(tensor.device, tensor.dtype)
                values[name] = torch.where(mask.to(tensor.device), inherited, tensor.detach())
                converted = f"upstream_state in {str(tensor.dtype)[6:]}"
                _check_values(converted, found.source, values[name], finite=name not in self.buffers)
        with torch.no_grad():
            for name, value in values.items():
                self.tensors[name].copy_(value)

    def _tie_sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        alone = (
            (axis[0].group, size)
            for name, source in self.pairs.items()
            if len(shapes[source]) == len(self.structure.axes[name])
            for axis, size in zip(self.structure.axes[name], shapes[source], strict=True)
            if len(axis) == 1 and axis[0].kind == "group"
        )
        self.structure.tie_sizes(alone)

    def _choose(self, root: int, size: int, there: int) -> torch.Tensor:
        """The upstream channels that a narrower target takes, the same wherever they are used."""
        if root not in self._chosen:
            self._chosen[root] = self.selector.take(size, there, lambda: self._channel_scores(root, there))
        return self._chosen[root]

    def _channel_scores(self, root: int, there: int) -> torch.Tensor:
        total = torch.zeros(there, dtype=torch.float64)
        for name, source in self.pairs.items():
            axes = self.structure.axes[name]
            if name in self.buffers or len(axes) != self.state[source].ndim:
                continue
            for dimension, axis in enumerate(axes):
                sizes = upstream_sizes(self.structure, axis, self.state[source].shape[dimension], self.widths)
                for position, factor in enumerate(axis):
                    if sizes is not None and factor.kind == "group" and self.structure.root(factor.group) == root:
                        values = torch.unflatten(self._importance_of(source).double().cpu(), dimension, sizes)
                        total += values.movedim(dimension + position, 0).reshape(there, -1).sum(1)
        return total

    def _importance_of(self, source: str) -> torch.Tensor:
        if self.importance is None:
            return self.state[source].detach().double().square()
        return self.importance.get(source, torch.zeros((), dtype=torch.float64)).expand(self.state[source].shape)


def _upstream_state(upstream: nn.Module | State) -> State:
    state = upstream.state_dict() if isinstance(upstream, nn.Module) else upstream
    if not isinstance(state, Mapping):
        fail("upstream_state", "a state dict or a torch.nn.Module", describe(upstream), TypeError)
    tensors = {}
    for name, tensor in state.items():
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            fail("upstream_state", "tensors by name", f"{describe(tensor)} under {name!r}", TypeError)
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            fail("upstream_state", "tensors with values", f"{name!r} without")
        tensors[name] = tensor.detach()
    if not tensors:
        fail("upstream_state", "tensors by name", "none")
    return tensors


def _importance(
    upstream: nn.Module | State, state: State, select: str, fisher: State | None, batches: Iterable[Any] | None
) -> State | None:
    """The Fisher diagonal by plain upstream name; None for magnitudes, or where nothing is ranked."""
    if select != "fisher":
        return None
    if fisher is None:
        if batches is None or not isinstance(upstream, nn.Module):
            expected = "a diagonal by name, or an upstream module and batches, for select='fisher'"
            fail("fisher", expected, "neither" if batches is None else "batches without a module")
        fisher = FisherInformation(upstream, "monte_carlo").diagonal(batches)
    plain = {}
    for short, name in plain_names(state).items():
        if name not in fisher:
            continue
        value = fisher[name]
        if not isinstance(value, torch.Tensor) or value.shape != state[name].shape:
            fail(f"fisher[{name!r}]", f"a tensor of shape {list(state[name].shape)}", describe(value))
        _check_values("fisher", name, value)
        plain[short] = value.detach().double()
    if not plain:
        fail("fisher", "names of upstream parameters", "none of them")
    return plain


def _target_tensors(target: nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    parameters = {name for name, _ in target.named_parameters()}
    for name, tensor in target.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            fail("target", "initialised parameters", f"{name!r} without values")
        _check_values("target", name, tensor, finite=name in parameters)
        tensors[name] = tensor
    return tensors


def _aliases(target: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    tensors = {n: t for n, t in target.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def _check_values(argument: str, name: str, tensor: torch.Tensor, *, finite: bool = True) -> None:
    """Refuse NaN; infinities, too, unless it is a buffer (an attention mask holds them by right)."""
    bad = ~torch.isfinite(tensor.detach()) if finite else torch.isnan(tensor.detach())
    if bool(bad.any()):
        position = tuple(int(i) for i in bad.nonzero()[0])
        what = "finite numbers" if finite else "numbers"
        fail(argument, what, f"{tensor[position].item()} in {name!r} at {list(position)}")

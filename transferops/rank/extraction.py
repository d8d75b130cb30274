"""Features and outputs of a model over data, from any of its layers, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transferops._models import find_head
from transferops._validate import as_tensor, describe, fail
from transferops.fisher.batches import Batch
from transferops.fisher.modes import evaluation

HEAD_INPUT = "head input"


@dataclass(frozen=True, eq=False)
class Extraction:
    """What a model makes of the samples.

    Attributes:
        features: By layer, float ``[N, D]``.
        outputs: The model's outputs for the classes it was trained on, ``[N, C_s]``.
        labels: int64 ``[N]``.
    """

    features: dict[str, Tensor]
    outputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def extract(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] = (HEAD_INPUT,),
    head: str | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Extraction:
    """Run a model over labelled data and keep the features of some layers.

    The model is run in evaluation mode without gradients, on the device of its parameters. Features of more than two
    dimensions are averaged over positions: ``[N, C, *spatial]`` from convolutions and what keeps their layout, where
    the second dimension is the channels, and ``[N, T, D]`` from everything else.

    Args:
        model: From inputs to outputs ``[N, C_s]`` (a tensor, or an object with ``logits``).
        batches: Pairs (inputs, labels), or mappings with "labels" whose other entries are keyword arguments.
        layers: "head input" is what the head is given, the usual choice; any other name is that of a module, whose
            output is taken.
        head: The head's name; without it, the last linear or convolutional layer to run.
        on_batch: Called after every batch with its number of samples.

    Returns:
        Features, outputs and labels on the CPU, in the order of the batches.

    Raises:
        ValueError: No samples, a layer that is unknown or does not run, or runs more than once.
        TypeError: Labels that are no integers, or a layer that gives no tensor.
    """
    if not layers or len(set(layers)) < len(layers):
        fail("layers", "at least one layer, each once", str(list(layers)))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs, labels = [], []
    with evaluation(model), torch.no_grad():
        taps: dict[str, Tensor] = {}
        for index, raw in enumerate(batches):
            batch = Batch.parse(index, raw, device)
            if index == 0:
                sources = _sources(model, layers, partial(batch.rows(0, 1).run, model), head)
            taps.clear()
            with _tapped(sources, taps):
                result = batch.run(model)
            for name in layers:
                if name not in taps:
                    fail("layers", "layers that run", f"{name!r}, which does not")
                kept[name].append(_pooled(name, sources[name], taps[name], batch.samples))
            outputs.append(result.flatten(1).cpu())
            labels.append(_labels(index, batch))
            if on_batch is not None:
                on_batch(batch.samples)
    if not labels:
        fail("batches", "at least one batch", "none")
    return Extraction({name: torch.cat(parts) for name, parts in kept.items()}, torch.cat(outputs), torch.cat(labels))


@dataclass(frozen=True)
class _Source:
    """A module, and whether its input or its output is taken."""

    module: nn.Module
    takes_input: bool


def _sources(model: nn.Module, layers: Sequence[str], run: Callable[[], Any], head: str | None) -> dict[str, _Source]:
    modules = dict(model.named_modules())
    sources = {}
    for name in layers:
        if name == HEAD_INPUT:
            sources[name] = _Source(find_head(model, run, head)[1], True)
        elif name in modules:
            sources[name] = _Source(modules[name], False)
        else:
            known = ", ".join(list(modules)[1:9])
            fail("layers", f"{HEAD_INPUT!r} or modules of the model ({known}, ...)", repr(name))
    return sources


@contextmanager
def _tapped(sources: dict[str, _Source], taps: dict[str, Tensor]) -> Iterator[None]:
    """Inside, what passes through the sources is put into ``taps``."""

    def tap(name: str, source: _Source) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = (args[0] if args else None) if source.takes_input else output
            if not isinstance(value, Tensor):
                fail("layers", "layers that pass one tensor", f"{name!r} with {describe(value)}", TypeError)
            if name in taps:
                fail("layers", "layers that run once", f"{name!r}, which runs more often")
            taps[name] = value

        return note

    handles = [source.module.register_forward_hook(tap(name, source)) for name, source in sources.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# What gives [N, C, L]: with three dimensions nothing else tells channels from positions.
_CHANNELS_FIRST = (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)


def _pooled(name: str, source: _Source, value: Tensor, samples: int) -> Tensor:
    """``[N, D]`` on the CPU."""
    if value.dim() == 0 or len(value) != samples:
        fail("layers", f"layers that give {samples} rows, one per sample", f"{name!r} with shape {list(value.shape)}")
    if value.dim() > 3 or (value.dim() == 3 and isinstance(source.module, _CHANNELS_FIRST)):
        value = value.flatten(2).mean(2)
    elif value.dim() == 3:
        value = value.mean(1)
    return value.reshape(samples, -1).cpu()


def _labels(index: int, batch: Batch) -> Tensor:
    if batch.targets is None:
        fail(f"batches[{index}]", "labels", "none")
    labels = as_tensor("labels", batch.targets)
    if labels.is_floating_point() or labels.is_complex():
        fail(f"batches[{index}] labels", "integers", describe(labels), TypeError)
    if labels.shape != (batch.samples,):
        fail(f"batches[{index}] labels", f"shape [{batch.samples}]", f"shape {list(labels.shape)}")
    return labels.cpu().long()

"""Gram matrices of batches recorded as CUDA graphs, one for each shape, and replayed with the values of the next batch.

A Fisher step is hundreds of small kernels; from a graph a GPU starts them without the program. What is recorded are
addresses: batches and tangents are copied to where they were, parameters and buffers must be where they were.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transferops.fisher.batches import Batch
from transferops.fisher.directions import Directions
from transferops.fisher.exact import Tangents
from transferops.fisher.trial import tolerances_of

_WARM_UPS = 3  # as PyTorch's notes on CUDA semantics have it: libraries set themselves up in the first ones
_MOST = 4  # shapes that are kept, and graphs, each of which has the memory of a step


class Recording(NamedTuple):
    """A recorded step: run again by ``replay``, which leaves its result in ``output``."""

    replay: Callable[[], None]
    output: Tensor


Step = Callable[[Tangents, Batch], Tensor]


def record(step: Callable[[], Tensor], device: torch.device) -> Recording:
    """A step on fixed tensors as a CUDA graph.

    Raises:
        RuntimeError: it cannot be recorded, because it waits for the GPU for instance.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on: those of a DataLoader pin memory.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = step()
    return Recording(graph.replay, output)


class _Static(NamedTuple):
    """What a recording reads."""

    batch: Batch
    tangents: Tangents
    loaded: list[Directions]  # the one whose tangents are there
    parts: list[object]  # which, being kept, keep their ids


class Graphs:
    """The recordings of one model.

    A shape is recorded when it comes the second time, so that the smaller last batch of a single pass is not, and used
    from then on. With other samples than it was made with, a recording has to give what is computed from them; if it
    does not, or nothing can be recorded, all batches are computed as without graphs, and ``refused`` says why.

    Args:
        model: the model.

    Attributes:
        refused: why nothing is recorded, if so.
    """

    def __init__(self, model: nn.Module) -> None:
        self.refused: str | None = None
        self._model = model
        self._entries: dict[Any, tuple[Recording, _Static]] = {}
        self._seen: dict[Any, None] = {}

    def sentence(self) -> str:
        """What is recorded."""
        return f"CUDA graphs: {len(self._entries)} recorded" if self.refused is None else f"CUDA graphs: {self.refused}"

    def gram(
        self, directions: Directions, batch: Batch, layers: dict[str, nn.Module], step: Step, more: object
    ) -> Tensor:
        """``step`` of the directions' tangents and the batch, computed or replayed.

        Args:
            directions: K of them.
            batch: the samples.
            layers: as of :func:`transferops.fisher.exact.push_forward`.
            step: gives the batch's part of the Gram matrix from these, and from nothing else that changes.
            more: what else a recording depends on.

        Returns:
            What ``step`` returns; overwritten by the next call.
        """
        parts: list[object] = [*self._model.modules(), *self._model.parameters(), *self._model.buffers()]
        key = self._key(parts, directions, batch, layers, more)
        if key is not None and self.refused is None:
            if key not in self._entries and key in self._seen:
                self._record(key, _Static(batch.copy(), Tangents.of(directions, layers), [directions], parts), step)
            if key in self._entries:
                return self._replay(*self._entries[key], directions, batch)
            _keep(self._seen, key, None)
        return step(Tangents.of(directions, layers), batch)

    def _record(self, key: Any, static: _Static, step: Step) -> None:
        other = static.batch.repeated()
        try:
            with _uncached_autocast():
                expected = step(static.tangents, other)
                recording = record(lambda: step(static.tangents, static.batch), expected.device)
            found = self._replay(recording, static, static.loaded[0], other)
            apart, size = (found - expected).abs().max(), expected.abs().max()
            if apart > tolerances_of(*self._model.parameters()).row * size:  # of NaN, which the end refuses, nothing is
                raise RuntimeError("replayed with other values, it does not give their result")
        except RuntimeError as error:
            self.refused = str(error).split("\n")[0]
            self._entries.clear()
            wanted = "a step that can be recorded as a CUDA graph"
            warnings.warn(f"model: expected {wanted}, got: {self.refused}; computed without", stacklevel=2)
        else:
            _keep(self._entries, key, (recording, static))

    def _replay(self, recording: Recording, static: _Static, directions: Directions, batch: Batch) -> Tensor:
        if static.loaded[0] is not directions:
            static.tangents.load(directions)
            static.loaded[0] = directions
        for place, value in zip(static.batch.tensors, batch.tensors, strict=True):
            place.copy_(value)
        recording.replay()
        return recording.output

    def _key(
        self, parts: list[object], directions: Directions, batch: Batch, layers: dict[str, nn.Module], more: object
    ) -> Any:
        """Equal for steps of which one recording will do; None if the batch holds what cannot be compared."""
        inputs = batch.inputs if isinstance(batch.inputs, dict) else {"": batch.inputs}
        if any(not isinstance(value, (Tensor, bool, int, float, str, type(None))) for value in inputs.values()):
            return None
        kind = batch.tensors[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        settings = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
        return (
            tuple((id(part), *(_place(part) if isinstance(part, Tensor) else ())) for part in parts),
            tuple((name, _form(value) if isinstance(value, Tensor) else value) for name, value in inputs.items()),
            _form(batch.targets) if isinstance(batch.targets, Tensor) else None,
            len(directions),
            tuple((name, directions.rank(name) if name in layers else None) for name in directions.parameters),
            autocast,
            settings,
            more,
        )


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Add an entry, in the place of the oldest if there are too many."""
    while len(kept) >= _MOST:
        del kept[next(iter(kept))]
    kept[key] = value


def _form(value: Tensor) -> tuple[object, ...]:
    return tuple(value.shape), value.stride(), value.dtype


def _place(value: Tensor) -> tuple[object, ...]:
    return value.data_ptr(), *_form(value)


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Weights are cast in the recording, not taken from a cache that is gone when it is replayed."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)

"""Gram matrices replayed from CUDA graphs; without a GPU, from a tape of the operations in their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fisher_models import CLASSES, PROBLEMS, build, directions
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from transferops.fisher import FisherInformation, LowRank, graphs

pytestmark = pytest.mark.usefixtures("one_thread")


class Tape(TorchDispatchMode):
    """Operations on fixed memory, done again without the program that made them: what a CUDA graph is."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise RuntimeError(f"{func} while the stream is recorded")
        given = tree_map(_as_it_is, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self._done.append((func, *given, tree_leaves(tree_map(_as_it_is, result))))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self._done:
            given = {None, *map(_memory, tree_leaves((args, kwargs)))}
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if _memory(old) not in given:  # a view, or a tensor changed in place, is what it was
                    old.copy_(new)


def _as_it_is(value: Any) -> Any:
    """A tensor that keeps its shape, whatever becomes of the given one."""
    return value.detach() if isinstance(value, Tensor) and not value._is_zerotensor() else value


def _memory(value: Any) -> int | None:
    has = isinstance(value, Tensor) and not value._is_zerotensor()
    return value.untyped_storage().data_ptr() if has else None


class Recorder:
    """In the place of :func:`transferops.fisher.graphs.record`."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Callable[[], Tensor], device: torch.device) -> graphs.Recording:
        with Tape() as tape:
            output = step()
        output.zero_()  # nothing has been computed yet
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return graphs.Recording(replay, output)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The CPU is taken for a GPU with such graphs, on which values cannot be read at once."""
    recorder = Recorder()
    monkeypatch.setattr(graphs, "record", recorder)
    monkeypatch.setattr("transferops.fisher.estimation.is_gpu", lambda device: True)
    for module in ("labels", "likelihood"):
        monkeypatch.setattr(f"transferops.fisher.{module}.readable", lambda value: False)
    return recorder


def permuted(inputs: Any, targets: Tensor, count: int) -> list[tuple[Any, Tensor]]:
    """Batches of one shape with the samples in other orders, and scaled: other values, layouts and masks."""
    batches = []
    for i in range(count):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(i))

        def take(value: Any, order: Tensor = order, scale: float = 1 + i / 4) -> Any:
            if not isinstance(value, Tensor) or len(value) != len(order):
                return value
            return value[order] * scale if value.is_floating_point() else value[order]

        moved = {k: take(v) for k, v in inputs.items()} if isinstance(inputs, dict) else take(inputs)
        batches.append((moved, targets[order]))
    return batches


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_bits_as_computed(name: str, recorder: Recorder) -> None:
    """Of the first two batches of each call the first is computed, and all after the recording replayed."""
    model, inputs, targets = build(name)
    batches, loss = permuted(inputs, targets, 4), PROBLEMS[name].loss
    plain, fisher = FisherInformation(model, loss=loss), FisherInformation(model, loss=loss, cuda_graphs=True)
    steps = directions(model, 6)  # 5 at once, and one
    assert torch.equal(fisher.gram(steps, batches), plain.gram(steps, batches))
    assert (recorder.recorded, recorder.replayed) == (1, 4)  # once to see that it gives what was computed
    other = [{n: 2 * v for n, v in step.items()} for step in reversed(steps)]
    assert torch.equal(fisher.gram(other, batches[2:]), plain.gram(other, batches[2:]))
    assert (recorder.recorded, recorder.replayed) == (1, 6)


def parts(count: int, samples: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def test_a_shape_is_recorded_when_it_comes_the_second_time(recorder: Recorder) -> None:
    """So the smaller last batch of a pass is not in the first pass; parameters and directions change in between."""
    model = small()
    fisher, last = FisherInformation(model, cuda_graphs=True), parts(1, samples=2)
    counts = []
    for number in range(3):
        steps = directions(model, 3)[number:] + directions(model, number)
        expected = FisherInformation(model).gram(steps, [*parts(3), *last])
        assert torch.equal(fisher.gram(steps, [*parts(3), *last]), expected)
        counts.append((recorder.recorded, recorder.replayed))
        with torch.no_grad():
            model[0].weight.mul_(-1.5)
    # A new recording is replayed once to be checked.
    assert counts == [(1, 3), (2, 3 + 3 + 2), (2, 8 + 4)]
    assert fisher.explain().endswith("CUDA graphs: 2 recorded")


def test_few_recordings_are_kept(recorder: Recorder) -> None:
    model = small()
    fisher, steps = FisherInformation(model, cuda_graphs=True), directions(model, 2)
    for samples in range(1, 7):
        fisher.gram(steps, parts(2, samples))
    assert recorder.recorded == 6
    assert fisher.explain().endswith("CUDA graphs: 4 recorded")


@pytest.mark.parametrize("change", ["values", "parameter", "storage", "buffer", "precision", "directions", "autocast"])
def test_what_makes_a_recording_anew(change: str, recorder: Recorder) -> None:
    """Values that are where they were are read there; anything in another place, or of another kind, is not."""
    model = small()
    model.register_buffer("unused", torch.zeros(1))
    fisher = FisherInformation(model, cuda_graphs=True)
    fisher.gram(directions(model, 2), parts(2))
    count, context = 2, torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast")
    with torch.no_grad():
        if change == "values":
            model[0].weight.mul_(2)
        elif change == "parameter":
            model[0].weight = nn.Parameter(2 * model[0].weight)
        elif change == "storage":
            model[0].weight.data = 2 * model[0].weight
        elif change == "buffer":
            model.unused = torch.zeros(1)
        elif change == "directions":
            count = 3
    before = torch.get_float32_matmul_precision()
    try:
        if change == "precision":
            torch.set_float32_matmul_precision("high")
        with context:
            found = fisher.gram(directions(model, count), parts(2))
            assert torch.equal(found, FisherInformation(model).gram(directions(model, count), parts(2)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert recorder.recorded == (1 if change == "values" else 2)


def test_products_are_loaded_as_products(recorder: Recorder) -> None:
    model = small()

    def low_rank(seed: int) -> list[dict[str, LowRank]]:
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(*shape, generator=generator).double() for shape in ((2, 4, 2), (2, 2, 3)))
        return [{"0.weight": LowRank(left[k, :, : k + 1], right[k, : k + 1])} for k in range(2)]

    fisher = FisherInformation(model, cuda_graphs=True)
    for seed in (0, 1):
        expected = FisherInformation(model).gram(low_rank(seed), parts(3))
        assert torch.equal(fisher.gram(low_rank(seed), parts(3)), expected)
    assert (recorder.recorded, recorder.replayed) == (1, 1 + 2 + 3)


class Waiting(nn.Module):
    """Reads a value of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(2 * x if bool((x > 1e6).any()) else x)


class Elsewhere(Waiting):
    """Computes where nothing is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C._DisableFuncTorch():
            x = torch.from_numpy(np.tanh(x.numpy()))
        return self.layer(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Waiting, "aten._local_scalar_dense.default while the stream is recorded"),
        (Elsewhere, "replayed with other values, it does not give their result"),
    ],
)
def test_what_cannot_be_recorded_is_computed(kind: type[nn.Module], reason: str, recorder: Recorder) -> None:
    """With one warning; :meth:`explain` says why."""
    torch.manual_seed(0)
    model = kind()
    fisher, steps = FisherInformation(model, cuda_graphs=True), directions(model, 2)
    expected = FisherInformation(model).gram(steps, parts(3))
    with pytest.warns(UserWarning, match=f"can be recorded as a CUDA graph, got: {reason}; computed without"):
        assert torch.equal(fisher.gram(steps, parts(3)), expected)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(fisher.gram(steps, parts(3)), expected)
    assert fisher.explain().endswith(f"CUDA graphs: {reason}")


def test_nothing_is_recorded_on_a_cpu_or_of_inputs_that_cannot_be_compared(
    monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    class Keywords(nn.Sequential):
        def forward(self, x: Tensor, scales: list[float]) -> Tensor:
            return super().forward(x) * scales[0]

    model = Keywords(nn.Linear(3, CLASSES)).double()
    fisher = FisherInformation(model, cuda_graphs=True)
    fisher.gram(directions(model, 2), [{"x": x, "scales": [2.0]} for x in parts(3)])
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "record", recorder)
    model = small()
    FisherInformation(model, cuda_graphs=True).gram(directions(model, 2), parts(3))
    assert recorder.recorded == 0


def _on_gpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_gpu(part) for name, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.to("cuda", torch.float32) if value.is_floating_point() else value.to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mlp", "convolutions", "attention", "multi_head_masked", "decoder", "layer_scale"])
def test_recorded_on_a_gpu_as_computed_there(name: str) -> None:
    """Up to the order of sums, which a library may choose anew; parameters that change in place are followed."""
    model, inputs, targets = build(name)
    model.to("cuda", torch.float32)
    batches = [(_on_gpu(x), _on_gpu(y)) for x, y in permuted(inputs, targets, 5)]
    plain, fisher = FisherInformation(model), FisherInformation(model, cuda_graphs=True)
    steps = directions(model, 3)
    for _ in range(2):
        torch.testing.assert_close(fisher.gram(steps, batches), plain.gram(steps, batches), rtol=1e-5, atol=1e-9)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        steps = list(reversed(steps))
    assert fisher.explain().endswith("CUDA graphs: 1 recorded")

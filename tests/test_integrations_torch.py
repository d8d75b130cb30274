"""Every op in compiled, exported and ahead-of-time compiled programs; the functional API fed with foreign arrays."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transferops import ops, scores


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


LABELS = torch.arange(12) % 3
A, B = random(12, 3, 5), random(12, 3, 4)
X, Y = random(12, 2, 6, 5), random(12, 4, 6, 5)

# Ops of tensors: tensors and, after them, what is no tensor.
CALLS: dict[str, tuple[tuple[Tensor, ...], tuple[Any, ...]]] = {
    "class_moments": ((random(12, 7), LABELS), (3,)),
    "sample_gram": ((random(12, 7),), ()),
    "norm_moments": ((random(12, 7), random(7).double()), ()),
    "empirical_prediction": ((random(12, 5).softmax(1), LABELS), (3,)),
    "linear_fisher_diagonal": ((A, B), ()),
    "linear_fisher_projection": ((A, B, random(2, 4, 5)), ()),
    "linear_grad_norm": ((A, B), ()),
    "conv_fisher_diagonal": ((X, Y), ((3, 3), 1, 1)),
    "conv_fisher_projection": ((X, Y, random(2, 4, 2, 3, 3)), ((3, 3), 1, 1)),
    "conv_grad_norm": ((X, Y), ((3, 3), 1, 1)),
    "softmax_fisher_gram": ((random(12, 6), random(2, 12, 6)), ()),
    "weighted_gram": ((random(3, 50), random(50, seed=1).abs(), random(50)), ()),
    "gradient_fisher_gram": ((random(12, 50), random(2, 50)), ()),
}
LISTS = {"gradient_gram", "gradient_expectation_", "gradient_expectation_gram_"}  # of tensors, gradients of parameters


class Call(torch.nn.Module):
    """An op as a module."""

    def __init__(self, name: str, options: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.options = getattr(ops, name), options

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.op(*tensors, *self.options)
        return tuple(result) if isinstance(result, tuple) else (result,)


class Gradients(torch.nn.Module):
    """The ops of lists, two of them in place."""

    def forward(self, first: Tensor, second: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, ...]:
        ops.gradient_expectation_([means], [squares], [first], 0)
        ops.gradient_expectation_([means], [squares], [second], 1)
        gram = ops.gradient_expectation_gram_([[means], [second]], [[squares]], [[first]], [2])
        return ops.gradient_gram([[first], [second]]), gram, means, squares


def exported(module: torch.nn.Module, arguments: tuple[Tensor, ...], **options: Any) -> torch.nn.Module:
    """The module after a round trip through a file."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, arguments, **options), file)
    file.seek(0)
    return torch.export.load(file).module()


class Everything(torch.nn.Module):
    """All ops, one after the other, those of lists last."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.nn.ModuleList(Call(name, options) for name, (_, options) in CALLS.items())
        self.lists = Gradients()

    def forward(self, arguments: list[list[Tensor]]) -> list[tuple[Tensor, ...]]:
        modules = [*self.calls, self.lists]
        return [module(*tensors) for module, tensors in zip(modules, arguments, strict=True)]

    @staticmethod
    def arguments() -> list[list[Tensor]]:
        lists = [random(4, 5), random(4, 5, seed=1), torch.zeros(4, 5), torch.zeros(4, 5)]
        return [*(list(tensors) for tensors, _ in CALLS.values()), lists]


def assert_same(got: Any, want: Any) -> None:
    for results, wanted in zip(got, want, strict=True):
        for result, value in zip(results, wanted, strict=True):
            assert torch.equal(result, value)


def test_every_op_is_here() -> None:
    """A new op cannot be forgotten: neither a public one, nor one that is registered only."""
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "transferops::" in name}
    assert set(CALLS) | LISTS == {name for name in ops.__all__ if name[0].islower()} == registered


@pytest.mark.parametrize("name", [*CALLS, "lists"])
def test_compiles_without_a_graph_break(name: str) -> None:
    position = [*CALLS, "lists"].index(name)
    module = [*Everything().calls, Gradients()][position]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same([compiled(*Everything.arguments()[position])], [module(*Everything.arguments()[position])])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_all_in_one_program_through_inductor(tmp_path: Path) -> None:
    """torch.compile's default back end, and the package that AOTInductor makes for programs without Python."""
    module = Everything()
    want = module(Everything.arguments())
    torch._dynamo.reset()
    assert_same(torch.compile(module, fullgraph=True)(Everything.arguments()), want)
    program = torch.export.export(module, (Everything.arguments(),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "everything.pt2"))
    assert_same(torch._inductor.aoti_load_package(package)(Everything.arguments()), want)


@pytest.mark.parametrize("name", CALLS)
def test_export_round_trip(name: str) -> None:
    """Saved, loaded, and run with another number of samples than it was exported with."""
    tensors, options = CALLS[name]
    samples = None if name == "weighted_gram" else torch.export.Dim("samples", min=2, max=100)
    dims = [{t.shape.index(12): samples} if samples is not None and 12 in t.shape else None for t in tensors]
    module = Call(name, options)
    loaded = exported(module, tensors, dynamic_shapes=(tuple(dims),))
    fewer = tuple(t if dim is None else t.narrow(next(iter(dim)), 0, 9).contiguous() for t, dim in zip(tensors, dims))
    for arguments in (tensors, fewer):
        assert_same([loaded(*arguments)], [module(*arguments)])


def test_export_round_trip_of_lists() -> None:
    first, second = random(4, 5), random(4, 5, seed=1)

    def arguments() -> tuple[Tensor, ...]:
        return first, second, torch.zeros(4, 5), torch.zeros(4, 5)

    loaded = exported(Gradients(), arguments())
    assert_same([loaded(*arguments())], [Gradients()(*arguments())])


class Foreign:
    """An array that only offers DLPack, as CuPy's and JAX's do."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


KINDS: dict[str, Callable[[Tensor], Any]] = {"numpy": lambda tensor: tensor.numpy(), "dlpack": Foreign}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_ops_take_arrays(name: str, kind: str) -> None:
    tensors, options = CALLS[name]
    module = Call(name, options)
    assert_same([module(*map(KINDS[kind], tensors))], [module(*tensors)])


class DeviceArray:
    """An array that only offers the CUDA array interface, as Numba's do."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def __cuda_array_interface__(self) -> Any:
        return self._tensor.__cuda_array_interface__


@pytest.mark.gpu
def test_ops_take_cuda_arrays() -> None:
    features, labels = random(12, 7).cuda(), LABELS.cuda()
    want = ops.class_moments(features, labels, 3)
    assert_same([ops.class_moments(DeviceArray(features), DeviceArray(labels), 3)], [want])
    assert_same([ops.class_moments(Foreign(features), Foreign(labels), 3)], [want])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_arrays_are_refused_without_a_gpu() -> None:
    interface = {"shape": (2, 2), "typestr": "<f4", "data": (4096, False), "version": 3, "strides": None}
    array = type("Array", (), {"__cuda_array_interface__": interface})()
    with pytest.raises(TypeError, match=r"^features: expected .* NumPy array or DLPack array, got Array \("):
        ops.sample_gram(array)


FEATURES = random(60, 4).double() + 2 * torch.eye(3, 4).repeat(20, 1)
CLASSES = torch.arange(60) % 3
PROBABILITIES = random(60, 5).softmax(1)
SCORES: dict[str, tuple[Tensor, ...]] = {
    **dict.fromkeys(("h_score", "log_me", "trans_rate", "knn", "gbc", "sfda", "etran", "parc"), (FEATURES, CLASSES)),
    "leep": (PROBABILITIES, CLASSES),
    "nce": (PROBABILITIES.argmax(1), CLASSES),
    "energy": (FEATURES,),
    "task_distance": (random(9).abs(), random(9, seed=1).abs()),
    "asymmetric_task_distance": (random(9).abs(), random(9, seed=1).abs(), random(9, seed=2).abs()),
    "score_all": (FEATURES, CLASSES),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCORES)
def test_scores_take_arrays(name: str, kind: str) -> None:
    score, arguments = getattr(scores, name), SCORES[name]
    assert score(*map(KINDS[kind], arguments)) == score(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_several_sets_take_arrays(kind: str) -> None:
    halves = [FEATURES[:, :2].contiguous(), FEATURES[:, 2:].contiguous()]
    want = scores.multi_source_h_score(halves, CLASSES)
    got = scores.multi_source_h_score(list(map(KINDS[kind], halves)), KINDS[kind](CLASSES))
    np.testing.assert_array_equal(got.weights, want.weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "package"), [("otce", "ot"), ("n_leep", "sklearn")])
def test_scores_with_packages_take_arrays(name: str, package: str, kind: str) -> None:
    pytest.importorskip(package)
    if name == "otce":
        arguments, options = (FEATURES[:30], CLASSES[:30], FEATURES[30:], CLASSES[30:]), {"regularization": None}
    else:
        arguments, options = (FEATURES, CLASSES), {"components_per_class": 1}
    score = getattr(scores, name)
    assert score(*map(KINDS[kind], arguments), **options) == score(*arguments, **options)

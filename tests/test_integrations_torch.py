"""The ops in programs that torch.export saves, and the functional API fed with NumPy and other DLPack arrays."""

from __future__ import annotations

import io
from collections.abc import Callable
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
LISTS = {"gradient_gram", "gradient_expectation_"}  # of tensors, the gradients of parameters


class Call(torch.nn.Module):
    """An op as a module."""

    def __init__(self, name: str, options: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.options = getattr(ops, name), options

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.op(*tensors, *self.options)
        return tuple(result) if isinstance(result, tuple) else (result,)


class Gradients(torch.nn.Module):
    """The two ops of lists, one of them in place."""

    def forward(self, first: Tensor, second: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, ...]:
        ops.gradient_expectation_([means], [squares], [first], 0)
        ops.gradient_expectation_([means], [squares], [second], 1)
        return ops.gradient_gram([[first], [second]]), means, squares


def exported(module: torch.nn.Module, arguments: tuple[Tensor, ...], **options: Any) -> torch.nn.Module:
    """The module after a round trip through a file."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, arguments, **options), file)
    file.seek(0)
    return torch.export.load(file).module()


def test_every_op_is_here() -> None:
    assert set(CALLS) | LISTS == {name for name in ops.__all__ if name[0].islower()}


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
        for got, want in zip(loaded(*arguments), module(*arguments), strict=True):
            assert torch.equal(got, want)


def test_export_round_trip_of_lists() -> None:
    first, second = random(4, 5), random(4, 5, seed=1)

    def arguments() -> tuple[Tensor, ...]:
        return first, second, torch.zeros(4, 5), torch.zeros(4, 5)

    loaded = exported(Gradients(), arguments())
    for got, want in zip(loaded(*arguments()), Gradients()(*arguments()), strict=True):
        assert torch.equal(got, want)


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
    for got, want in zip(module(*map(KINDS[kind], tensors)), module(*tensors), strict=True):
        assert torch.equal(got, want)


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

"""The extensions for BackPACK against BackPACK's own, and against the gradients of one sample at a time."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():  # of its dependencies, on import
    warnings.simplefilter("ignore")
    backpack = pytest.importorskip("backpack", exc_type=ImportError)
    from backpack import extensions

from transferops.integrations import backpack as ours

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SAMPLES, CLASSES = 6, 3


def convolutional(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, 3, groups=groups),
        nn.Tanh(),
        nn.Flatten(2),  # [N, 4, 4]: a linear layer with positions
        nn.Linear(4, 5, bias=False),
        nn.Flatten(),
        nn.Linear(20, CLASSES),
    )


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(SAMPLES, 4, 8, 7, generator=generator, dtype=torch.float64)


def prepared(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def fields(model: nn.Module, inputs: Tensor, extension: Any) -> dict[str, Tensor]:
    """What an extension stores for every parameter."""
    extended, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with torch.random.fork_rng():
        torch.manual_seed(1)  # of the Monte-Carlo draws
        with backpack.backpack(extension):
            loss(extended(inputs), torch.arange(len(inputs)) % CLASSES).backward()
    return {name: getattr(parameter, extension.savefield) for name, parameter in model.named_parameters()}


def per_sample(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Gradients [N, *shape] of each sample's share of the mean loss."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for n in range(len(inputs)):
        loss = nn.functional.cross_entropy(model(inputs[n : n + 1]), torch.tensor([n % CLASSES])) / len(inputs)
        for name, gradient in zip(rows, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("name", ours.__all__)
def test_the_fields_hold_what_backpack_puts_there(name: str, images: Tensor) -> None:
    model = prepared(convolutional(groups=1))
    want = fields(model, images, getattr(extensions, name)())
    got = fields(model, images, getattr(ours, name)())
    for parameter in want:
        torch.testing.assert_close(got[parameter], want[parameter], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)], ids=str)
def test_first_order_quantities_are_those_of_single_samples(norm: nn.Module | None, images: Tensor) -> None:
    """With groups, and with norms, for which BackPACK has no rule or another value."""
    if norm is None:
        model, inputs = prepared(convolutional(groups=2)), images
    else:
        model, inputs = prepared(nn.Sequential(nn.Linear(7, 4), norm, nn.Linear(4, CLASSES))), images[:, 0, 0]
    gradients = per_sample(model, inputs)
    squares = fields(model, inputs, ours.SumGradSquared())
    norms = fields(model, inputs, ours.BatchL2Grad())
    for name, rows in gradients.items():
        torch.testing.assert_close(squares[name], rows.square().sum(0), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(norms[name], rows.flatten(1).square().sum(1), rtol=1e-10, atol=1e-14)


def test_backpacks_norm_of_a_convolution_with_groups_is_another(images: Tensor) -> None:
    model = prepared(convolutional(groups=2))
    right = per_sample(model, images)["3.weight"].flatten(1).square().sum(1)
    theirs = fields(model, images, extensions.BatchL2Grad())["3.weight"]
    assert float((theirs / right - 1).abs().max()) > 0.1


def test_samples_that_depend_on_each_other_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^model: expected batch norm in evaluation mode, got training mode"):
        fields(prepared(convolutional(groups=1)).train(), images, ours.SumGradSquared())

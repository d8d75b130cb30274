"""Frozen parts of a model stay frozen through training, statistics of norms included."""

from __future__ import annotations

import copy

import pytest
import torch
from families import ResNet, randomized, state
from torch import nn

from transferops.adapt import freeze, inherit


def train_steps(model: nn.Module, steps: int = 3, decay: float = 0.1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=decay)
    model.train()
    for _ in range(steps):
        images = torch.randn(8, 3, 8, 8)
        loss = nn.functional.cross_entropy(model(images), torch.randint(5, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class TestFreeze:
    def test_masks(self) -> None:
        torch.manual_seed(0)
        model = ResNet([1, 1])
        report = inherit(model, randomized(ResNet([1, 1])), 0.5, "filter")
        before = state(model)
        with freeze(model, report.masks):
            train_steps(model)
        after = state(model)
        for name, mask in report.masks.items():
            assert torch.equal(after[name][mask], before[name][mask]), name
        moved = [
            name for name, mask in report.masks.items() if not torch.equal(after[name][~mask], before[name][~mask])
        ]
        assert {"conv1.weight", "bn1.running_mean", "bn1.running_var", "fc.weight"} <= set(moved)
        train_steps(model)
        assert not torch.equal(
            model.conv1.weight[report.masks["conv1.weight"]], before["conv1.weight"][report.masks["conv1.weight"]]
        )

    def test_momentum_from_before_does_not_move_it(self) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

        def step() -> None:
            optimizer.zero_grad()
            layer(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

        step()
        mask = torch.tensor([[True, False, True], [False, True, False]])
        before = layer.weight.detach().clone()
        frozen = freeze(layer, {"weight": mask})
        step()
        assert torch.equal(layer.weight[mask], before[mask])
        assert not torch.equal(layer.weight[~mask], before[~mask])
        frozen.release()
        frozen.release()
        step()
        assert not torch.equal(layer.weight[mask], before[mask])

    def test_names_and_statistics(self) -> None:
        torch.manual_seed(0)
        model = randomized(ResNet([1, 1]))
        before = state(model)
        frozen = freeze(model, ["conv1", "bn1", "layer1"])
        train_steps(model)
        model.train()
        images = torch.randn(2, 3, 8, 8)
        stem = model.layer1(nn.functional.relu(model.bn1(model.conv1(images))))
        for name, value in state(model).items():
            kept = name.startswith(("conv1", "bn1", "layer1"))
            assert torch.equal(value, before[name]) == kept, name
        frozen.release()
        assert model.bn1.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.eval()
        torch.testing.assert_close(stem, model.layer1(nn.functional.relu(model.bn1(model.conv1(images)))))

    def test_frozen_channels_compute_as_in_evaluation(self) -> None:
        torch.manual_seed(0)
        norm = randomized(nn.BatchNorm2d(4))
        images = torch.randn(3, 4, 2, 2)
        expected = copy.deepcopy(norm).eval()(images)
        batch = copy.deepcopy(norm).train()(images)
        mask = torch.tensor([True, False, False, True])
        with freeze(norm, {"running_mean": mask, "running_var": mask}):
            output = norm.train()(images)
        torch.testing.assert_close(output[:, mask], expected[:, mask])
        torch.testing.assert_close(output[:, ~mask], batch[:, ~mask])

    def test_what_was_frozen_before_stays(self) -> None:
        model = nn.Linear(2, 2)
        model.weight.requires_grad_(False)
        with freeze(model, ["weight", "bias"]):
            assert not model.bias.requires_grad
        assert not model.weight.requires_grad
        assert model.bias.requires_grad

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            (["nothing"], "part: expected names of the model's tensors or modules, got 'nothing'"),
            (
                {"nothing": torch.ones(2, dtype=torch.bool)},
                "part: expected names of the model's tensors, got 'nothing'",
            ),
            ({"bias": torch.ones(3, dtype=torch.bool)}, r"part\['bias'\]: expected a bool tensor of shape \[2\]"),
            ({"bias": torch.ones(2)}, r"part\['bias'\]: expected a bool tensor"),
        ],
    )
    def test_errors(self, part: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            freeze(nn.Linear(2, 2), part)
        with pytest.raises(TypeError, match="model: expected"):
            freeze(3, [])

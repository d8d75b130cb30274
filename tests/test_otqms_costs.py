"""Budgets of time: what a sample costs, and what is bought."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from otqms_tasks import task
from torch import nn
from torch.utils.data import Dataset

from transferops.otqms import OTQMS, TrainingOptions, allocate
from transferops.otqms import costs as costs_module
from transferops.otqms.pool import TensorSamples

OPTIONS = TrainingOptions(epochs=2, batch_size=8, min_steps=4, source_steps=20, lr=1e-2, dimension=4)


class Clock:
    """Stands still but for samples that are read."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Slow(Dataset[Any]):
    """Samples each of which takes its time to read."""

    def __init__(self, samples: TensorSamples, clock: Clock, seconds: float) -> None:
        self._samples, self._clock, self._seconds = samples, clock, seconds
        self.targets = samples.labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self._clock.now += self._seconds
        return self._samples.inputs[index], self.targets[index]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


COSTS = (0.5, 1.0, 4.0, 2.0)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = Clock()
    monkeypatch.setattr(costs_module, "perf_counter", clock)
    parts = [Slow(task(seed, size), clock, cost) for seed, (size, cost) in enumerate(zip((5, 20, 20, 1), COSTS))]
    sources = dict(zip(("cheap", "dear", "small"), parts[1:]))

    def make(checkpoint: Path | None = None, **changes: Any) -> OTQMS:
        return OTQMS(network, parts[0], sources, options=dataclasses.replace(OPTIONS, **changes), checkpoint=checkpoint)

    return make


def test_costs_are_those_of_the_clock(trainer: Any) -> None:
    before = torch.get_rng_state()
    assert trainer()._prepared.costs == pytest.approx(COSTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_are_bought_at_their_cost(trainer: Any) -> None:
    ours = trainer(budget_seconds=60.0)
    epoch = ours.fit("budget").epochs[0]
    torch.manual_seed(0)
    expected = allocate(
        ours.gram(network()), 15, [60, 60, 3], 4, mode="budget", budget=60 - 15 * 0.5, costs=list(COSTS[1:])
    )
    assert list(epoch.quantities.values()) == expected.rounded().tolist()
    assert sum(n * cost for n, cost in zip(epoch.quantities.values(), COSTS[1:])) <= 60 - 15 * 0.5
    assert epoch.quantities["cheap"] > epoch.quantities["dear"]


def test_the_same_part_of_every_source_for_the_budget(trainer: Any) -> None:
    """(60 - 7.5) / (60 + 240 + 6) of each, rounded by largest remainder."""
    assert trainer(budget_seconds=60.0).fit("uniform").epochs[0].quantities == {"cheap": 10, "dear": 10, "small": 1}


def test_draws_are_bought_at_their_cost(trainer: Any) -> None:
    """Target draws included; rounding to whole draws moves less than one of each part."""
    epoch = trainer(budget_seconds=60.0).fit("recommended").epochs[0]
    quantities = list(epoch.quantities.values())
    counts = [epoch.samples - sum(quantities), *quantities]
    spent = sum(count * cost for count, cost in zip(counts, COSTS, strict=True))
    assert spent == pytest.approx(60, abs=sum(COSTS) + max(COSTS))


def test_a_budget_that_the_target_uses_up_buys_nothing(trainer: Any) -> None:
    for name in ("budget", "uniform"):
        epoch = trainer(budget_seconds=1.0).fit(name).epochs[0]
        assert list(epoch.quantities.values()) == [0, 0, 0]
        assert epoch.samples == 15


def test_costs_are_measured_once_for_a_checkpoint(trainer: Any, tmp_path: Path) -> None:
    first = trainer(tmp_path, budget_seconds=60.0)._prepared.costs
    other = trainer(tmp_path, budget_seconds=60.0)
    other.samples._dataset.datasets[1]._seconds = 9.0
    assert other._prepared.costs == first
    assert trainer(budget_seconds=60.0)._prepared.costs[1] == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_seconds": 0.0}, "budget_seconds: expected a positive number, got 0.0"),
        ({"budget_seconds": 1.0, "budget": 3}, "budget_seconds: expected None with a budget of samples, got 1.0"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainingOptions(**change)

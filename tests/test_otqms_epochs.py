"""What an epoch is made of, and which one is kept."""

from __future__ import annotations

import pytest
import torch
from otqms_tasks import domain
from torch import nn

from transferops.otqms import (
    FeatureNet,
    TrainingOptions,
)
from transferops.otqms.distributed import World
from transferops.otqms.early_stopping import EarlyStopping
from transferops.otqms.pool import Pool
from transferops.otqms.sampling import Deck, draw
from transferops.otqms.training import EpochPlan, Evaluation, Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = domain("target", 0, 20)
OPTIONS = TrainingOptions(optimizer=torch.optim.SGD, schedule="constant")


class TestDraw:
    @pytest.mark.parametrize("quantity", [0, 1, 10, 37, 60])
    def test_without_replacement_and_stratified(self, quantity: int) -> None:
        labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 30)
        chosen = draw(labels, quantity, torch.Generator().manual_seed(0))
        assert len(chosen) == len(set(chosen.tolist())) == quantity
        counts = torch.bincount(labels[chosen], minlength=3)
        assert ((counts - quantity * torch.tensor([10, 20, 30]) / 60).abs() < 1.5).all()

    def test_every_sample_is_as_likely(self) -> None:
        labels = torch.tensor([0] * 4 + [1] * 12)
        generator = torch.Generator().manual_seed(0)
        counts = torch.zeros(16)
        for _ in range(4000):
            counts[draw(labels, 6, generator)] += 1
        # 6/16 of 4000 draws; a binomial standard deviation is 31.
        assert (counts - 1500).abs().max() < 125

    def test_generator_decides(self) -> None:
        labels = torch.zeros(50, dtype=torch.int64)
        first, again, other = (draw(labels, 9, torch.Generator().manual_seed(s)).tolist() for s in (1, 1, 2))
        assert first == again != other


@pytest.mark.parametrize(
    ("batch_size", "min_steps", "steps"), [(8, 1, 8), (8, 20, 24), (60, 1, 1), (60, 5, 5), (59, 1, 2)]
)
def test_an_epoch_is_whole_passes_of_at_least_min_steps(batch_size: int, min_steps: int, steps: int) -> None:
    model = FeatureNet(4, 3)
    pool = Pool({"target": TARGET}, torch.device("cpu"))
    plan = EpochPlan.shuffled(torch.arange(60), batch_size, min_steps, torch.Generator().manual_seed(0))
    assert all(torch.equal(row.sort().values, torch.arange(60)) for row in plan.order)
    sizes = [len(batch) for batch in plan.batches()]
    assert len(sizes) == plan.total_steps == steps
    assert max(sizes) - min(sizes) <= 1
    stepper = Stepper(model, OPTIONS, 1e-30, World())
    losses = list(stepper.steps(pool, plan, 0, (0, 1)))
    expected = nn.functional.cross_entropy(model(TARGET.inputs), TARGET.labels).item()
    assert sum(losses).item() / plan.order.numel() == pytest.approx(expected, rel=1e-5)


class TestDeck:
    def test_every_sample_before_any_comes_again(self) -> None:
        labels = torch.arange(30) % 3
        deck, generator = Deck(labels), torch.Generator().manual_seed(0)
        counts = torch.zeros(30, dtype=torch.int64)
        for quantity in (7, 0, 13, 25, 30, 4, 61, 29):
            hand = deck.deal(quantity, generator)
            assert len(hand) == quantity
            within = torch.bincount(hand, minlength=30)
            assert within.max() <= 1 or quantity > 30
            counts += within
            assert counts.max() - counts.min() <= 2

    def test_a_hand_is_stratified(self) -> None:
        labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 30)
        deck, generator = Deck(labels), torch.Generator().manual_seed(0)
        for _ in range(5):
            counts = torch.bincount(labels[deck.deal(12, generator)], minlength=3)
            assert ((counts - torch.tensor([2, 4, 6])).abs() <= 2).all()


class TestEarlyStopping:
    @staticmethod
    def follow(accuracies: list[float | None], patience: int) -> tuple[int, int, float]:
        """Kept epoch, last epoch, and the weight that the kept model had."""
        model, stopping = nn.Linear(1, 1), EarlyStopping(patience)
        epoch = 0
        for epoch, accuracy in enumerate(accuracies, start=1):
            nn.init.constant_(model.weight, epoch)
            evaluation = None if accuracy is None else Evaluation(loss=1.0, accuracy=accuracy)
            stopping.update(epoch, evaluation, model)
            if stopping.over(epoch):
                break
        stopping.restore(model)
        return stopping.epoch, epoch, model.weight.item()

    @pytest.mark.parametrize(
        ("accuracies", "patience", "kept", "last"),
        [
            ([0.5, 0.7, 0.6, 0.6, 0.9], 2, 2, 4),
            ([0.5, 0.7, 0.6, 0.6, 0.9], 3, 5, 5),
            ([0.5, 0.7, 0.6, 0.7, 0.6], 2, 4, 5),
            ([0.0, 0.0, 0.0], 1, 3, 3),
            ([None, None, None, None], 1, 4, 4),
        ],
    )
    def test_keeps_the_latest_of_the_best(
        self, accuracies: list[float | None], patience: int, kept: int, last: int
    ) -> None:
        assert self.follow(accuracies, patience) == (kept, last, float(kept))

"""Translations: pixels go where they should, and neither pieces, processes, data sets nor interruptions matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transferops.otqms import OTQMS, ConvNet, FeatureNet, TrainingOptions, TrainingRun
from transferops.otqms import run as run_module
from transferops.otqms.augmentation import draw_offsets, translate
from transferops.otqms.phases import Phase, everything
from transferops.otqms.pool import Pool, TensorSamples
from transferops.otqms.strategies import STRATEGIES, Strategy, add
from transferops.otqms.training import EpochPlan, Stepper

OPTIONS = TrainingOptions(epochs=2, batch_size=7, min_steps=5, lr=1e-2)
WORLD = run_module.World()


@pytest.fixture(autouse=True, scope="module")
def _strategies() -> Iterator[None]:
    add("still", Strategy((Phase(everything),)))
    add("moving", Strategy((Phase(everything, translation=0.25),)))
    yield
    del STRATEGIES["still"], STRATEGIES["moving"]


def images(seed: int, count: int) -> TensorSamples:
    generator = torch.Generator().manual_seed(seed)
    return TensorSamples(torch.randn(count, 2, 8, 9, generator=generator), torch.arange(count) % 3)


def vectors(seed: int, count: int) -> TensorSamples:
    samples = images(seed, count)
    return TensorSamples(samples.inputs.flatten(1), samples.labels)


def fit(strategy: str, checkpoint: Path | None = None, **changes: Any) -> TrainingRun:
    options = dataclasses.replace(OPTIONS, **changes)
    return OTQMS(
        lambda: ConvNet(2, 3, width=4), images(0, 9), {"a": images(1, 20)}, options=options, checkpoint=checkpoint
    ).fit(strategy)


def losses(run: TrainingRun) -> list[float]:
    return [record.train_loss for record in run.epochs]


class TestTranslate:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_by_padding_and_cutting(self, memory_format: torch.memory_format, channels: int) -> None:
        generator = torch.Generator().manual_seed(0)
        batch = torch.randn(11, channels, 5, 7, generator=generator).contiguous(memory_format=memory_format)
        offsets = torch.randint(-6, 7, (11, 2), generator=generator)
        moved = translate(batch, offsets)
        assert moved.is_contiguous(memory_format=memory_format)
        for image, (down, right), result in zip(batch.numpy(), offsets.tolist(), moved.numpy(), strict=True):
            padded = np.pad(image, ((0, 0), (6, 6), (6, 6)), mode="edge")
            np.testing.assert_array_equal(result, padded[:, 6 - down : 11 - down, 6 - right : 13 - right])

    def test_offsets_reach_as_far_as_said(self) -> None:
        generator = torch.Generator().manual_seed(0)
        offsets = draw_offsets(torch.Size((3, 28, 40)), 1 / 16, torch.Size((50, 20)), generator)
        assert offsets is not None
        assert offsets.shape == (50, 20, 2)
        for axis, most in enumerate((2, 2)):  # 1.75 and 2.5, a half down
            values, counts = offsets[..., axis].unique(return_counts=True)
            assert values.tolist() == list(range(-most, most + 1))
            assert (counts - 200).abs().max() < 5 * 200**0.5

    @pytest.mark.parametrize("shape", [(3, 8, 8), (12,), (), (4, 4), (3, 2, 28, 28)])
    def test_nothing_to_move(self, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        assert draw_offsets(torch.Size(shape), 1 / 16, torch.Size((4,)), generator) is None
        assert torch.equal(generator.get_state(), before)


class TestTraining:
    def test_each_sample_has_its_own_offset(self) -> None:
        """Two steps by hand, on images moved beforehand."""
        samples = images(0, 12)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(12, generator=generator)[None]
        offsets = torch.randint(-2, 3, (1, 12, 2), generator=generator)
        inverse = order[0].argsort()
        ready = TensorSamples(translate(samples.inputs, offsets[0, inverse]), samples.labels)
        results = []
        for own, moves in ((samples, offsets), (ready, None)):
            torch.manual_seed(0)
            model = ConvNet(2, 3, width=4)
            stepper = Stepper(model, dataclasses.replace(OPTIONS, accumulate=2), 1e-2, WORLD)
            plan = EpochPlan(order, 2, offsets=moves)
            pool = Pool({"target": own}, torch.device("cpu"))
            results.append(torch.stack(list(stepper.steps(pool, plan, 0, (0, 1)))))
        assert torch.equal(*results)

    def test_images_move_and_vectors_do_not(self) -> None:
        assert losses(fit("moving")) != losses(fit("still"))
        trainer = OTQMS(lambda: FeatureNet(144, 3), vectors(0, 9), {"a": vectors(1, 20)}, options=OPTIONS)
        assert losses(trainer.fit("moving")) == losses(trainer.fit("still"))

    def test_pieces_do_not_matter(self) -> None:
        assert losses(fit("moving", accumulate=3)) == pytest.approx(losses(fit("moving")), rel=1e-5)

    def test_interruptions_do_not_matter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Killed(BaseException):
            pass

        written = []

        def save_and_die(*arguments: Any) -> None:
            save(*arguments)
            written.append(arguments)
            if len(written) % 3 == 0:
                raise Killed

        save = run_module.checkpoint.save
        monkeypatch.setattr(run_module.checkpoint, "save", save_and_die)
        interruptions = 0
        while True:
            try:
                run = fit("moving", tmp_path, checkpoint_steps=1)
                break
            except Killed:
                interruptions += 1
        assert interruptions > 2
        expected = fit("moving")
        assert losses(run) == losses(expected)
        for value, other in zip(run.model.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(value, other)

"""Samples held out in turn: early stopping by folds, and the guard."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from otqms_tasks import task, timeless
from torch import nn

from transferops.otqms import OTQMS, STRATEGIES, TrainingOptions
from transferops.otqms.cross_validation import stratified_folds
from transferops.otqms.guard import choose
from transferops.otqms.pool import TensorSamples

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainingOptions(
    epochs=5, early_stopping="folds", folds=3, batch_size=8, min_steps=6, source_steps=20, lr=1e-2, schedule="constant"
)


TARGET, SOURCES = task(0, 6), {"near": task(1, 20), "far": task(2, 16, 1)}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def trainer(target: Any = TARGET, sources: Any = None, checkpoint: Path | None = None, **changes: Any) -> OTQMS:
    options = dataclasses.replace(OPTIONS, **changes)
    return OTQMS(network, target, sources or SOURCES, options=options, checkpoint=checkpoint)


def without(samples: TensorSamples, fold: torch.Tensor) -> tuple[TensorSamples, TensorSamples]:
    """The samples that a fold leaves, and the fold."""
    kept = torch.ones(len(samples), dtype=torch.bool)
    kept[fold] = False
    return TensorSamples(samples.inputs[kept], samples.labels[kept]), TensorSamples(
        samples.inputs[fold], samples.labels[fold]
    )


@pytest.mark.parametrize(("samples", "folds"), [(18, 3), (20, 4), (7, 2)])
def test_folds_are_disjoint_and_stratified(samples: int, folds: int) -> None:
    labels = torch.arange(samples) % 3
    parts = stratified_folds(labels, folds, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(samples))
    counts = torch.stack([torch.bincount(labels[part], minlength=3) for part in parts])
    assert (counts.max(0).values - counts.min(0).values).max() <= 1
    assert counts.sum(1).max() - counts.sum(1).min() <= 1


class TestEarlyStopping:
    def test_epochs_are_those_of_most_right_answers(self) -> None:
        """As counted over separate trainings with each fold as the validation part."""
        ours = trainer()
        cross = ours._cross_validation
        assert cross is not None
        right = np.zeros(5)
        for fold in cross._folds:
            rest, held_out = without(TARGET, fold)
            options = dataclasses.replace(OPTIONS, early_stopping=True, patience=99)
            alone = OTQMS(network, rest, SOURCES, validation=held_out, options=options)
            right += [round(r.validation_accuracy * len(fold)) for r in alone.fit("all-sources").epochs]
        best = 1 + max(i for i in range(5) if right[i] == right.max())
        assert cross.epochs("all-sources") == (best,)
        run = ours.fit("all-sources")
        assert len(run.epochs) == run.kept_epoch == best
        assert run.kept.samples == 18 + 108
        assert cross.seconds > 0 == run.cross_validation_seconds  # counted with the first that asked

    def test_the_training_is_the_beginning_of_the_whole_one(self) -> None:
        """Schedules included."""
        found = trainer(schedule="cosine").fit("all-sources")
        whole = trainer(schedule="cosine", early_stopping=False).fit("all-sources")
        assert timeless(found) == timeless(whole)[: len(found.epochs)]

    def test_phases(self) -> None:
        """Each has a number of its own; what may stay may have none, what never stops has all."""
        ours = trainer()
        cross = ours._cross_validation
        assert cross is not None
        pooled, tuned = cross.epochs("pooled-then-fine-tuned")
        assert 1 <= pooled <= 5
        assert 0 <= tuned <= 1
        assert len(ours.fit("pooled-then-fine-tuned").epochs) == pooled + tuned
        seconds = cross.seconds
        assert cross.epochs("recommended") == (14, 1)
        assert cross.seconds < seconds + 0.1

    def test_a_phase_with_no_epochs_is_left_out(self) -> None:
        ours = trainer()
        prepared, phases = ours._prepared, STRATEGIES["pooled-then-fine-tuned"].phases
        run = prepared.run("a", "training", phases, planned=(2, 0))
        run.complete()
        assert [record.phase for record in run.records] == ["pooled", "pooled"]
        assert run.kept_epoch == 2

    def test_goes_on_from_checkpoints(self, tmp_path: Path) -> None:
        first = trainer(checkpoint=tmp_path).fit("quantities-dynamic")
        names = {path.name for path in (tmp_path / "seed-0").iterdir()}
        assert {"quantities-dynamic.ckpt", "fold-0-validated", "source-0.ckpt"} <= names
        assert not (tmp_path / "seed-0" / "fold-0-validated" / "source-0.ckpt").exists()
        again = trainer(checkpoint=tmp_path).fit("quantities-dynamic")
        assert timeless(first) == timeless(again) == timeless(trainer().fit("quantities-dynamic"))

    def test_no_more_folds_than_the_rarest_class_has_samples(self) -> None:
        few = trainer(task(0, 2))
        assert few._cross_validation is not None
        assert [len(fold) for fold in few._cross_validation._folds] == [3, 3]
        message = "target: expected at least 2 samples of every class for cross-validation, got a class with 1"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            trainer(task(0, 1))


class TestGuard:
    def test_errors_are_of_models_that_have_not_seen_the_sample(self) -> None:
        ours = trainer(early_stopping=False, guard=True)
        cross = ours._cross_validation
        assert cross is not None
        expected = []
        for fold in cross._folds:
            rest, held_out = without(TARGET, fold)
            run = OTQMS(network, rest, SOURCES, options=dataclasses.replace(OPTIONS, early_stopping=False)).fit(
                "weights"
            )
            expected += (run.model(held_out.inputs).argmax(1) != held_out.labels).double().tolist()
        assert cross.errors("weights").tolist() == expected

    def test_sources_that_mislead_are_given_up(self) -> None:
        """Their labels are all exchanged and there are many of them: training on everything fails on the target."""
        sources = {"wrong": task(1, 60, 1), "wrong too": task(2, 60, 1)}
        run = trainer(task(0, 12), sources, early_stopping=False, guard=True, min_steps=20).fit("all-sources")
        assert (run.strategy, run.replaced_by) == ("all-sources", "target-only")
        assert all(not any(record.quantities.values()) for record in run.epochs)
        assert run.verdicts[0].startswith("reject: all-sources is worse than target-only: mean loss difference +")
        assert run.verdicts[-1].startswith("target-only is trained in the place of all-sources: held-out errors")

    @pytest.mark.parametrize("stopping", [False, "folds"])
    def test_what_is_as_good_is_trained_as_without(self, stopping: Any) -> None:
        guarded = trainer(early_stopping=stopping, guard=True).fit("quantities-dynamic")
        assert guarded.replaced_by is None
        assert timeless(guarded) == timeless(trainer(early_stopping=stopping).fit("quantities-dynamic"))
        assert guarded.verdicts[-1].startswith(
            "quantities-dynamic is kept, nothing speaking against it beyond chance: held-out"
        )

    def test_refuses_samples_that_are_in_no_fold(self) -> None:
        message = "guard: expected early_stopping False or 'folds', which leave no sample out of the folds, got True"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            TrainingOptions(early_stopping=True, guard=True)


class TestChoose:
    def test_best_fallback_in_the_place_of_what_is_rejected(self) -> None:
        right, some, wrong = np.zeros(30), np.arange(30) % 10 == 0, np.ones(30)
        choice = choose("ours", {"ours": wrong, "a": some, "b": right})
        assert choice.chosen == "b"
        assert choice.error_rates == {"ours": 1.0, "a": 0.1, "b": 0.0}
        assert [comparison.decision for comparison in choice.comparisons] == ["reject", "reject"]
        assert choose("ours", {"ours": some, "a": some, "b": wrong}).chosen == "ours"
        assert choose("ours", {"ours": wrong}).chosen == "ours"

    def test_an_equal_candidate_is_rarely_given_up(self) -> None:
        """At most one in 20; three standard deviations of 400 trials are 3.3 %."""
        rng = np.random.default_rng(0)
        given_up = 0
        for _ in range(400):
            losses = {name: (rng.random(40) < 0.3).astype(float) for name in ("ours", "a", "b")}
            given_up += choose("ours", losses).chosen != "ours"
        assert given_up / 400 < 0.05 + 0.033

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"^losses: expected an entry for the candidate, 'ours', got "):
            choose("ours", {"a": np.zeros(3)})

"""Sources with arbitrary labels: error rates by simulation, p-values by enumeration, and the trainer without them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from otqms_tasks import domain, task, timeless
from scipy.stats import binomtest
from torch import nn

from transferops.otqms import OTQMS, TrainingOptions
from transferops.otqms.screening import LabelVerdicts, judge_labels, screen

pytestmark = pytest.mark.usefixtures("one_thread")


def predictions(rng: np.random.Generator, labels: np.ndarray, classes: int, signal: float) -> np.ndarray:
    """Probabilities that lean to a class of their own in part ``signal`` of the samples; one-sided besides."""
    leaning = np.exp(rng.normal(size=(len(labels), classes)) + np.linspace(0, 2, classes))
    sure = np.eye(classes)[labels]
    right = rng.random(len(labels))[:, None] < signal
    return np.where(right, sure, leaning / leaning.sum(1, keepdims=True))


def uneven(rng: np.random.Generator, samples: int, classes: int) -> np.ndarray:
    weights = np.arange(1, classes + 1)
    return rng.choice(classes, samples, p=weights / weights.sum())


class TestJudgeLabels:
    @pytest.mark.parametrize(("kind", "classes"), [("shuffled", 3), ("shuffled", 6), ("renamed", 6)])
    def test_arbitrary_labels_are_accepted_as_rarely_as_stated(self, kind: str, classes: int) -> None:
        """Shuffled over the samples; or predicted well, but under other names (three classes have too few of them)."""
        rng, rounds, sources, false, small = np.random.default_rng(0), 150, 4, 0, 0
        for _ in range(rounds):
            probabilities, labels = [], []
            for _ in range(sources):
                truth = uneven(rng, 120, classes)
                probabilities.append(predictions(rng, truth, classes, 0.5))
                labels.append(rng.permutation(truth) if kind == "shuffled" else rng.permutation(classes)[truth])
            found = judge_labels(probabilities, labels, level=0.2)
            false += not {"accept", "weak"}.isdisjoint(found.decisions)
            small += int((found.p_arbitrary <= 0.5).sum())
        assert binomtest(false, rounds, 0.2, alternative="greater").pvalue > 1e-3
        assert binomtest(small, rounds * sources, 0.5).pvalue > 1e-3

    def test_a_source_of_use_is_rejected_as_rarely_as_stated(self) -> None:
        """At the very agreement from which on it is of use; small though it is, and hardly ever beyond."""
        rng, rejected = np.random.default_rng(1), np.zeros(2)
        for _ in range(300):
            for number, signal in enumerate((0.1, 0.2)):
                labels = uneven(rng, 400, 3)
                found = judge_labels([predictions(rng, labels, 3, signal)], [labels], level=0.1)
                rejected[number] += found.p_useful[0] <= 0.1
        assert binomtest(int(rejected[0]), 300, 0.1, alternative="greater").pvalue > 1e-3
        assert rejected[1] < 0.02 * 300

    def test_agreement_that_is_neither_arbitrary_nor_of_use_is_weak(self) -> None:
        rng = np.random.default_rng(7)
        labels = uneven(rng, 20_000, 6)
        signals = (0.0, 0.05, 0.3)
        found = judge_labels([predictions(rng, labels, 6, signal) for signal in signals], [labels] * 3)
        assert found.decisions == ("reject", "weak", "accept")

    def test_agreement_is_adjusted_balanced_accuracy(self) -> None:
        rng = np.random.default_rng(2)
        labels = uneven(rng, 60, 4)
        table = rng.dirichlet(np.ones(5), 60)
        found = judge_labels([table, np.eye(5)[labels]], [labels, labels])
        recall = np.mean([table[labels == c, c].mean() for c in range(4)])
        chance = np.mean([table[labels == c, :4].mean() for c in range(4)])
        np.testing.assert_allclose(found.agreements, [(recall - chance) / (1 - 1 / 4), 1])

    def test_names_are_enumerated(self) -> None:
        rng = np.random.default_rng(3)
        labels = np.repeat(np.arange(4), 8)
        table = predictions(rng, labels, 4, 0.1)
        found = judge_labels([table], [labels], level=0.1)  # 4! x .1 > 1
        means = np.stack([table[labels == c].mean(0) for c in range(4)])
        sums = [means[range(4), names].sum() for names in itertools.permutations(range(4))]
        assert found.p_arbitrary[0] == np.mean(np.array(sums) >= np.trace(means) - 1e-12)

    def test_labels_are_permuted_where_names_are_too_few(self) -> None:
        rng = np.random.default_rng(4)
        labels = uneven(rng, 40, 2)
        table = predictions(rng, labels, 2, 0.15)
        found = judge_labels([table], [labels])

        def agreement(names: np.ndarray) -> float:
            return float(np.mean([table[names == c, c].mean() for c in range(2)]))

        sampled = [agreement(rng.permutation(labels)) >= agreement(labels) for _ in range(4000)]
        assert abs(found.p_arbitrary[0] - np.mean(sampled)) < 0.02

    def test_many_classes(self) -> None:
        """More ways to name them than a float holds."""
        labels = np.repeat(np.arange(200), 3)
        arbitrary = np.random.default_rng(6).permutation(labels)
        found = judge_labels([0.9 * np.eye(200)[labels] + 0.1 / 200] * 2, [labels, arbitrary], draws=100)
        assert found.decisions == ("accept", "reject")

    def test_nothing_to_go_by(self) -> None:
        """A single class says nothing of what tells classes apart; a sample of each, nothing of the spread."""
        table = np.random.default_rng(5).dirichlet(np.ones(3), 9)
        alike, single, one = judge_labels(
            [table, table[:3], table[:1]], [np.full(9, 2), np.arange(3), np.array([1])]
        ).decisions
        assert (alike, single, one) == ("reject", "undecided", "undecided")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"probabilities": []}, "labels: expected one array for each of 0 sources, at least one, got 1"),
            ({"labels": [np.array([0, 3])]}, "labels[0]: expected classes from 0 to 2, got 0 to 3"),
            ({"labels": [np.array([0.0, 1.0])]}, "labels[0]: expected integers of shape [2], got float64 of shape [2]"),
            ({"probabilities": [np.ones((2, 1))]}, "probabilities[0]: expected shape [N, C], N at least 1, C at"),
            ({"gain": 1.0}, "gain: expected a number between 0 and 1, got 1.0"),
            ({"level": 0.5}, "level: expected a number between 0 and 1/2, got 0.5"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {"probabilities": [np.full((2, 3), 1 / 3)], "labels": [np.array([0, 1])], **changes}
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            judge_labels(**arguments)


class TestScreen:
    def test_trust_spreads(self) -> None:
        """The target admits the first, that one the second; what neither reaches is rejected or left undecided."""
        asked = []

        def judge(admitted: tuple[int, ...], others: tuple[int, ...]) -> LabelVerdicts:
            asked.append((admitted, others))
            told = {0: "accept", 1: "accept" if admitted else "reject", 2: "reject", 3: "undecided"}
            numbers = np.zeros(len(others))
            return LabelVerdicts(tuple(told[i] for i in others), numbers, numbers, numbers, numbers)

        found = screen(["a", "b", "c", "d"], judge)
        assert asked == [((), (0, 1, 2, 3)), ((0,), (1, 2, 3)), ((0, 1), (2, 3))]
        assert found.kept == (0, 1, 3)
        assert found.judges == ((), (0,), (0, 1))
        first, second = found.sentences
        assert first.startswith("source c: reject, its labels agree with a model of a, b by 0 (standard error 0;")
        assert second.startswith("source d: undecided, its labels")

    @pytest.mark.parametrize(
        ("first", "last", "rounds", "kept"),
        [
            # A weak one helps to judge the third, and is itself judged by those that are not weak.
            (("accept", "weak", "reject"), "reject", [(), (0, 1), (0, 2)], (0, 2)),
            (("accept", "weak", "reject"), "weak", [(), (0, 1), (0, 2)], (0, 1, 2)),
            (("accept", "weak", "accept"), "reject", [(), (0, 2)], (0, 2)),
            # There is nobody to judge them.
            (("weak", "weak", "weak"), "reject", [()], (0, 1, 2)),
        ],
    )
    def test_the_weak_are_judged_once_more(
        self, first: tuple[str, ...], last: str, rounds: list[tuple[int, ...]], kept: tuple[int, ...]
    ) -> None:
        def judge(admitted: tuple[int, ...], others: tuple[int, ...]) -> LabelVerdicts:
            numbers = np.zeros(len(others))
            told = ("", last, "accept") if admitted else first
            return LabelVerdicts(tuple(told[i] for i in others), numbers, numbers, numbers, numbers)

        found = screen(["a", "b", "c"], judge)
        assert (found.judges, found.kept) == (tuple(rounds), kept)
        assert len(found.sentences) == (last != "accept" and len(rounds) > 1)

    def test_without_a_first_nothing_is_told(self) -> None:
        zero = np.zeros(2)
        found = screen(["a", "b"], lambda *_: LabelVerdicts(("reject", "undecided"), zero, zero, zero, zero))
        assert found.kept == (0, 1)
        assert found.sentences == (
            "screening: the target's samples do not tell which sources' labels are arbitrary; none is rejected",
        )


OPTIONS = TrainingOptions(epochs=3, batch_size=8, min_steps=20, source_steps=20, lr=1e-2)
RELATED = {"near": domain("near", 1, 30), "like it": domain("like it", 2, 24)}


def trainer(sources: Any, **changes: Any) -> OTQMS:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    return OTQMS(network, task(0, 6), sources, options=dataclasses.replace(OPTIONS, **changes))


class TestTrainer:
    def test_related_sources_are_trained_on_as_without(self) -> None:
        screened, plain = (trainer(RELATED, screen=on).fit("recommended") for on in (True, False))
        assert screened.screening == ()
        assert timeless(screened) == timeless(plain)
        for p, q in zip(screened.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(p, q)

    @pytest.mark.parametrize("strategy", ["recommended", "shares"])
    def test_unrelated_sources_are_as_if_they_were_not_there(self, strategy: str) -> None:
        noise = torch.randn(120, 4, generator=torch.Generator().manual_seed(5))
        unrelated = {
            "exchanged": domain("exchanged", 3, 40, turn=1),
            "noise": dataclasses.replace(domain("noise", 4, 40), inputs=noise),
        }
        ours = trainer({**RELATED, **unrelated})
        run, without = ours.fit(strategy), trainer(RELATED).fit(strategy)
        assert [sentence.split(",")[0] for sentence in run.screening] == [
            "source exchanged: reject",
            "source noise: reject",
        ]
        for record, expected in zip(run.epochs, without.epochs, strict=True):
            assert record.quantities == {**expected.quantities, "exchanged": 0, "noise": 0}
        for p, q in zip(run.model.parameters(), without.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        report = ours.report(run)
        assert report.verdicts[:2] == run.screening
        assert {value.source: value.predicted for value in report.values}["noise"] == pytest.approx(0, abs=1e-12)
        assert not any("source noise" in verdict for verdict in report.verdicts[2:])

    def test_folds_judge_for_themselves_with_the_same_starts(self) -> None:
        ours = trainer({**RELATED, "exchanged": domain("exchanged", 3, 40, turn=1)}, guard=True, folds=2)
        run = ours.fit("recommended")
        cross = ours._cross_validation
        assert cross is not None
        for fold in cross._prepared.values():
            assert fold.screening.kept == (0, 1)
            assert fold._starts == {}
            assert fold.anchor("exact")[0] is not ours._prepared.anchor("exact")[0]
        assert run.verdicts[-1].startswith("recommended is kept")
        assert run.screening[0].startswith("source exchanged: reject")

"""How well scores rank: the four measures against their definitions, and their intervals."""

from __future__ import annotations

import csv
import itertools
import json
from typing import Any

import numpy as np
import pytest
from shared import shared_data

pytest.importorskip("scipy")

from scipy import stats

from transferops.rank import compare_scores, evaluate_ranking, evaluation


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def weighted_tau_reference(x: np.ndarray, y: np.ndarray) -> float:
    """Vigna's definition for distinct values: pairs weighted by 1/(r+1) + 1/(s+1), by the ranks of either, averaged."""

    def by_ranks_of(z: np.ndarray) -> float:
        rank = (-z).argsort().argsort()
        weight = {(i, j): 1 / (rank[i] + 1) + 1 / (rank[j] + 1) for i, j in itertools.combinations(range(len(z)), 2)}
        signed = sum(w * np.sign((x[i] - x[j]) * (y[i] - y[j])) for (i, j), w in weight.items())
        return float(signed / sum(weight.values()))

    return (by_ranks_of(x) + by_ranks_of(y)) / 2


@pytest.mark.parametrize("candidates", [2, 5, 40, 300])
def test_weighted_tau_with_ties_is_that_of_scipy(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_PAIRS", 3 * candidates**2)  # several blocks
    generator = np.random.default_rng(candidates)
    scores, accuracies = generator.integers(candidates, size=(2, 10, candidates)).astype(float)
    found = evaluation._weighted_tau(scores, 1e300 * accuracies, 1)
    for value, x, y in zip(found, scores, accuracies, strict=True):
        assert value == pytest.approx(stats.weightedtau(x, y).statistic, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("candidates", [2, 3, 11])
def test_measures(candidates: int) -> None:
    scores, accuracies = random(candidates), 80 + random(candidates, seed=1)
    for k in range(1, candidates + 1):
        quality = evaluate_ranking(scores, accuracies, k=k, resamples=5)
        assert quality.weighted_tau.value == pytest.approx(weighted_tau_reference(scores, accuracies))
        assert quality.pearson.value == pytest.approx(np.corrcoef(scores, accuracies)[0, 1])
        chosen = sorted(range(candidates), key=lambda i: -scores[i])[:k]
        best = sorted(range(candidates), key=lambda i: -accuracies[i])[:k]
        assert quality.relative_accuracy.value == pytest.approx(max(accuracies[i] for i in chosen) / accuracies.max())
        assert quality.recall.value == pytest.approx(len(set(chosen) & set(best)) / k)
    assert (quality.candidates, quality.targets, quality.k) == (candidates, 1, candidates)


def test_perfect_and_reversed() -> None:
    accuracies = np.array([60.0, 70, 80, 90])
    perfect = evaluate_ranking(accuracies**3, accuracies, resamples=50)
    assert (perfect.relative_accuracy.value, perfect.recall.value) == (1, 1)
    tau = perfect.weighted_tau
    assert (tau.value, tau.low, tau.high) == pytest.approx((1, 1, 1))
    reverse = evaluate_ranking(-accuracies, accuracies, resamples=50)
    assert (reverse.weighted_tau.value, reverse.pearson.value, reverse.recall.value) == pytest.approx((-1, -1, 0))
    assert reverse.relative_accuracy.value == pytest.approx(60 / 90)


def test_the_interval_of_tau_lies_around_it_and_needs_three_candidates() -> None:
    for seed in range(5):
        tau = evaluate_ranking(random(7, seed=seed), random(7, seed=seed + 5), resamples=50).weighted_tau
        assert -1 <= tau.low < tau.value < tau.high <= 1
    quality = evaluate_ranking([1.0, 2], [0.5, 0.6], resamples=50)
    assert quality.weighted_tau.value == pytest.approx(1)
    assert np.isnan([quality.weighted_tau.low, quality.weighted_tau.high]).all()


def test_several_targets_are_averaged() -> None:
    scores, accuracies = random(3, 7), 50 + random(3, 7, seed=1)
    together = evaluate_ranking(scores, accuracies, k=2, resamples=20)
    alone = [evaluate_ranking(x, y, k=2, resamples=20) for x, y in zip(scores, accuracies, strict=True)]
    for measure in ("weighted_tau", "pearson", "relative_accuracy", "recall"):
        mean = np.mean([getattr(quality, measure).value for quality in alone])
        assert getattr(together, measure).value == pytest.approx(mean)
    assert together.targets == 3


def test_constant_scores_are_undefined() -> None:
    accuracies = np.array([90.0, 80, 70, 60, 50])
    quality = evaluate_ranking(np.ones(5), accuracies, resamples=5)
    assert np.isnan(quality.weighted_tau.value)
    assert np.isnan(quality.pearson.low)
    # What choosing at random gives, though the best stands first.
    assert quality.relative_accuracy.value == pytest.approx(70 / 90)
    assert quality.recall.value == pytest.approx(1 / 5)


def test_relative_to_a_best_accuracy_of_zero_is_undefined() -> None:
    accuracies = np.array([[-1.0, 0, -2], [50, 60, 70]])
    quality = evaluate_ranking(random(2, 3), accuracies, resamples=20)
    assert np.isnan(quality.relative_accuracy.value)
    assert np.isfinite(quality.recall.value)
    # Resamples without the candidate of accuracy 0 count.
    assert quality.relative_accuracy.low <= quality.relative_accuracy.high


@pytest.mark.parametrize("seed", range(5))
def test_equal_scores_count_by_all_their_orders(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, accuracies = generator.integers(3, size=6).astype(float), generator.integers(50, 55, size=6).astype(float)
    orders = [order for order in itertools.permutations(range(6)) if all(np.diff(scores[list(order)]) <= 0)]
    for k in range(1, 7):
        quality = evaluate_ranking(scores, accuracies, k=k, resamples=5)
        relative = [max(accuracies[list(order[:k])]) / accuracies.max() for order in orders]
        recall = [np.mean(accuracies[list(order[:k])] >= np.sort(accuracies)[-k]) for order in orders]
        assert quality.relative_accuracy.value == pytest.approx(np.mean(relative))
        assert quality.recall.value == pytest.approx(np.mean(recall))


def test_compare_orders_by_tau() -> None:
    accuracies = np.arange(6.0)
    found = compare_scores({"bad": -accuracies, "flat": np.zeros(6), "good": accuracies}, accuracies, resamples=5)
    assert list(found) == ["good", "bad", "flat"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate_ranking([1.0], [1.0]), "scores: expected at least 2 candidates, got shape [1, 1]"),
        (lambda: evaluate_ranking([1.0, 2], [1.0, 2, 3]), "accuracies: expected shape [2] like scores, got shape [3]"),
        (lambda: evaluate_ranking([1.0, np.nan], [1.0, 2]), "scores: expected finite numbers, got nan at index [1]"),
        (lambda: evaluate_ranking(1.0, 1.0), "scores: expected shape [M] or [T, M], got shape []"),
        (lambda: evaluate_ranking([1.0, 2], [1.0, 2], k=3), "k: expected at most 2, the number of candidates, got 3"),
        (
            lambda: evaluate_ranking([1.0, 2], [1.0, 2], confidence=1),
            "confidence: expected a number between 0 and 1, got 1",
        ),
        (lambda: compare_scores({}, [1.0, 2]), "scores: expected at least one score, got none"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared below)
        call()
    assert str(caught.value) == message


def test_published_tables() -> None:
    """The ranking of architectures on one data set, taken as a score for another: published accuracies agree well."""
    table = json.loads(shared_data("transferability/sfda_finetune_acc.json").read_text())["group1"]
    models = list(table["cars"])
    quality = evaluate_ranking(
        [table["aircraft"][m] for m in models], [table["cars"][m] for m in models], k=3, resamples=200
    )
    assert quality.candidates == 11
    assert quality.weighted_tau.low <= quality.weighted_tau.value <= quality.weighted_tau.high
    with shared_data("transferability/parc_oracles_controlled.csv").open() as file:
        rows = list(csv.DictReader(file))
    targets = sorted({row["Target Dataset"] for row in rows})
    names = sorted({(row["Architecture"], row["Source Dataset"]) for row in rows})
    oracle = {(row["Architecture"], row["Source Dataset"], row["Target Dataset"]): float(row["Oracle"]) for row in rows}
    complete = [name for name in names if all((*name, target) in oracle for target in targets)]
    accuracies = np.array([[oracle[(*name, target)] for name in complete] for target in targets])
    leave_one_out = (accuracies.sum(0) - accuracies) / (len(targets) - 1)
    assert evaluate_ranking(leave_one_out, accuracies, resamples=20).pearson.value > 0

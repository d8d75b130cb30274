"""The guard-rail: error rates by simulation, exact p-values on small cases, and what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from rates import DIMENSION, LIMIT, source_decisions
from scipy.stats import binomtest

from transferops.otqms.allocation import allocate
from transferops.otqms.guard import caution, compare_losses, judge_sources


def share(decision: str, scaled_discrepancy: float, repetitions: int) -> float:
    """How often it comes for a source at this N0 t."""
    return source_decisions(scaled_discrepancy, repetitions).count(decision) / repetitions


def test_errors_are_rarer_away_from_the_limit() -> None:
    """At the limit they are as frequent as stated (test_statistical_truth.py)."""
    for factor in (0.0, 0.3, 0.8):
        assert share("reject", factor * LIMIT, 1000) < 0.05
    for factor in (1.3, 3.0):
        assert share("accept", factor * LIMIT, 1000) < 0.05


def test_clear_cases_are_decided() -> None:
    assert share("accept", 0, 500) > 0.75
    assert share("reject", 10 * LIMIT, 500) > 0.99


@pytest.mark.parametrize("distance", [0.0, 1e-300, 1e-26, 1e-9, 1e300])
@pytest.mark.parametrize("dimension", [1e-3, 36.0, 1e4])
def test_extreme_distances_are_decided(distance: float, dimension: float) -> None:
    """SciPy's distribution raises where its value is nothing."""
    found = judge_sources([distance], 12, [200], dimension)
    assert found.p_useful[0] + found.p_useless[0] == pytest.approx(1)
    if dimension > 1:
        assert found.decisions == ("reject" if distance > 1 else "accept",)


def test_sources_are_described() -> None:
    """A source of too few samples is rejected whatever its distance."""
    per_sample = 1 / 20 + 1 / np.array([200, 200, 200, 9])
    verdicts = judge_sources(DIMENSION * per_sample * [0.5, 2.5, 9, 1], 20, [200, 200, 200, 9], DIMENSION, gain=0.5)
    assert verdicts.decisions == ("accept", "undecided", "reject", "reject")
    np.testing.assert_allclose(verdicts.limits, [1.9, 1.9, 1.9, 0])
    np.testing.assert_allclose(verdicts.discrepancies, [0, 1.65, 8.8, 0], atol=1e-9)
    first, second, third, _ = verdicts.sentences(["near", "so-so", "far", "tiny"])
    assert first.startswith("source near: accept, N0 t = 0 against 1.9: near enough")
    assert second.startswith("source so-so: undecided, N0 t = 1.65 against 1.9: the estimates do not tell")
    assert third.startswith("source far: reject, N0 t = 8.8 against 1.9: too far")
    assert verdicts.sentences()[2].startswith("source 2: reject")


def test_dimension_above_the_samples_is_told() -> None:
    assert caution([0.1, 9.0], 10, 10) == []
    (sentence,) = caution([0.1, 3.0, 3.1], 10, 60)
    assert sentence.startswith("d/N0 = 6: outside of the theory")
    assert "up to d/(2 N0) = 3 would be taken whole, here 2 of 3" in sentence
    whole, part = (allocate([[distance]], 10, [10**6], 60).total for distance in (3.0, 3.1))
    assert whole == 10**6 > part


@pytest.mark.parametrize("seed", range(10))
def test_p_values_are_those_of_all_sign_patterns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidate, baseline = rng.standard_normal((2, 7)).round(1)
    difference = candidate - baseline
    sums = np.array([np.dot(signs, np.abs(difference)) for signs in product([-1, 1], repeat=7)])
    result = compare_losses(candidate, baseline)
    assert result.p_better == pytest.approx((sums <= difference.sum() + 1e-9).mean())
    assert result.p_worse == pytest.approx((sums >= difference.sum() - 1e-9).mean())


@pytest.mark.parametrize(("fixed", "broken"), [(5, 0), (9, 2), (3, 8), (30, 12), (0, 0)])
def test_errors_are_compared_as_by_mcnemar(fixed: int, broken: int) -> None:
    baseline = np.array([1] * fixed + [0] * broken + [0] * 20 + [1] * 10)
    candidate = np.array([0] * fixed + [1] * broken + [0] * 20 + [1] * 10)
    result = compare_losses(candidate, baseline, draws=40_000)
    both = fixed + broken
    expected = binomtest(broken, both, alternative="less").pvalue if both else 1.0
    tolerance = 0 if both <= 16 else 5 * np.sqrt(expected / 40_000) + 1 / 40_000
    assert abs(result.p_better - expected) <= tolerance + 1e-12


def test_a_better_model_is_found_and_a_margin_forgives() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(60)
    better, worse = 0.5 * rng.standard_normal(60) - 0.4 + noise, 0.5 * rng.standard_normal(60) + 0.1 + noise
    names = ("with sources", "target alone")
    accepted = compare_losses(better, noise, names=names)
    assert accepted.decision == "accept"
    assert accepted.difference == pytest.approx((better - noise).mean())
    assert accepted.standard_error == pytest.approx((better - noise).std(ddof=1) / np.sqrt(60))
    assert accepted.sentence().startswith("accept: with sources is better than target alone: mean loss difference -0.")
    assert "on 60 held-out samples, p = " in accepted.sentence()
    rejected = compare_losses(noise, better, names=names)
    assert rejected.decision == "reject"
    assert rejected.p_worse == pytest.approx(accepted.p_better, abs=0.01)
    assert rejected.sentence().startswith("reject: with sources is worse than target alone: ")
    assert compare_losses(worse, noise).decision != "accept"
    forgiven = compare_losses(worse, noise, margin=0.5, names=names)
    assert forgiven.decision == "accept"
    assert "is no worse than target alone by more than 0.5: " in forgiven.sentence()
    few = compare_losses(better[:3], noise[:3], names=names)
    assert few.decision == "undecided"
    assert "neither better nor worse than target alone beyond chance" in few.sentence()


@pytest.mark.parametrize("losses", [[0.3], [0.0, 0.0]])
def test_what_decides_nothing(losses: list[float]) -> None:
    result = compare_losses(losses, np.zeros(len(losses)))
    assert result.decision == "undecided"
    assert result.p_worse >= 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_losses([], []), "candidate: expected losses of at least one sample, shape [N], got shape [0]"),
        (lambda: compare_losses([1, 2], [1]), "baseline: expected shape [2], as candidate, got shape [1]"),
        (lambda: compare_losses([np.nan], [1]), "candidate: expected finite numbers, got nan at index [0]"),
        (lambda: compare_losses([1], [1], level=0.5), "level: expected a number between 0 and 1/2, got 0.5"),
        (lambda: compare_losses([1], [1], margin=-1), "margin: expected a number that is not negative, got -1"),
        (lambda: compare_losses([1], [1], draws=0), "draws: expected an integer of at least 1, got 0"),
        (
            lambda: judge_sources([-1.0], 1, [1], 1),
            "distances: expected numbers that are not negative, shape [K], got list",
        ),
        (lambda: judge_sources([1.0], 1, [0], 1), "source_samples: expected positive numbers, shape [1], got list"),
        (lambda: judge_sources([1.0], 0, [1], 1), "target_samples: expected a number of at least 1, got 0"),
        (lambda: judge_sources([1.0], 1, [1], 0), "dimension: expected a positive number, got 0"),
        (lambda: judge_sources([1.0], 1, [1], 1, gain=0), "gain: expected a positive number, got 0"),
    ],
)
def test_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()

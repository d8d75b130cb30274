"""Reported intervals, errors of the first kind and optima against 1000 simulated repetitions each.

A rate p of n repetitions has the standard error sqrt(p (1 - p) / n); a nominal 95 % is to be 93 % to 97 %, give or take
two of them. The risks, the debiasing, the chance level of the H-score and the error rates of the guard-rail are
simulated beside their formulas: test_otqms_theory.py, test_otqms_weights.py, test_h_score.py and test_otqms_guard.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from transferops.otqms import optimal_quantity, single_source_risk
from transferops.scores import pge_gap

stats = pytest.importorskip("scipy.stats")

from transferops.adapt import paired_effects  # noqa: E402
from transferops.rank import evaluation  # noqa: E402
from transferops.scores.pge_gap import gaps, jackknife, weigh  # noqa: E402

REPETITIONS = 1000


def check_nominal(covered: int, repetitions: int = REPETITIONS, least: float = 0.93, most: float = 0.97) -> None:
    """A nominal 95 % that was counted."""
    error = 2 * math.sqrt(0.95 * 0.05 / repetitions)
    assert least - error <= covered / repetitions <= most + error


@pytest.mark.parametrize("candidates", [10, 20, 40])
@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_bootstrap_intervals_of_a_ranking_cover(candidates: int, correlation: float) -> None:
    """Pearson's correlation is the measure whose value in the population is known."""
    generator = np.random.default_rng(candidates)
    tail = 100 * evaluation.expanded_tail(candidates, 0.05)
    covered = 0
    for _ in range(REPETITIONS):
        x, noise = generator.normal(size=(2, candidates))
        y = correlation * x + math.sqrt(1 - correlation**2) * noise
        drawn = generator.integers(candidates, size=(400, candidates))
        repeated = evaluation._pearson(x[drawn], y[drawn], 1)
        low, high = np.nanpercentile(repeated, [tail, 100 - tail])
        covered += low <= correlation <= high
    check_nominal(covered)


@pytest.mark.parametrize(("seeds", "interval"), [(3, "t"), (10, "t"), (10, "bootstrap"), (20, "bootstrap")])
def test_interval_of_one_difference_covers(seeds: int, interval: str) -> None:
    """Paired: the seeds' own level is much larger than the difference and cancels."""
    generator = np.random.default_rng(seeds)
    covered = 0
    for _ in range(REPETITIONS):
        metrics = 10 * generator.normal(size=seeds) + generator.normal(size=(2, seeds)) + [[0.0], [0.3]]
        (effect,) = paired_effects(metrics, [0, 1], interval=interval, resamples=2000)
        covered += effect.low <= 0.3 <= effect.high
    check_nominal(covered)


def test_all_intervals_of_a_check_hold_at_once() -> None:
    """Bonferroni's correction holds the nominal rate from above; the differences share their baseline."""
    generator = np.random.default_rng(0)
    alphas = [0, 0.25, 0.5, 0.75, 1]
    wrong = 0
    for _ in range(REPETITIONS):
        effects = paired_effects(generator.normal(size=(5, 10)), alphas)
        wrong += any(effect.verdict != "undecided" for effect in effects)
    error = 2 * math.sqrt(0.95 * 0.05 / REPETITIONS)
    assert 0.01 <= wrong / REPETITIONS <= 0.05 + error


def test_standard_errors_of_the_principal_gradient_gap_cover() -> None:
    """Student's interval of the jackknife, of ten groups of restarts in 30 dimensions."""
    groups, dimension = 10, 30
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2, dimension, generator=generator, dtype=torch.float64)
    value = pge_gap([truth[0]], [truth[1]])
    noise = 0.3 * torch.randn(REPETITIONS, 2, groups, dimension, generator=generator, dtype=torch.float64)
    means = truth[:, None] + noise
    grams = torch.einsum("rkgp,rlhp->rkglh", means, means)
    weights = torch.ones(2, groups, dtype=torch.float64)
    quantile = float(stats.t.ppf(0.975, groups - 1))
    covered = 0
    for gram in grams:
        (error,) = jackknife(gram, weights, [gaps])
        covered += abs(float(gaps(weigh(gram, weights))[0, 1]) - value) <= quantile * float(error[0, 1])
    check_nominal(covered)


def test_the_optimal_quantity_is_the_best_of_those_simulated() -> None:
    """Gaussian tasks with unit information: the mean of pooled samples, whose divergence is half its squared error."""
    dimension, target_samples, discrepancy, repetitions = 20, 10, 0.2, 4000
    best = float(optimal_quantity(discrepancy, target_samples))
    quantities = np.array([0.0, best / 3, best, 3 * best])
    generator = np.random.default_rng(0)
    shift = np.zeros(dimension)
    shift[0] = math.sqrt(discrepancy * dimension)
    own, foreign = generator.normal(size=(2, repetitions, dimension))
    simulated = []
    for quantity in quantities:
        total = target_samples + quantity
        noise = math.sqrt(target_samples) * own + math.sqrt(quantity) * foreign
        estimate = (noise + quantity * shift) / total
        losses = (estimate**2).sum(1) / 2
        predicted = float(single_source_risk(quantity, discrepancy, target_samples, dimension))
        assert abs(losses.mean() - predicted) <= 4 * losses.std() / math.sqrt(repetitions)
        simulated.append(losses)
    for quantity, losses in zip(quantities, simulated, strict=True):
        if quantity != best:
            worse = losses - simulated[2]  # the same draws
            assert worse.mean() > 3 * worse.std() / math.sqrt(repetitions)

"""Rates of intervals and errors of the first kind, and the optimal quantity, against simulations.

The risks, the debiasing and the chance level of the H-score are simulated beside their formulas: test_otqms_theory.py,
test_otqms_weights.py and test_h_score.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy.stats")

from rates import RATES

from transferops.otqms import optimal_quantity, single_source_risk

REPETITIONS = 1000


@pytest.mark.parametrize("name", RATES)
def test_rates_are_as_stated(name: str) -> None:
    rate = RATES[name]
    repetitions = round(REPETITIONS * rate.share)
    assert rate.holds(rate.count(repetitions) / repetitions, repetitions)


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

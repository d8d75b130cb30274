"""Rates that the library states, of intervals that cover and of errors of the first kind, counted in simulations.

``make rates`` runs each 10,000 times, slow ones 2000 times, and writes bench/results/rates.json; the tests run a tenth
of that (test_statistical_truth.py).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from transferops.adapt import paired_effects
from transferops.otqms.guard import compare_losses, judge_sources
from transferops.rank import evaluate_ranking, evaluation
from transferops.scores import pge_gap
from transferops.scores.pge_gap import gaps, jackknife, weigh


@dataclass(frozen=True)
class Rate:
    """What is counted.

    Attributes:
        count: how often it comes in so many repetitions.
        least: the least rate that is right, up to the error of the simulation.
        most: the greatest.
        share: of the repetitions that are asked for; less than 1 for what is slow to count.
    """

    count: Callable[[int], int]
    least: float = 0.93
    most: float = 0.97
    share: float = 1

    def holds(self, rate: float, repetitions: int) -> bool:
        """Whether a rate is within the bounds, give or take three standard errors of each.

        Three, since some forty rates are tried: one that lies on its bound fails by chance in one of 740 simulations,
        and any of forty in one of 19; at two standard errors it would be in three of five.
        """

        def error(bound: float) -> float:
            return 3 * math.sqrt(bound * (1 - bound) / repetitions)

        return self.least - error(self.least) <= rate <= self.most + error(self.most)


def correlated(generator: np.random.Generator, candidates: int, correlation: float) -> tuple[Any, Any]:
    """Scores and accuracies of candidates, Gaussian."""
    x, noise = generator.normal(size=(2, candidates))
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def alone(measure: str) -> Any:
    """Of the measures of a ranking one, without the time that others take."""
    nothing = dict.fromkeys(evaluation._MEASURES, lambda x, y, k: np.zeros(len(x)))
    return mock.patch.object(evaluation, "_MEASURES", {**nothing, measure: evaluation._MEASURES[measure]})


def pearson_covers(candidates: int, correlation: float, repetitions: int) -> int:
    """The bootstrap of a ranking: Pearson's correlation is the measure whose value in the population is known."""
    generator = np.random.default_rng(candidates)
    covered = 0
    with alone("pearson"):
        for seed in range(repetitions):
            found = evaluate_ranking(*correlated(generator, candidates, correlation), resamples=400, seed=seed).pearson
            covered += found.low <= correlation <= found.high
    return covered


def tau_covers(candidates: int, correlation: float, repetitions: int) -> int:
    """The subsamples of a ranking, for weighted tau: its mean over sets of so many candidates is the value to cover."""
    generator = np.random.default_rng(candidates)
    many = [np.stack(pair) for pair in zip(*(correlated(generator, candidates, correlation) for _ in range(20_000)))]
    truth = evaluation._weighted_tau(*many, 1).mean()
    covered = 0
    with alone("weighted_tau"):
        for seed in range(repetitions):
            found = evaluate_ranking(*correlated(generator, candidates, correlation), seed=seed)
            covered += found.weighted_tau.low <= truth <= found.weighted_tau.high
    return covered


def effect_covers(seeds: int, interval: str, repetitions: int) -> int:
    """Paired: the seeds' own level is much larger than the difference and cancels."""
    generator = np.random.default_rng(seeds)
    covered = 0
    for _ in range(repetitions):
        metrics = 10 * generator.normal(size=seeds) + generator.normal(size=(2, seeds)) + [[0.0], [0.3]]
        (effect,) = paired_effects(metrics, [0, 1], interval=interval, resamples=2000)
        covered += effect.low <= 0.3 <= effect.high
    return covered


def gap_covers(repetitions: int) -> int:
    """Student's interval of the jackknife, of ten groups of restarts in 30 dimensions."""
    from scipy import stats

    groups, dimension = 10, 30
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2, dimension, generator=generator, dtype=torch.float64)
    value = pge_gap([truth[0]], [truth[1]])
    weights = torch.ones(2, groups, dtype=torch.float64)
    quantile = float(stats.t.ppf(0.975, groups - 1))
    covered = 0
    for _ in range(repetitions):
        means = truth[:, None] + 0.3 * torch.randn(2, groups, dimension, generator=generator, dtype=torch.float64)
        gram = torch.einsum("kgp,lhp->kglh", means, means)
        (error,) = jackknife(gram, weights, [gaps])
        covered += abs(float(gaps(weigh(gram, weights))[0, 1]) - value) <= quantile * float(error[0, 1])
    return covered


def check_errs(repetitions: int) -> int:
    """Any verdict of a check of four fractions that do nothing. Bonferroni's correction keeps the rate from above."""
    generator = np.random.default_rng(0)
    return sum(
        any(e.verdict != "undecided" for e in paired_effects(generator.normal(size=(5, 10)), [0, 0.25, 0.5, 0.75, 1]))
        for _ in range(repetitions)
    )


TARGET, SOURCE, DIMENSION, GAIN = 20, 200, 12, 0.5
LIMIT = 1 / GAIN - TARGET / SOURCE  # of N0 t, for a source to be of use


def source_decisions(scaled_discrepancy: float, repetitions: int, seed: int = 0) -> list[str]:
    """What is decided of a source at this N0 t: anisotropic J, all estimates by maximum likelihood."""
    rng = np.random.default_rng(seed)
    fisher = np.geomspace(100, 0.01, DIMENSION)
    delta = rng.standard_normal(DIMENSION)
    delta *= np.sqrt(scaled_discrepancy * DIMENSION / TARGET / (fisher * delta**2).sum())
    noise = rng.standard_normal((repetitions, 2, DIMENSION)) / np.sqrt(fisher)
    difference = delta + noise[:, 0] / np.sqrt(SOURCE) - noise[:, 1] / np.sqrt(TARGET)
    distances = (fisher * difference**2).sum(-1)
    return list(judge_sources(distances, TARGET, np.full(repetitions, SOURCE), DIMENSION, gain=GAIN).decisions)


LAWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Any]] = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
    "-1, 0 or 1": lambda rng, shape: rng.integers(-1, 2, shape).astype(float),
    "Student": lambda rng, shape: rng.standard_t(2, shape),
    "Laplace": lambda rng, shape: rng.exponential(size=shape) - rng.exponential(size=shape),
}


def loss_decisions(law: str, samples: int, repetitions: int) -> list[str]:
    """What is decided of models whose losses differ by chance alone."""
    losses = LAWS[law](np.random.default_rng(0), (repetitions, samples))
    return [compare_losses(row, np.zeros(samples), draws=500).decision for row in losses]


RATES: dict[str, Rate] = {
    **{
        f"interval of a ranking's correlation, {candidates} candidates, {correlation}": Rate(
            lambda n, candidates=candidates, correlation=correlation: pearson_covers(candidates, correlation, n)
        )
        for candidates in (10, 20, 40)
        for correlation in (0.0, 0.6, 0.9)
    },
    **{
        f"interval of a ranking's weighted tau, {candidates} candidates, {correlation}": Rate(
            lambda n, candidates=candidates, correlation=correlation: tau_covers(candidates, correlation, n), share=0.2
        )
        for candidates in (10, 20, 40)
        for correlation in (0.0, 0.6, 0.9)
    },
    **{
        f"interval of a difference, {seeds} seeds, {interval}": Rate(
            lambda n, seeds=seeds, interval=interval: effect_covers(seeds, interval, n)
        )
        for seeds, interval in ((3, "t"), (10, "t"), (10, "bootstrap"), (20, "bootstrap"))
    },
    "interval of a principal gradient gap": Rate(gap_covers),
    "a verdict of a check without any effect": Rate(check_errs, 0.01, 0.05),
    "a source at the limit rejected": Rate(lambda n: source_decisions(LIMIT, n).count("reject"), 0.04, 0.05),
    "a source at the limit accepted": Rate(lambda n: source_decisions(LIMIT, n).count("accept"), 0.04, 0.05),
    **{
        f"equal models told apart for the {side}, {law} losses of {samples} samples": Rate(
            lambda n, law=law, samples=samples, decision=decision: loss_decisions(law, samples, n).count(decision),
            0.0,
            0.05,
        )
        for side, decision in (("better", "accept"), ("worse", "reject"))
        for law in LAWS
        for samples in (6, 25)
    },
}


def main() -> None:
    """Count all of them and write what was found."""
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root / "bench"))
    from run import environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=10_000)
    parser.add_argument("--only", default="", help="what the names of rates contain that are counted anew")
    options = parser.parse_args()
    repetitions, place = options.repetitions, root / "bench" / "results" / "rates.json"
    torch.set_num_threads(1)
    conditions = environment()
    found: dict[str, dict[str, Any]] = {}
    if options.only:
        before = json.loads(place.read_text())
        found = {name: {"commit": before["environment"]["commit"], **x} for name, x in before["rates"].items()}
    for name, rate in RATES.items():
        if options.only not in name:
            continue
        own = round(repetitions * rate.share)
        value = int(rate.count(own)) / own
        found[name] = {
            "rate": value,
            "standard_error": math.sqrt(value * (1 - value) / own),
            "repetitions": own,
            "bounds": [rate.least, rate.most],
            "holds": rate.holds(value, own),
            "commit": conditions["commit"],
        }
        print(f"{name}: {value:.4f} of {rate.least}..{rate.most}", flush=True)
    rates = {name: found[name] for name in RATES if name in found}
    document = {"environment": conditions, "rates": rates}
    place.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(0 if all(each["holds"] for each in found.values()) else 1)


if __name__ == "__main__":
    main()

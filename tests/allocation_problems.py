"""Random problems for the tests and the benchmark of the allocation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class Problem(NamedTuple):
    gram: FloatArray
    target_samples: float
    source_samples: FloatArray
    dimension: float


def random_problem(seed: int, spread: float = 6, sources: int | None = None) -> Problem:
    """N0 t from 10^-spread to 10^spread, at times with identical, opposite, exact or exhausted sources."""
    rng = np.random.default_rng(seed)
    sources = sources or int(rng.choice([1, 2, 3, 5, 10, 20, 40]))
    target_samples, dimension = float(round(10 ** rng.uniform(0, 4))), float(10 ** rng.uniform(0, 6))
    differences = rng.standard_normal((int(rng.integers(1, 2 * sources + 1)), sources))
    if rng.random() < 0.3:  # one shift common to all sources
        differences += 3 * rng.standard_normal((len(differences), 1))
    per_source = sources if rng.random() < 0.5 else 1
    differences *= 10 ** rng.uniform(-spread / 2, spread / 2, per_source) / np.linalg.norm(differences, axis=0)
    first, second = rng.integers(0, sources, 2)
    if rng.random() < 0.3:
        differences[:, first] = differences[:, second]
    elif rng.random() < 0.2:
        differences[:, first] = -differences[:, second]
    elif rng.random() < 0.2:
        differences[:, first] = 0
    available = np.round(10 ** rng.uniform(0, rng.choice([1, 3, 6]), sources))
    if rng.random() < 0.3:
        available[rng.integers(0, sources)] = 0
    return Problem(differences.T @ differences * dimension / target_samples, target_samples, available, dimension)


def adversarial_problem(seed: int) -> Problem:
    """As random_problem, with sources that nearly coincide or nearly cancel, in any units and in float32."""
    rng = np.random.default_rng(seed)
    problem = random_problem(seed)
    eigenvalues, vectors = np.linalg.eigh(problem.gram)
    root = (vectors * np.sqrt(np.maximum(eigenvalues, 0))).T
    for _ in range(int(rng.integers(0, 3))):
        first, second = rng.integers(0, root.shape[1], 2)
        noise = 10 ** rng.uniform(-12, -1) * np.linalg.norm(root[:, second]) * rng.standard_normal(len(root))
        root[:, first] = noise - rng.choice([-1, 1]) * 10 ** rng.uniform(-3, 3) * root[:, second]
    if rng.random() < 0.2:  # one that cancels all others
        root[:, -1] = -root[:, :-1] @ rng.random(root.shape[1] - 1)
    units = 10 ** rng.uniform(-12, 12)
    gram = root.T @ root * units
    return problem._replace(
        gram=gram.astype(np.float32) if rng.random() < 0.3 else gram, dimension=problem.dimension * units
    )


def budget_of(problem: Problem, seed: int) -> dict[str, object]:
    """A budget from a thousandth of everything to all of it, at times in whole numbers, at times with costs."""
    rng = np.random.default_rng(seed)
    costs = 10 ** rng.uniform(-1, 1, problem.source_samples.size) if rng.random() < 0.5 else None
    everything = (problem.source_samples * (1.0 if costs is None else costs)).sum()
    budget = everything * 10 ** rng.uniform(-3, 0.1)
    return {"budget": round(budget) if rng.random() < 0.5 else budget, "costs": costs}

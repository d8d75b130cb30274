"""The paper's own way to the quantities: a grid over their sum, a quadratic program at each point [paper].

Kept for comparison: :func:`transferops.otqms.allocate` finds the optimum between the grid's points too, in one program.

Source: "A High-Dimensional Statistical Method for Optimizing Transfer Quantities in Multi-Source Transfer Learning",
NeurIPS 2025, arXiv 2502.04242, Theorem 7 and the algorithm after it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from transferops._validate import check_array, check_positive_int, fail
from transferops.otqms.allocation import check_problem
from transferops.otqms.quadratic_program import TOLERANCE, interior_point, upper_triangle
from transferops.otqms.theory import FloatArray, risk


class GridOptimum(NamedTuple):
    """The best point of the grid.

    Attributes:
        quantities: n, float64 [K].
        risk: expected risk at ``quantities``, in nats.
        totals: the grid, float64 [P]; its first point is 0.
        risks: the least risk at each of its points, float64 [P].
    """

    quantities: FloatArray
    risk: float
    totals: FloatArray
    risks: FloatArray


def paper_grid(
    gram: ArrayLike,
    target_samples: float,
    source_samples: ArrayLike,
    dimension: float,
    totals: ArrayLike | None = None,
    points: int = 50,
) -> GridOptimum:
    """The quantities of least risk on a grid over s = sum_i n_i [paper].

    For each s the shares alpha = n/s solve min alpha^T A alpha subject to 1^T alpha = 1, 0 <= alpha_i <= N_i/s.

    Args:
        gram: A, as in :func:`transferops.otqms.allocate`, and so are the next three.
        target_samples: N0.
        source_samples: N_i, shape [K].
        dimension: d.
        totals: the values of s, from 0 to sum N_i. If None, ``points`` of them, evenly spaced.
        points: how many, where ``totals`` is None.

    Returns:
        The best point, s = 0 being always among them.

    Raises:
        ValueError: an argument is out of its range.
        ImportError: the solver is not installed.
    """
    root, available, target_samples, dimension = check_problem(gram, target_samples, source_samples, dimension)
    everything = float(available.sum())
    if totals is None:
        grid = np.linspace(0, everything, 1 + check_positive_int("points", points))[1:]
    else:
        grid = np.unique(check_array("totals", totals).ravel())
        if grid.size and (grid[0] < 0 or grid[-1] > everything):
            fail("totals", f"values from 0 to sum N_i = {everything:g}", f"{grid[0]:g} to {grid[-1]:g}")
    grid = grid[grid > 0]
    scale = np.sqrt(np.maximum(np.square(root).sum(0).max(initial=0.0), np.finfo(np.float64).tiny))
    scaled = root / scale
    hessian = upper_triangle(2 * (scaled.T @ scaled))
    sources = available.size
    candidates = [np.zeros(sources)]
    for total in grid:
        alpha = interior_point(
            hessian,
            np.zeros(sources),
            [np.ones((1, sources)), -np.eye(sources), np.eye(sources)],
            np.concatenate([[1.0], np.zeros(sources), available / total]),
            [("Zero", 1), ("Nonnegative", 2 * sources)],
            TOLERANCE,
        )
        candidates.append(np.clip(alpha * total, 0, available))
    risks = risk(np.stack(candidates), root.T @ root, target_samples, dimension)
    best = int(np.argmin(risks))
    return GridOptimum(candidates[best], float(risks[best]), np.append(0.0, grid), risks)

"""The scores' formulas in float64, from features [N, D] and classes 0 .. C-1 [N], written for clarity only.

None where the problem is too ill-conditioned to compare.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import reference
import torch
from torch import Tensor


def _condition(x: Tensor) -> float:
    if not x.isfinite().all():  # of constant columns that were divided by their spread
        return math.inf
    values = torch.linalg.svdvals(x)
    return float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf


def h_score(
    x: Tensor, y: Tensor, *, regularized: bool = False, chance_corrected: bool = False, standardize: bool = False
) -> Any:
    samples, dim = x.shape
    classes = len(y.unique())
    if classes < 2 or samples < 3:
        return None
    if standardize:
        spread = x.std(0, correction=0)
        if not (spread > 0).all():
            return None
        x = x / spread
    if regularized:
        scale = float((x - x.mean(0)).abs().max())
        fine = scale > 0 and samples > 2 and dim > 1
        return reference.published_regularized_h_score(x / scale, y) if fine else None
    if samples <= dim + 1 or _condition((x - x.mean(0)) / x.std(0)) > 1e3:
        return None
    value = reference.projection_h_score(x, y)
    if chance_corrected:
        return (classes - 1) * (1 - (1 - value / (classes - 1)) * (samples - 1) / (samples - 1 - dim))
    return value


def log_me(x: Tensor, y: Tensor) -> Any:
    """The evidence over a fine grid of lambda = alpha / beta; flat at its maximum."""
    outputs = y.unsqueeze(1) if y.is_floating_point() else torch.nn.functional.one_hot(y).double()
    samples = len(x)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    if samples <= x.shape[1] or not len(s) or _condition(x) > 1e3:
        return None
    s = s.square() / s[0] ** 2
    grid = torch.logspace(-14, 14, 2801, dtype=torch.float64).unsqueeze(1)
    total = []
    for output in outputs.mT:
        along = (u.mT @ output).square()
        left = float(output.square().sum() - along.sum())
        if left < 1e-6 * float(output.square().sum()):
            return None
        misfit = left + (along * grid / (grid + s)).sum(1)
        evidence = torch.log(samples / misfit) / 2 + torch.log(grid / (grid + s)).sum(1) / (2 * samples)
        total.append(float(evidence.max()) - 0.5 - math.log(2 * math.pi) / 2)
    return sum(total) / len(total)


def trans_rate(x: Tensor, y: Tensor, *, eps: float = 1e-4, relative: bool = True) -> Any:
    x = x - x.mean(0)
    samples, dim = x.shape
    power = float(x.square().sum())
    if power == 0:
        return 0.0
    distortion = eps * (power / (samples * dim) if relative else 1.0)

    def rate(rows: Tensor) -> float:
        matrix = torch.eye(dim, dtype=torch.float64) + rows.mT @ rows / (len(rows) * distortion)
        return float(torch.linalg.slogdet(matrix)[1]) / 2

    if power / distortion > 1e12:
        return None
    within = sum(float((y == c).sum()) / samples * rate(x[y == c]) for c in y.unique())
    return rate(x) - within


def gbc(x: Tensor, y: Tensor, *, covariance: str = "diagonal", components: int | None = 64) -> Any:
    samples, dim = x.shape
    classes = [x[y == c] for c in y.unique()]
    if dim > 1 or samples < 4 or min(map(len, classes)) < 3:
        return None  # of one feature: then there is nothing to choose in the principal components
    if x.max() == x.min():  # as one Gaussian, at any variance
        return -len(classes) * (len(classes) - 1)
    total = 0.0
    for i, a in enumerate(classes):
        for j, b in enumerate(classes):
            if i != j:
                va, vb = float(a.var(correction=0)), float(b.var(correction=0))
                if min(va, vb) < 1e-12 * float(x.var()):
                    return None
                distance = float(a.mean() - b.mean()) ** 2 / (va + vb) * 2 / 8
                total -= math.exp(-distance - math.log((va + vb) / 2 / math.sqrt(va * vb)) / 2)
    return total


def knn(x: Tensor, y: Tensor, *, neighbors: int = 1, metric: str = "cosine") -> Any:
    """None where two distances are too close to tell apart."""
    points = torch.nn.functional.normalize(x) if metric == "cosine" else x - x.mean(0)
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    ordered, order = distance.sort(1)
    if len(x) > 2 and bool((ordered[:, 1:-1] - ordered[:, :-2] <= 1e-3 * ordered[:, -2:-1]).any()):
        return None
    hits = []
    for row, label in zip(y[order[:, :neighbors]].tolist(), y.tolist()):
        hits.append(max(dict.fromkeys(row), key=row.count) == label)
    return sum(hits) / len(hits)


def parc(x: Tensor, y: Tensor, *, components: int | None = 32) -> Any:
    from scipy import stats

    if components is not None or len(x) < 4 or x.shape[1] < 3 or len(y.unique()) in (1, len(x)):
        return None
    spread = x.std(0, correction=0)
    if float(spread.min()) < 1e-6 * float(x.abs().max()):
        return None
    near = np.corrcoef(((x - x.mean(0)) / spread).numpy())
    pairs = np.triu_indices(len(x), 1)
    distances = np.sort(near[pairs])
    if (np.diff(distances) < 1e-9).any():
        return None
    return 100 * float(stats.spearmanr(-near[pairs], (y[pairs[0]] != y[pairs[1]]).double().numpy()).statistic)


def no_reference(x: Tensor, y: Tensor, **_: Any) -> None:
    """Compared with its formula in test_scores_published.py; here by what holds of any problem."""

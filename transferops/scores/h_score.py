"""The H-score: how much of the class structure a linear head could read off the features.

H(f) = tr(cov(f)^-1 cov(E[f|Y])) [paper: Bao et al., ICIP 2019, "An Information-Theoretic Approach to Transferability in
Task Transfer Learning"; arXiv 2212.10082]. With X the centred features and P_X, P_Y the projections on the span of the
features and of the class indicators, H = tr(P_X P_Y) [derived]: the sum of squared canonical correlations. So
0 <= H <= min(rank X, C - 1), and H does not change under any invertible affine map of the features.

The regularised form [paper: Ibrahim, Ponomareva and Mazumder, arXiv 2110.06893] shrinks the covariance toward a
multiple of the identity by the rule of Ledoit and Wolf (2004). It is not invariant to the scale of single features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transferops import ops
from transferops._validate import fail
from transferops.scores.base import ScoreDetails
from transferops.scores.features import FeatureScore, FeatureSet
from transferops.scores.moments import FeatureMoments, check_batch, check_finite


@dataclass(frozen=True)
class HScoreDetails(ScoreDetails):
    """An H-score and what it rests on: :class:`ScoreDetails`, and two facts more.

    ``rank`` is D, or fewer if some features are constant or linearly dependent; ``shrinkage`` the Ledoit-Wolf alpha,
    None for the plain score.

    Attributes:
        chance_level: expected plain score of random labels, (C - 1) rank / (N - 1) [derived]; None when regularised.
        method: "cholesky", "eigen" (ill-conditioned features), "samples" (N <= D), or "trivial" (the score is 0).
    """

    chance_level: float | None = None
    method: str = ""


def h_score(
    features: Tensor | Any,
    labels: Tensor | Any,
    regularized: bool = False,
    *,
    chance_corrected: bool = False,
    standardize: bool = False,
) -> float:
    """H-score of features for labels; higher means more transferable.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16 tensor or array; any strides, CPU or CUDA.
        labels: [N] integers of any values; classes that do not occur play no part.
        regularized: shrink the covariance by Ledoit-Wolf (needed for N <= D, where the plain score is C - 1 for any
            features). Conventions as published: the covariance over N, that of the class means over N - 1.
        chance_corrected: report (C-1)(1 - (1 - H/(C-1)) (N-1)/(N-1-rank)) [derived], which is 0 on average for random
            labels; it may be negative. Plain score only.
        standardize: give every feature unit variance first. Changes the regularised score only.

    Returns:
        The score as a float, between 0 and min(rank, C - 1) (but for ``chance_corrected``).

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a feature is NaN or infinite, or options exclude each other.

    Warns:
        ScoreWarning: one class only (the score is 0); N <= D without regularisation; a regularised covariance shrunk
            all the way (the score is 0); directions left out because they lie below the rounding of the features; a
            result that rounding may have changed by more than 1e-4.
    """
    score = HScore(regularized, chance_corrected=chance_corrected)
    if standardize:
        features, labels = check_batch(features, labels)
        check_finite(features)
        if len(features):
            deviation, _ = torch.std_mean(features.double(), 0, correction=0)
            features = features.double() / torch.where(deviation > 0, deviation, 1)
    return score._once(features, labels)


class HScore(FeatureScore):
    """Streaming H-score: feed batches in any order, merge partial results, compute at any time.

    The result equals :func:`h_score` of all samples at once within 1e-10 (accumulation is in float64).
    ``details()`` returns :class:`HScoreDetails`.

    Args:
        regularized, chance_corrected: as for :func:`h_score`.

    Example:
        >>> score = HScore()
        >>> for features, labels in batches:
        ...     score.update(features, labels)
        >>> score.compute()
    """

    name = "h_score"

    def __init__(self, regularized: bool = False, *, chance_corrected: bool = False) -> None:
        if regularized and chance_corrected:
            fail("chance_corrected", "False when regularized", "both True")
        self.regularized = bool(regularized)
        self.chance_corrected = bool(chance_corrected)
        super().__init__()

    @property
    def needs_norms(self) -> bool:
        return self.regularized

    def _options(self) -> dict[str, Any]:
        return {"regularized": self.regularized}

    def _evaluate(self, data: FeatureSet) -> HScoreDetails:
        if data.classes == 1:
            return self._single_class(data.samples, data.dimension)
        return self._from_samples(data) if data.few else self._from_moments(data.moments)

    def _from_moments(self, moments: FeatureMoments) -> HScoreDetails:
        samples, dimension, classes = moments.samples, moments.mean.numel(), len(moments.classes)
        means = moments.sums / moments.counts.double().sqrt().unsqueeze(1)  # R^T: sqrt(n_c) (mean_c - mean)
        if self.regularized:
            assert moments.norms is not None
            trace, square = moments.gram.trace() / samples, moments.gram.square().sum() / samples**2
            alpha, sigma = _ledoit_wolf(trace, square, moments.norms.quartic, samples, dimension)
            if sigma == 0:
                return self._constant_features(samples, dimension, classes)
            covariance = moments.gram * ((1 - alpha) / samples)
            covariance.diagonal().add_(alpha * sigma)
            solution = _trace_of_ratio(covariance, means, moments)
            return self._regularized(solution, alpha, samples, dimension, classes)
        solution = _trace_of_ratio(moments.gram, means, moments)
        if solution.rank == 0:
            return self._constant_features(samples, dimension, classes)
        return self._plain(solution, samples, dimension, classes)

    def _from_samples(self, data: FeatureSet) -> HScoreDetails:
        """N <= D: everything from the N x N Gram K of the centred samples [derived]."""
        features, samples, dimension, classes = data.features, data.samples, data.dimension, data.classes
        # Z: indicators of the classes, centred, over sqrt(n_c); Z Z^T is the projection on the class structure.
        indicator = torch.nn.functional.one_hot(data.index, classes).double()
        indicator = (indicator - data.counts / samples) / data.counts.double().sqrt()
        if self.regularized:
            gram = data.sample_gram.gram
            square = gram.square().sum() / samples**2
            alpha, sigma = _ledoit_wolf(
                gram.trace() / samples, square, gram.diagonal().square().sum(), samples, dimension
            )
            if sigma == 0:
                return self._constant_features(samples, dimension, classes)
            solution = _Solution(
                _regularized_trace(gram, indicator, alpha, sigma), min(samples - 1, dimension), "samples", ""
            )
            return self._regularized(solution, alpha, samples, dimension, classes)
        # The plain score does not depend on the scale of a feature; unit variance keeps small ones from being lost.
        centred = features.double() - features.double().mean(0)
        deviation = centred.square().mean(0).sqrt()
        live = deviation > 2 * torch.finfo(features.dtype).eps * features.abs().amax(0)
        gram = ops.sample_gram(centred[:, live] / deviation[live]).gram
        values, vectors = torch.linalg.eigh(gram)
        kept = values > max(samples, dimension) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
        rank = int(kept.sum())
        if rank == 0:
            return self._constant_features(samples, dimension, classes)
        value = float((vectors[:, kept].mT @ indicator).square().sum())
        caveat = (
            f"h_score: {samples} samples of {dimension} features span the whole sample space (rank {rank}), so the "
            f"plain score is {min(classes - 1, rank)} or close to it for any features and says nothing; "
            "use regularized=True or more samples"
        )
        return self._plain(_Solution(value, rank, "samples", caveat), samples, dimension, classes)

    def _plain(self, solution: _Solution, samples: int, dimension: int, classes: int) -> HScoreDetails:
        value = _clip(solution.value, min(solution.rank, classes - 1))
        caveat = solution.caveat
        if self.chance_corrected:
            freedom = samples - 1 - solution.rank
            if freedom <= 0:
                fail(
                    "features",
                    f"more than {solution.rank + 1} samples for the chance-corrected score at rank {solution.rank}",
                    f"{samples}",
                )
            value = (classes - 1) * (1 - (1 - value / (classes - 1)) * (samples - 1) / freedom)
        chance = (classes - 1) * solution.rank / (samples - 1)
        return HScoreDetails(
            value,
            samples,
            classes,
            dimension,
            rank=solution.rank,
            warnings=(caveat,) if caveat else (),
            chance_level=chance,
            method=solution.method,
        )

    def _regularized(
        self, solution: _Solution, alpha: float, samples: int, dimension: int, classes: int
    ) -> HScoreDetails:
        # cov(E[f|Y]) over N - 1, the covariance over N, as in the published code and its descendants.
        value = (1 - alpha) * solution.value / (samples - 1)
        bound = min(solution.rank, classes - 1) * samples / (samples - 1)
        value = _clip(value, bound)
        caveat = solution.caveat
        if alpha == 1:
            caveat = (
                f"h_score: the covariance of {samples} samples is no further from a multiple of the identity than its "
                "sampling error: it is shrunk to that (alpha = 1) and the score is 0 for any labels; take more samples"
            )
        return HScoreDetails(
            value,
            samples,
            classes,
            dimension,
            rank=solution.rank,
            shrinkage=alpha,
            warnings=(caveat,) if caveat else (),
            method=solution.method,
        )

    def _single_class(self, samples: int, dimension: int) -> HScoreDetails:
        caveat = "h_score: all samples are of one class, so there is nothing to tell apart and the score is 0"
        return self._trivial(samples, dimension, 1, caveat)

    def _constant_features(self, samples: int, dimension: int, classes: int) -> HScoreDetails:
        caveat = "h_score: every feature is constant up to rounding, so the score is 0"
        return self._trivial(samples, dimension, classes, caveat)

    def _trivial(self, samples: int, dimension: int, classes: int, caveat: str) -> HScoreDetails:
        shrinkage, chance = (0.0, None) if self.regularized else (None, 0.0)
        return HScoreDetails(
            0.0,
            samples,
            classes,
            dimension,
            rank=0,
            shrinkage=shrinkage,
            warnings=(caveat,),
            chance_level=chance,
            method="trivial",
        )


@dataclass(frozen=True)
class _Solution:
    value: float
    rank: int
    method: str
    caveat: str


def _clip(value: float, bound: float) -> float:
    """Hold the score to its mathematical range, which rounding may overstep by a little and no more."""
    if not math.isfinite(value) or value < -1e-6 * bound or value > bound * (1 + 1e-6):
        raise ArithmeticError(f"h_score: the value {value} is outside [0, {bound}]; please report this input")
    return float(min(max(value, 0.0), bound))


def _ledoit_wolf(trace: Tensor, square: Tensor, quartic: Tensor, samples: int, dimension: int) -> tuple[float, float]:
    """Shrinkage alpha and target sigma = tr S / D, from tr S, ||S||_F^2 and sum_i |x_i|^4 (Ledoit and Wolf, 2004).

    alpha = N^-2 sum_i ||x_i x_i^T - S||_F^2 / ||S - sigma I||_F^2, where the sum is sum_i |x_i|^4 - N ||S||_F^2: no
    second product of size N D^2.
    """
    sigma = float(trace) / dimension
    spread = max(float(square) - dimension * sigma**2, 0.0)
    noise = min(max((float(quartic) / samples - float(square)) / samples, 0.0), spread)
    return (noise / spread if noise > 0 else 0.0), sigma


def _regularized_trace(gram: Tensor, indicator: Tensor, alpha: float, sigma: float) -> float:
    """tr(S_alpha^-1 R R^T) from K = F F^T [N, N] and Z; S_alpha = (1 - alpha) F^T F / N + alpha sigma I, R = F^T Z."""
    samples = len(gram)
    floor = samples * alpha * sigma
    if floor > 1e-6 * float(gram.trace()):  # Woodbury's formula; what cancels in it is relative to the floor
        projected = gram @ indicator
        inner = gram * (1 - alpha)
        inner.diagonal().add_(floor)
        solved = torch.cholesky_solve(projected, torch.linalg.cholesky(inner))
        ratio = (indicator * projected).sum() - (1 - alpha) * (projected * solved).sum()
        return float(ratio) * samples / floor
    values, vectors = torch.linalg.eigh(gram)
    kept = values > samples * torch.finfo(torch.float64).eps * values[-1]
    values, along = values[kept], (vectors[:, kept].mT @ indicator).square().sum(1)
    return float((samples * values / ((1 - alpha) * values + floor) * along).sum())


def _trace_of_ratio(matrix: Tensor, means: Tensor, moments: FeatureMoments) -> _Solution:
    """tr(matrix^+ R R^T) for a positive semidefinite matrix [D, D] and R^T = means [C, D].

    The matrix is scaled to unit diagonal, factored by Cholesky if it is far from singular, and otherwise by an
    eigendecomposition that leaves out what lies below the rounding of the features or of the accumulation.
    """
    samples, dimension = moments.samples, len(matrix)
    diagonal = matrix.diagonal()
    variance = moments.gram.diagonal() / samples
    rounding = (moments.unit_roundoff * moments.mean.abs()).square()
    # A constant feature leaves only the rounding of its mean. (Regularised, the diagonal is positive all the same.)
    live = (diagonal > 0) & ((variance > 4 * rounding) | (diagonal > 2 * moments.gram.diagonal()))
    rank = int(live.sum())
    if rank == 0:
        return _Solution(0.0, 0, "cholesky", "")
    if rank < dimension:
        matrix, means = matrix[live][:, live], means[:, live]
        variance, rounding, diagonal = variance[live], rounding[live], diagonal[live]
    scale = diagonal.rsqrt()
    matrix = matrix * scale * scale.unsqueeze(1)
    right = (means * scale).mT

    # Rounding of the input, uniform within +-u|x|, is noise of this variance relative to the feature's own; a matrix of
    # independent such entries has eigenvalues up to (1 + sqrt(D/N))^2 times that.
    noise = (moments.unit_roundoff**2 * variance + rounding) / (3 * variance.clamp(min=1e-300))
    noise = noise * (variance * samples / diagonal).clamp(max=1)
    eps = torch.finfo(torch.float64).eps
    arithmetic = 4 * eps * rank
    cut = max(arithmetic, float(noise.mean()) * (1 + math.sqrt(rank / samples)) ** 2)

    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0 and _smallest_eigenvalue(factor) > max(4 * cut, 1e-8):
        solved = torch.linalg.solve_triangular(factor, right, upper=False)
        return _Solution(float(solved.square().sum()), rank, "cholesky", "")

    values, vectors = torch.linalg.eigh(matrix)
    kept = values > cut * max(float(values[-1]), 1.0)
    values, vectors = values[kept], vectors[:, kept]
    share = (vectors.mT @ right).square().sum(1) / values
    value = float(share.sum())
    error = float((share * (eps * math.sqrt(rank) / values)).sum()) / max(value, 1e-300)
    dropped = rank - int(kept.sum())
    caveat = ""
    if dropped:
        caveat = (
            f"h_score: {dropped} of {rank} directions lie below the rounding level (relative singular value "
            f"{math.sqrt(cut):.1e} and less) and were left out; the score is exact if they are duplicates or linear "
            "combinations of other features, and a lower bound otherwise"
        )
    elif error > 1e-4:
        caveat = (
            f"h_score: the features are so close to linearly dependent (relative singular value "
            f"{math.sqrt(float(values[0])):.1e}) that rounding may have changed the score by {error:.1e} of its value"
        )
    return _Solution(value, int(kept.sum()), "eigen", caveat)


def _smallest_eigenvalue(factor: Tensor) -> float:
    """An estimate of the smallest eigenvalue of L L^T by a few inverse iterations: right within a small factor."""
    vector = torch.ones(len(factor), 1, dtype=factor.dtype, device=factor.device)
    vector[1::2] *= -1  # neighbouring features are rarely opposite: not orthogonal to the direction sought
    vector += torch.linspace(0, 1, len(factor), dtype=factor.dtype, device=factor.device).unsqueeze(1)
    norm = vector.norm()
    for _ in range(4):
        vector = vector / norm
        vector = torch.linalg.solve_triangular(factor, vector, upper=False)
        vector = torch.linalg.solve_triangular(factor.mT, vector, upper=True)
        norm = vector.norm()
    return 1 / float(norm)

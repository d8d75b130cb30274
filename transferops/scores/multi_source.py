"""Multi-source H-score: which combination of K feature extractors suits the target best.

H(w) is the H-score of f = sum_k w_k f_k [objective of the paper: Wu et al., AAAI 2024, "H-ensemble", arXiv 2312.12489].
With S_kl the blocks of the centred Gram matrix of all features side by side, and R_k the scaled class sums of f_k,

    S(w) = sum_kl w_k w_l S_kl,   R(w) = sum_k w_k R_k,   H(w) = tr(S(w)^-1 R(w) R(w)^T)     [derived],

so the samples are read once and any w costs one D x D factorisation; H is differentiable in w through it. H does not
change with the scale of w.

The released H-ensemble code maximises tr cov(E[f|Y]) / tr cov(f) instead, which leaves the inverse out: a ratio of two
quadratic forms in w. It is here as "trace_ratio", for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from transferops._validate import as_tensor, check_positive_int, describe, fail
from transferops.scores.base import Collection, Score, ScoreDetails
from transferops.scores.moments import FeatureMoments, MomentsAccumulator

_OBJECTIVES = ("h_score", "trace_ratio")
_STEPS = 100


class Combination(NamedTuple):
    """An optimal combination of sources.

    Attributes:
        weights: [K] float64, at least 0, sum 1 (or, with signs, the sum of absolute values 1).
        value: the objective there.
    """

    weights: Tensor
    value: float


class MultiSourceHScore(Score):
    """Streaming multi-source H-score: of the best combination of K sources' features, or of any you give.

    Memory is that of the K D x K D moments. For N <= D every combination scores C - 1; give ``shrinkage`` then.

    Args:
        sources: K.
        objective: "h_score", or "trace_ratio", which the released H-ensemble maximises.
        signed: let weights be negative; otherwise they are at least 0 and sum to 1, as in the paper.
        shrinkage: replace S(w) by (1 - a) S(w) + a tr S(w)/D I, 0 <= a < 1 [derived].

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> score = MultiSourceHScore(sources=3)
        >>> score.update([features_a, features_b, features_c], labels)
        >>> score.optimum().weights
    """

    name = "multi_source_h_score"
    takes = "features of every source"

    def __init__(
        self, sources: int, *, objective: str = "h_score", signed: bool = False, shrinkage: float = 0.0
    ) -> None:
        self.sources = check_positive_int("sources", sources)
        if objective not in _OBJECTIVES:
            fail("objective", " or ".join(map(repr, _OBJECTIVES)), describe(objective))
        if not isinstance(shrinkage, (int, float)) or isinstance(shrinkage, bool) or not 0 <= shrinkage < 1:
            fail("shrinkage", "a number in [0, 1)", describe(shrinkage))
        self.objective = objective
        self.signed = bool(signed)
        self.shrinkage = float(shrinkage)
        super().__init__()

    def _collection(self) -> Collection:
        return MomentsAccumulator()

    def _values_name(self) -> str:
        return "features"

    def update(self, values: Sequence[Tensor | Any] | Tensor | Any, labels: Tensor | Any) -> Self:
        """Add a batch.

        Args:
            values: K features [N, D] of the same samples, as a sequence or as [K, N, D].
            labels: [N] integers of any values.

        Raises:
            TypeError: an argument is no array or has the wrong kind of dtype.
            ValueError: not K sources, shapes or devices disagree, or a feature is NaN or infinite.
        """
        parts = [as_tensor("features", part) for part in values]
        if len(parts) != self.sources:
            fail("features", f"those of {self.sources} sources", f"{len(parts)}")
        for part in parts:
            if part.dim() != 2 or part.shape != parts[0].shape or part.device != parts[0].device:
                fail("features", f"[N, D] of every source, like {describe(parts[0])}", describe(part))
        return super().update(torch.cat(parts, 1), labels)

    def evaluate(self, weights: Tensor | Any) -> Tensor:
        """The objective for given weights, differentiable in them.

        Args:
            weights: [K] floating point, of any scale, not all zero.

        Returns:
            [] float64.

        Raises:
            TypeError: weights are no floating-point array.
            ValueError: there are not K of them, or no samples yet, or S(w) is singular.
        """
        weights = as_tensor("weights", weights)
        if not weights.is_floating_point():
            fail("weights", "floating point", describe(weights), TypeError)
        if weights.shape != (self.sources,):
            fail("weights", f"shape [{self.sources}]", describe(weights))
        if not bool(torch.isfinite(weights).all()) or not bool((weights != 0).any()):
            fail("weights", "finite numbers, not all zero", str(weights.tolist()))
        return self._objective(weights.double(), *self._blocks())

    def optimum(self) -> Combination:
        """The combination with the largest objective that is found from every source alone and from all alike.

        H is not concave in w; the result is never below the best single source, nor below equal weights.
        """
        gram, sums = self._blocks()

        def combine(point: Tensor) -> Tensor:
            """Weights on the sphere, or their squares on the simplex: the border is reached."""
            return point / point.norm() if self.signed else point.square() / point.square().sum()

        def value(weights: Tensor) -> float:
            return float(self._objective(weights, gram, sums))

        corners = torch.eye(self.sources, dtype=torch.float64, device=gram.device)
        equal = torch.full_like(corners[0], 1 / self.sources)
        best = max([*corners, equal], key=value)
        for start in [*(corners + 0.3), equal] if self.sources > 1 else []:
            point = start.clone().requires_grad_()
            optimizer = torch.optim.LBFGS(
                [point], max_iter=_STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
            )

            def closure(point: Tensor = point, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = -self._objective(combine(point), gram, sums)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)  # type: ignore[no-untyped-call]
            best = max([best, combine(point.detach())], key=value)
        if self.signed:
            best = best / best.abs().sum() * torch.sign(best[best.abs().argmax()])
        return Combination(best, value(best))

    def _evaluate(self, data: Any) -> ScoreDetails:
        moments = data.as_moments()
        classes, width = len(moments.classes), moments.mean.numel() // self.sources
        parts, value = {}, 0.0
        caveat = ""
        if classes == 1:
            caveat = f"{self.name}: all samples are of one class, so there is nothing to tell apart and the score is 0"
        else:
            weights, value = self.optimum()
            parts = {f"weight_{k}": float(weight) for k, weight in enumerate(weights)}
            corners = torch.eye(self.sources, dtype=torch.float64, device=weights.device)
            parts |= {f"source_{k}": float(self.evaluate(corner)) for k, corner in enumerate(corners)}
        return ScoreDetails(
            value,
            moments.samples,
            classes,
            width,
            shrinkage=self.shrinkage,
            warnings=(caveat,) if caveat else (),
            parts=parts,
        )

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """S_kl [K, D, K, D] over N, and R_k^T [K, C, D] over sqrt N."""
        if self.samples == 0:
            fail("features", "at least one sample before the score is computed", "none")
        assert isinstance(self._data, MomentsAccumulator)
        moments: FeatureMoments = self._data.as_moments()
        width = moments.mean.numel() // self.sources
        gram = moments.gram.reshape(self.sources, width, self.sources, width) / moments.samples
        sums = moments.sums / (moments.counts.double().unsqueeze(1) * moments.samples).sqrt()
        return gram, sums.reshape(-1, self.sources, width).transpose(0, 1)

    def _objective(self, weights: Tensor, gram: Tensor, sums: Tensor) -> Tensor:
        weights = weights / weights.abs().max()
        means = torch.einsum("k,kcd->cd", weights, sums)
        if self.objective == "trace_ratio":
            traces = torch.einsum("kdld->kl", gram)
            ratio: Tensor = means.square().sum() / (weights @ traces @ weights)
            return ratio
        covariance = torch.einsum("k,kdle,l->de", weights, gram, weights)
        width = len(covariance)
        target = covariance.diagonal().mean() * torch.eye(width, dtype=torch.float64, device=covariance.device)
        covariance = (1 - self.shrinkage) * covariance + self.shrinkage * target
        # Unit diagonal: the score does not depend on the scale of a feature, the factorisation does.
        scale = covariance.diagonal().detach().clamp(min=1e-300).rsqrt()
        factor, info = torch.linalg.cholesky_ex(covariance * scale * scale.unsqueeze(1))
        if int(info) or float(factor.diagonal().detach().min()) < 1e-6:
            fail(
                "features",
                "combined features of full rank (more samples than features, none constant or linearly dependent), or "
                "shrinkage",
                f"{self.samples} samples of {width} features whose covariance is singular",
            )
        solved = torch.linalg.solve_triangular(factor, (means * scale).mT, upper=False)
        value: Tensor = solved.square().sum() * (1 - self.shrinkage)
        return value


def multi_source_h_score(
    features: Sequence[Tensor | Any] | Tensor | Any,
    labels: Tensor | Any,
    *,
    objective: str = "h_score",
    signed: bool = False,
    shrinkage: float = 0.0,
) -> Combination:
    """The combination of K sources' features with the largest H-score.

    Args:
        features: K features [N, D] of the same target samples, as a sequence or as [K, N, D].
        labels: [N] integers of any values.
        objective, signed, shrinkage: as for :class:`MultiSourceHScore`.

    Returns:
        :class:`Combination`: the weights and the score.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes or devices disagree, no samples, a feature is NaN or infinite, or the covariance is singular.
    """
    score = MultiSourceHScore(max(len(features), 1), objective=objective, signed=signed, shrinkage=shrinkage)
    return score.update(features, labels).optimum()

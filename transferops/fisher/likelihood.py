"""The log-likelihood of the targets given the outputs: its gradients and its expected curvature.

With z_n = [T, C] the outputs of a sample (T = 1 for outputs [N, C]), its log-likelihood is the sum over its
positions,

- "cross_entropy": sum_t log softmax(z_nt)[y_nt], positions with target -100 left out;
- "mse": -1/2 sum_t |y_nt - z_nt|^2, a Gaussian of unit variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from transferops._validate import describe, fail
from transferops.fisher.batches import Batch
from transferops.fisher.contraction import softmax_fisher_gram, tangent_gram
from transferops.fisher.labels import LabelCheck, counts, readable

LOSSES = ("cross_entropy", "mse")
ESTIMATORS = ("exact", "monte_carlo", "empirical")


class Likelihood:
    """One estimator's view of the outputs, with the state of its random draws.

    Every estimator is a sum of outer products: J = (1/N) sum_n sum_m J_n^T b_nm b_nm^T J_n with cotangents
    b_m of the outputs. They are the gradient of the log-likelihood for the data's targets ("empirical") or
    for targets drawn from the model ("monte_carlo"), and the columns of a square root of its expected
    curvature ("exact"): sqrt(p_c) (e_c - p), or e_c for "mse", one per position and class [derived].
    """

    def __init__(self, estimator: str, loss: str, draws: int, seed: int) -> None:
        self.estimator = estimator
        self.loss = loss
        self.draws = draws
        self.seed = seed
        self.labels = LabelCheck()
        self._generator: torch.Generator | None = None

    def count(self, outputs: torch.Tensor) -> int:
        """How many cotangents there are."""
        if self.estimator == "exact":
            return outputs[0].numel()
        return self.draws if self.estimator == "monte_carlo" else 1

    def cotangents(self, batch: Batch, outputs: torch.Tensor) -> Iterator[torch.Tensor]:
        """The cotangents b_m, each [N, ..., C] in the dtype of the outputs."""
        z = _wide(outputs.detach())
        kept = self.kept(batch, outputs)
        if self.estimator == "exact":
            columns = self._columns(z, kept)
        elif self.estimator == "monte_carlo":
            columns = (self._score(z, self._draw(z), kept).div_(math.sqrt(self.draws)) for _ in range(self.draws))
        else:
            columns = iter([self._score(z, self._targets(batch, outputs), kept)])
        return (column.to(outputs.dtype) for column in columns)

    def gram(self, batch: Batch, outputs: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
        """sum_n T_kn^T H_n T_ln, float64 [K, K], from tangents [K, N, ..., C] and the exact curvature H."""
        z, rows = outputs.flatten(0, -2), tangents.flatten(1, -2)
        kept = self.kept(batch, outputs)
        if kept is not None:  # what does not count moves along nothing, from outputs that are finite
            mask = kept.flatten().unsqueeze(1)
            z, rows = torch.where(mask, z, 0), torch.where(mask, rows, 0)
        return softmax_fisher_gram(z, rows) if self.loss == "cross_entropy" else tangent_gram(rows)

    def heeding(self, batch: Batch) -> Batch:
        """A batch without targets, if they are known not to matter to :meth:`gram`."""
        y = batch.targets
        idle = self.loss == "mse" or not isinstance(y, torch.Tensor) or _fractional(y)
        if idle or (readable(batch.given) and bool(counts(batch.given).all())):
            return replace(batch, targets=None, given=None)
        return batch

    def curvature(self, batch: Batch, outputs: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        """H_n T_n, shaped as the outputs."""
        if self.loss == "mse":
            return tangent
        p, t = _wide(outputs).softmax(-1), _wide(tangent)
        result = p * (t - (p * t).sum(-1, keepdim=True))
        kept = self.kept(batch, outputs)
        if kept is not None:
            result *= kept.unsqueeze(-1)
        return result.to(outputs.dtype)

    def kept(self, batch: Batch, outputs: torch.Tensor) -> torch.Tensor | None:
        """Which positions count, [N, ...]; None if all are known to."""
        y = batch.targets
        if self.loss == "mse" or not isinstance(y, torch.Tensor) or _fractional(y):
            return None
        fits = y.shape == outputs.shape[:-1]
        if (readable(batch.given) or not fits) and counts(batch.given).all():
            return None
        if not fits:
            fail(f"batches[{batch.index}]", f"targets of shape {list(outputs.shape[:-1])}", describe(y))
        return counts(y)

    def _columns(self, z: torch.Tensor, kept: torch.Tensor | None) -> Iterator[torch.Tensor]:
        classes = z.shape[-1]
        p = z.softmax(-1)
        if kept is not None:
            p *= kept.unsqueeze(-1)  # a root of zero curvature
        for flat in range(z[0].numel()):
            column = torch.zeros_like(z)
            position, c = divmod(flat, classes)
            at = column.flatten(1, -2) if z.dim() > 2 else column.unsqueeze(1)
            at[:, position, c] = 1
            if self.loss == "cross_entropy":
                here = p.flatten(1, -2)[:, position] if z.dim() > 2 else p
                at[:, position] -= here
                at[:, position] *= here[:, c : c + 1].sqrt()
            yield column

    def _score(self, z: torch.Tensor, y: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the log-likelihood of targets y in the outputs."""
        if self.loss == "mse":
            return y - z
        score = z.softmax(-1).neg_()
        if kept is not None:
            y = y.clamp_min(0)
        score.scatter_add_(-1, y.unsqueeze(-1), torch.ones_like(score[..., :1]))
        return score if kept is None else score.mul_(kept.unsqueeze(-1))

    def _draw(self, z: torch.Tensor) -> torch.Tensor:
        if self._generator is None:
            self._generator = torch.Generator(z.device).manual_seed(self.seed)
        if self.loss == "mse":
            return z + torch.randn(z.shape, generator=self._generator, device=z.device, dtype=z.dtype)
        p = z.softmax(-1).flatten(0, -2)
        # As torch.multinomial draws one of each row; that waits for a GPU to find NaN, which the results show anyway.
        waits = torch.empty_like(p).exponential_(1, generator=self._generator)
        return (p / waits).argmax(-1).view(z.shape[:-1])

    def _targets(self, batch: Batch, outputs: torch.Tensor) -> torch.Tensor:
        argument, y = f"batches[{batch.index}]", batch.targets
        if not isinstance(y, torch.Tensor):
            expected = "(inputs, targets), the empirical Fisher information being that of the targets"
            fail(argument, expected, f"targets {describe(y)}", TypeError)
        if self.loss == "mse":
            if y.shape != outputs.shape or not y.is_floating_point():
                fail(argument, f"floating-point targets of shape {list(outputs.shape)}", describe(y))
            return _wide(y)
        if y.shape != outputs.shape[:-1] or _fractional(y):
            fail(argument, f"integer targets of shape {list(outputs.shape[:-1])}", describe(y))
        return self.labels.look(batch, y.long(), outputs.shape[-1])


def _fractional(y: torch.Tensor) -> bool:
    return y.is_floating_point() or y.is_complex() or y.dtype is torch.bool


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype is torch.float64 else t.float()

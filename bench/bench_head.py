"""The closed-form head: a whole path of penalties with leave-one-out, against its unavoidable parts and scikit-learn.

Rows:

* ``path``: N=50000 float32 features of p=2048, labels of c=1000 classes, 50 penalties. Leave-one-out on 256 random rows
  (each exactly, under all samples); the contender is what cannot be avoided, the Gram matrix and one
  eigendecomposition, and their time is the floor. The difference to leave-one-out over all rows is on record for one
  penalty: all rows take 2 N p c operations for each, the Gram matrix N p^2 once, so 50 penalties with 1000 outputs are
  about 50 Gram matrices.
* ``ridge_cv``: 50 penalties by scikit-learn's RidgeCV, exact leave-one-out over all rows on both sides.
"""

from __future__ import annotations

import numpy as np
import torch
from harness import compare, interleaved_minimum, sgemm_rate
from sklearn.linear_model import Ridge, RidgeCV

from transferops import ops
from transferops.adapt import HeadSolver


def test_path(benchmark: object) -> None:
    samples, dim, classes = 50_000, 2048, 1000
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=generator)
    features = torch.randn(samples, dim, generator=generator)
    features += 0.2 * torch.randn(classes, dim, generator=generator)[labels]
    lams = torch.logspace(0, 7, 50, dtype=torch.float64)

    def ours() -> object:
        return HeadSolver(classes=classes, keep_rows=256).update(features, labels).path(lams)

    def parts() -> object:
        return torch.linalg.eigh(ops.class_moments(features, labels, classes).gram)

    one = lams[30:31]
    exact = HeadSolver(classes=classes, keep_rows=None).update(features, labels).path(one).held_out
    sampled = HeadSolver(classes=classes, keep_rows=256).update(features, labels).path(one).held_out
    assert exact is not None
    assert sampled is not None
    seconds = interleaved_minimum({"parts": parts}, rounds=1)["parts"]
    error = float((sampled.sum(1) / exact.sum(1) - 1).abs().max())
    compare(
        benchmark,
        ours,
        {"Gram and one eigendecomposition": parts},
        floor=seconds,
        sizes={"N": samples, "p": dim, "c": classes, "penalties": 50, "leave-one-out rows": 256},
        values={"relative difference to leave-one-out over all rows": error},
    )


def test_ridge_cv(benchmark: object) -> None:
    samples, dim, outputs = 5000, 512, 10
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(samples, dim, generator=generator)
    truth = torch.randn(outputs, dim, generator=generator, dtype=torch.float64)
    targets = features @ truth.float().mT + 10 * torch.randn(samples, outputs, generator=generator)
    lams = torch.logspace(-2, 5, 50, dtype=torch.float64)
    array, target_array = features.numpy(), targets.numpy()

    def solve() -> tuple[torch.Tensor, float]:
        path = HeadSolver(keep_rows=None).update(features, targets).path(lams)
        best = path.best()
        assert isinstance(best, float)
        return path.head(best)[0], best

    weight, best = solve()
    reference = Ridge(alpha=best).fit(array.astype(np.float64), target_array.astype(np.float64)).coef_
    peer = RidgeCV(lams.numpy()).fit(array, target_array)
    error = float(np.abs(weight.numpy() - reference).max() / np.abs(reference).max())
    compare(
        benchmark,
        solve,
        {"scikit-learn RidgeCV": lambda: RidgeCV(lams.numpy()).fit(array, target_array)},
        floor=(samples * dim**2 + 9 * dim**3) / sgemm_rate(),
        sizes={"N": samples, "p": dim, "c": outputs, "penalties": 50},
        values={"relative error to float64 Ridge": error, "penalty over RidgeCV's": best / peer.alpha_},
    )

"""The closed-form head solver against normal equations, refits and scikit-learn."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transferops.adapt import HeadSolver, RecursiveHead, k_fold_path, published_head

SIZES = [(40, 7, 3), (6, 9, 2), (12, 11, 1), (2, 3, 2)]  # N above, far below and next to p


def problem(n: int, p: int, c: int, seed: int = 0, offset: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, targets, prior weight and prior bias, float64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return draw(n, p) + offset, draw(n, c), draw(c, p), draw(c)


def reference(
    z: Tensor, y: Tensor, lam: float, prior: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """argmin sum w |y - W z - b|^2 + lam |W - prior|^2 as one least-squares problem, the prior and bias as rows."""
    n, p = z.shape
    prior = torch.zeros(y.shape[1], p, dtype=torch.float64) if prior is None else prior
    root = torch.ones(n, 1, dtype=torch.float64) if weights is None else weights.sqrt().unsqueeze(1)
    rows = torch.cat([root * z, math.sqrt(lam) * torch.eye(p, dtype=torch.float64)])
    ones = torch.cat([root, torch.zeros(p, 1, dtype=torch.float64)])
    right = torch.cat([root * y, math.sqrt(lam) * prior.mT])
    solution = torch.linalg.lstsq(torch.cat([rows, ones], 1), right, driver="gelsd").solution
    return solution[:-1].mT, solution[-1]


def left_out(
    z: Tensor, y: Tensor, lam: float, prior: Tensor | None, weights: Tensor | None, folds: list[list[int]]
) -> Tensor:
    """Mean squared held-out residual [c] by refitting without each fold."""
    w = torch.ones(len(z), dtype=torch.float64) if weights is None else weights
    total = torch.zeros(y.shape[1], dtype=torch.float64)
    for fold in folds:
        kept = [i for i in range(len(z)) if i not in fold]
        weight, bias = reference(z[kept], y[kept], lam, prior, w[kept])
        total += (w[fold, None] * (y[fold] - z[fold] @ weight.mT - bias).square()).sum(0)
    return total / w.sum()


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(1.0, float(b.abs().max())))


class TestSolution:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("lam", [1e-3, 1.0, 50.0])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_normal_equations(self, size: tuple[int, int, int], lam: float, weighted: bool) -> None:
        z, y, prior, bias = problem(*size)
        weights = torch.linspace(0.2, 3, len(z), dtype=torch.float64) if weighted else None
        solver = HeadSolver(prior, bias).update(z, y, weights)
        close(solver.solve(lam), reference(z, y, lam, prior, weights), 1e-8)
        close(HeadSolver().update(z, y, weights).solve(lam), reference(z, y, lam, None, weights), 1e-8)

    @pytest.mark.parametrize("size", SIZES)
    def test_weights_are_repeated_rows(self, size: tuple[int, int, int]) -> None:
        z, y, prior, _ = problem(*size)
        times = torch.arange(len(z)) % 3
        repeated = HeadSolver(prior).update(z.repeat_interleave(times, 0), y.repeat_interleave(times, 0))
        close(HeadSolver(prior).update(z, y, times).solve(0.7), repeated.solve(0.7))

    def test_limits(self) -> None:
        z, y, prior, bias = problem(5, 9, 2)
        solver = HeadSolver(prior, bias).update(z, y)
        close(solver.solve(math.inf), (prior, bias), 0)
        weight, offset = HeadSolver(prior).update(z, y).solve(math.inf)
        close((weight, offset), (prior, y.mean(0) - prior @ z.mean(0)))
        # lam = 0: interpolates with the least change of the weight.
        weight, offset = solver.solve(0)
        close((z @ weight.mT + offset,), (y,))
        centred = z - z.mean(0)
        least = torch.linalg.pinv(centred, rtol=1e-10) @ (y - y.mean(0) - centred @ prior.mT)
        close((weight,), (prior + least.mT,))

    def test_published_form(self) -> None:
        z, y, prior, bias = problem(6, 9, 2)
        weight, offset = published_head(z, y, prior, bias)
        extended = torch.cat([z, torch.ones(6, 1, dtype=torch.float64)], 1)
        assert offset is not None
        close((z @ weight.mT + offset,), (y,))
        change = torch.cat([weight - prior, (offset - bias).unsqueeze(1)], 1)
        nearest = torch.linalg.lstsq(extended, y - z @ prior.mT - bias, driver="gelsd").solution
        close((change,), (nearest.mT,))
        weight, nothing = published_head(z, y, prior)
        assert nothing is None
        close((z @ weight.mT,), (y,))

    def test_rank_deficient_and_constant_features(self) -> None:
        z, y, prior, _ = problem(30, 6, 2)
        z[:, 3], z[:, 4] = 2 * z[:, 0] - z[:, 1], 7.0
        close(HeadSolver(prior).update(z, y).solve(0.5), reference(z, y, 0.5, prior), 1e-8)
        weight, _ = HeadSolver(prior).update(z, y).solve(0)
        assert weight[:, 4].equal(prior[:, 4])  # nothing is known of it, so it stays
        assert (weight - prior).abs().max() < 100  # and no direction of rounding error is followed
        for rows in (3, 30):
            constant = torch.full((rows, 5), 2.0)
            solver = HeadSolver(prior[:, :5]).update(constant, y[:rows])
            weight, bias = solver.solve("loo")
            close((weight, weight @ constant[0].double() + bias), (prior[:, :5], y[:rows].mean(0)))

    def test_float32_features_at_condition_1e4(self) -> None:
        """The Gram matrix is float64: the error stays that of the features' rounding; in float32 it is of order 1."""
        g = torch.Generator().manual_seed(0)
        n, p = 400, 30
        left = torch.linalg.qr(torch.randn(n, p, generator=g, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(p, p, generator=g, dtype=torch.float64)).Q
        z = (left * torch.logspace(0, -4, p, dtype=torch.float64)) @ right
        truth = torch.randn(2, p, generator=g, dtype=torch.float64)
        single = z.float()
        weight, _ = HeadSolver().update(single, z @ truth.mT).solve(0)
        exact, _ = HeadSolver().update(single.double(), z @ truth.mT).solve(0)
        assert (weight - exact).norm() <= 1e-5 * exact.norm()
        gram = (single - single.mean(0)).mT @ (single - single.mean(0))
        naive = torch.linalg.solve(gram, (single - single.mean(0)).mT @ (z @ truth.mT).float())
        assert (naive.mT - exact).norm() > 0.01 * exact.norm()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes_and_strides(self, dtype: torch.dtype) -> None:
        z, y, prior, _ = problem(30, 4, 2)
        z = z.to(dtype)
        strided = torch.stack([z, z], 2).flatten(1)[:, ::2]
        assert not strided.is_contiguous()
        close(HeadSolver(prior).update(strided, y.mT.contiguous().mT).solve(2.0), reference(z.double(), y, 2, prior))
        close(
            HeadSolver(prior.numpy()).update(z.float().numpy(), y.numpy()).solve(2.0),
            reference(z.double(), y, 2, prior),
        )

    def test_per_output_penalties(self) -> None:
        z, y, prior, bias = problem(30, 4, 3)
        solver = HeadSolver(prior, bias).update(z, y)
        weight, offset = solver.solve(torch.tensor([0.1, 5.0, math.inf]))
        for i, lam in enumerate((0.1, 5.0, math.inf)):
            w, b = solver.solve(lam)
            close((weight[i], offset[i]), (w[i], b[i]))


class TestLeaveOneOut:
    @pytest.mark.parametrize("size", [*SIZES[:3], (3, 20, 2)])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_refitting(self, size: tuple[int, int, int], weighted: bool) -> None:
        z, y, prior, bias = problem(*size)
        weights = torch.linspace(0.2, 3, len(z), dtype=torch.float64) if weighted else None
        path = HeadSolver(prior, bias).update(z, y, weights).path([1e-2, 1.0, 30.0, math.inf])
        assert path.held_out is not None
        assert path.held_out_by == "exact leave-one-out"
        for row, lam in enumerate((1e-2, 1.0, 30.0)):
            expected = left_out(z, y, lam, prior, weights, [[i] for i in range(len(z))])
            close((path.held_out[row],), (expected,), 1e-7)
        w = torch.ones(len(z), dtype=torch.float64) if weights is None else weights
        as_it_is = (w[:, None] * (y - z @ prior.mT - bias).square()).sum(0) / w.sum()
        close((path.held_out[3], path.training[3]), (as_it_is, as_it_is))

    @pytest.mark.parametrize("size", [(40, 5, 3), (9, 20, 3)])
    def test_accuracy(self, size: tuple[int, int, int]) -> None:
        z, _, prior, bias = problem(*size)
        labels = (z @ prior.mT).argmax(1).roll(1)
        one_hot = 2 * (torch.nn.functional.one_hot(labels, 3).double() - 1 / 3)
        path = HeadSolver(prior, bias, target_scale=2.0).update(z, labels).path([0.1, 5.0, math.inf])
        right = [0, 0, int(((z @ prior.mT + bias).argmax(1) == labels).sum())]
        for i in range(len(z)):
            kept = [j for j in range(len(z)) if j != i]
            for row, lam in enumerate((0.1, 5.0)):
                weight, offset = reference(z[kept], one_hot[kept], lam, prior)
                right[row] += int((weight @ z[i] + offset).argmax() == labels[i])
        assert path.accuracy is not None
        close((path.accuracy * len(z),), (torch.tensor(right).double(),))

    def test_without_prior_bias_the_mean_is_left_out_too(self) -> None:
        for n, p in ((20, 4), (4, 20)):
            z, y, prior, _ = problem(n, p, 2)
            path = HeadSolver(prior).update(z, y).path([math.inf])
            q = y - z @ prior.mT
            expected = ((q - q.mean(0)) * n / (n - 1)).square().mean(0)
            assert path.held_out is not None
            close((path.held_out[0],), (expected,))

    def test_sample_of_the_rows(self) -> None:
        z, y, prior, _ = problem(4000, 8, 2)
        exact = HeadSolver(prior, keep_rows=None).update(z, y).path()
        sampled = HeadSolver(prior, keep_rows=500)
        for start in range(0, 4000, 700):
            sampled.update(z[start : start + 700], y[start : start + 700])
        path = sampled.path()
        assert path.held_out_by == "leave-one-out of 500 random samples of 4000"
        assert path.held_out is not None
        assert exact.held_out is not None
        close((path.held_out,), (exact.held_out,), 1e-3)
        close((path.training,), (exact.training,))

    def test_choice(self) -> None:
        z, y, prior, _ = problem(30, 6, 3)
        y = z @ prior.mT + 0.3 * y
        solver = HeadSolver(prior).update(z, y)
        path = solver.path()
        assert path.held_out is not None
        assert len(path.lams) == 51
        shared = path.lams[path.held_out.sum(1).argmin()]
        assert path.best() == float(shared)
        close(solver.solve(), solver.solve(float(shared)))
        each = path.best(per_output=True)
        assert isinstance(each, Tensor)
        assert each.equal(path.lams[path.held_out.argmin(0)])
        close(solver.solve(per_output=True), solver.solve(each))

    def test_interpolation_stays_accurate(self) -> None:
        """With N < p and tiny penalties both e and 1 - h vanish; their ratio must not be rounding error."""
        z, y, prior, _ = problem(8, 40, 1, offset=0)
        path = HeadSolver(prior).update(z, y).path([0.0, 1e-9])
        expected = left_out(z, y, 1e-9, prior, None, [[i] for i in range(8)])
        assert path.held_out is not None
        close((path.held_out[1], path.held_out[0]), (expected, expected), 1e-4)

    def test_k_fold(self) -> None:
        z, y, prior, bias = problem(30, 5, 2)
        folds = [list(range(k, 30, 3)) for k in range(3)]
        solvers = [HeadSolver(prior, bias).update(z[fold], y[fold]) for fold in folds]
        path = k_fold_path(solvers, [0.1, 4.0, math.inf])
        assert path.held_out is not None
        for row, lam in enumerate((0.1, 4.0)):
            close((path.held_out[row],), (left_out(z, y, lam, prior, None, folds),), 1e-8)
        close((path.held_out[2],), ((y - z @ prior.mT - bias).square().mean(0),))
        close(path.head(4.0), HeadSolver(prior, bias).update(z, y).solve(4.0))


class TestScikitLearn:
    def test_ridge(self) -> None:
        linear = pytest.importorskip("sklearn.linear_model")
        z, y, _, _ = problem(200, 30, 4)
        for lam in (1e-3, 1.0, 1e3):
            peer = linear.Ridge(alpha=lam).fit(z.numpy(), y.numpy())
            weight, bias = HeadSolver().update(z, y).solve(lam)
            close((weight, bias), (torch.from_numpy(peer.coef_), torch.from_numpy(peer.intercept_)), 1e-8)

    @pytest.mark.parametrize("size", [(60, 10, 3), (15, 40, 3)])
    def test_ridge_cv(self, size: tuple[int, int, int]) -> None:
        linear = pytest.importorskip("sklearn.linear_model")
        z, y, truth, _ = problem(*size)
        y = y + z @ truth.mT
        lams = np.logspace(-3, 3, 13)
        solver = HeadSolver().update(z, y)
        path = solver.path(torch.from_numpy(lams))
        peer = linear.RidgeCV(lams, store_cv_results=True).fit(z.numpy(), y.numpy())
        assert path.held_out is not None
        close((path.held_out.mT,), (torch.from_numpy(peer.cv_results_.mean(0)),), 1e-8)
        assert path.best() == pytest.approx(peer.alpha_)
        each = linear.RidgeCV(lams, alpha_per_target=True).fit(z.numpy(), y.numpy())
        assert path.best(per_output=True).tolist() == pytest.approx(each.alpha_.tolist())


class TestStreaming:
    @pytest.mark.parametrize("size", [(40, 7, 3), (6, 9, 2)])
    @pytest.mark.parametrize("labels", [False, True])
    def test_batches_and_merge(self, size: tuple[int, int, int], labels: bool) -> None:
        z, y, prior, bias = problem(*size)
        target = torch.arange(len(z)) % size[2] if labels else y
        whole = HeadSolver(prior, bias).update(z, target)
        parts = [HeadSolver(prior, bias, seed=i) for i in range(3)]
        for i in range(len(z)):
            parts[i % 3].update(z[i : i + 1], target[i : i + 1])
        merged = HeadSolver(prior, bias)
        for part in parts:
            merged.merge(part)
        assert merged.samples == whole.samples == len(z)
        close(merged.solve(0.3), whole.solve(0.3))
        a, b = merged.path(), whole.path()
        assert a.held_out is not None
        assert b.held_out is not None
        close((a.held_out,), (b.held_out,), 1e-7)

    def test_subtract(self) -> None:
        z, y, prior, bias = problem(50, 6, 2)
        whole, part = HeadSolver(prior, bias).update(z, y), HeadSolver(prior, bias).update(z[:20], y[:20])
        whole.subtract(part)
        close(whole.solve(0.3), HeadSolver(prior, bias).update(z[20:], y[20:]).solve(0.3))
        with pytest.raises(ValueError, match="rows that leave-one-out needs, got 'loo' and no rows"):
            whole.solve()
        with pytest.raises(ValueError, match="other: expected fewer than the 30 samples"):
            whole.subtract(HeadSolver(prior, bias).update(z, y))

    def test_discount(self) -> None:
        z, y, prior, _ = problem(30, 6, 2)
        weights = torch.cat([torch.full((20,), 0.25), torch.ones(10)]).double()
        solver = HeadSolver(prior).update(z[:20], y[:20]).discount(0.5).discount(0.5).update(z[20:], y[20:])
        weighted = HeadSolver(prior).update(z, y, weights)
        close(solver.solve(0.3), weighted.solve(0.3))
        a, b = solver.path(), weighted.path()
        assert a.held_out is not None
        assert b.held_out is not None
        close((a.held_out,), (b.held_out,), 1e-8)

    @pytest.mark.parametrize("rows", [4, 40])
    def test_state(self, rows: int, tmp_path: Path) -> None:
        z, y, prior, bias = problem(rows, 6, 2)
        solver = HeadSolver(prior, bias, keep_rows=10).update(z, y, torch.ones(rows))
        solver.save(tmp_path / "solver.pt")
        loaded = HeadSolver.load(tmp_path / "solver.pt")
        fresh = HeadSolver(prior, bias, keep_rows=10)
        fresh.load_state_dict(copy.deepcopy(solver.state_dict()))
        for again in (loaded, fresh):
            close(again.solve(), solver.solve(), 0)
            close(again.update(z, y).solve(0.1), copy.deepcopy(solver).update(z, y).solve(0.1), 0)
        with pytest.raises(ValueError, match="state: expected that of a solver with the same prior"):
            HeadSolver(prior).load_state_dict(solver.state_dict())

    def test_all_reduce(self, tmp_path: Path) -> None:
        """This process is rank 0 of two."""
        code = f"""
import os, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_adapt_head_solver import reduced
torch.save(reduced({str(tmp_path / "store")!r}, 1), {str(tmp_path / "rank1.pt")!r})
os._exit(0)  # gloo's threads do not always survive the interpreter's own way out
"""
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        mine = reduced(str(tmp_path / "store"), 0)
        _, error = child.communicate(timeout=60)
        assert child.returncode == 0, error
        z, y, prior, _ = problem(30, 4, 2)
        close(mine, torch.load(tmp_path / "rank1.pt"), 0)
        close(mine, HeadSolver(prior).update(z, y).solve())


def reduced(store: str, rank: int) -> tuple[Tensor, Tensor]:
    """What a process of two gets from its third or two thirds of the samples."""
    import torch.distributed as dist

    z, y, prior, _ = problem(30, 4, 2)
    mine = slice(0, 10) if rank == 0 else slice(10, 30)
    wait = timedelta(seconds=60)  # for a process that died at its start, half an hour if not said
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    try:
        return HeadSolver(prior, seed=rank).update(z[mine], y[mine]).all_reduce().solve()
    finally:
        dist.destroy_process_group()


class TestLabels:
    @pytest.mark.parametrize("size", [(40, 7, 3), (9, 11, 3)])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_one_hot(self, size: tuple[int, int, int], weighted: bool) -> None:
        z, _, prior, bias = problem(*size)
        labels = torch.arange(len(z)) % 3
        weights = torch.linspace(0.5, 2, len(z)) if weighted else None
        one_hot = torch.nn.functional.one_hot(labels, 3).double() - 1 / 3
        solver = HeadSolver(prior, bias, target_scale=2.0).update(z, labels, weights)
        close(solver.solve(0.3), HeadSolver(prior, bias).update(z, 2 * one_hot, weights).solve(0.3))
        plain = HeadSolver(classes=3).update(z, labels, weights)
        close(plain.solve(0.3), HeadSolver().update(z, one_hot, weights).solve(0.3))

    @pytest.mark.parametrize("rows", [40, 6])
    def test_scale_matches_deviations(self, rows: int) -> None:
        z, _, prior, bias = problem(rows, 7, 3)
        labels = torch.arange(rows) % 3
        outputs = z @ (100 * prior).mT
        one_hot = torch.nn.functional.one_hot(labels, 3).double()
        expected = ((outputs - outputs.mean(0)).norm() / (one_hot - one_hot.mean(0)).norm()).item()
        path = HeadSolver(100 * prior, bias).update(z, labels).path([1.0])
        assert path.target_scale == pytest.approx(expected)
        assert HeadSolver(classes=3).update(z, labels).path([1.0]).target_scale == 1
        # Losses are those of targets before scaling.
        weight, offset = path.head(1.0)
        residual = one_hot - 1 / 3 - (z @ weight.mT + offset) / expected
        close((path.training[0],), (residual.square().mean(0),))


class TestRecursive:
    @pytest.mark.parametrize("forgetting", [1.0, 0.9])
    @pytest.mark.parametrize("start", [3, 10])
    def test_equals_the_batch_solution(self, forgetting: float, start: int) -> None:
        z, y, prior, _ = problem(30, 5, 2)
        head = RecursiveHead(HeadSolver(prior).update(z[:start], y[:start]), 0.3, forgetting)
        head.update(z[start:20], y[start:20]).update(z[20:], y[20:])
        age = torch.arange(29, -1, -1).clamp(max=30 - start)
        weights = torch.tensor(forgetting, dtype=torch.float64) ** age
        batch = HeadSolver(prior).update(z, y, weights).solve(0.3 * forgetting ** (30 - start))
        close((head.weight, head.bias), batch, 1e-8)
        assert head.samples == 30

    def test_labels(self) -> None:
        z, _, prior, bias = problem(30, 5, 3)
        labels = torch.arange(30) % 3
        solver = HeadSolver(prior, bias, target_scale=3.0).update(z[:10], labels[:10])
        head = RecursiveHead(solver, 0.3).update(z[10:], labels[10:])
        close((head.weight, head.bias), solver.update(z[10:], labels[10:]).solve(0.3), 1e-8)
        with pytest.raises(ValueError, match=r"targets: expected labels \[N\] as the solver had"):
            head.update(z, torch.zeros(30, 3))

    def test_bad_input(self) -> None:
        z, y, prior, _ = problem(10, 5, 2)
        solver = HeadSolver(prior).update(z, y)
        for lam, forgetting, message in (
            (0, 1.0, "lam: expected a positive number"),
            (math.inf, 1.0, "lam: expected a finite number, got inf"),
            (1.0, 0.0, "forgetting: expected a positive number of at most 1, got 0.0"),
            (1.0, 1.1, "forgetting: expected a positive number of at most 1, got 1.1"),
        ):
            with pytest.raises(ValueError, match=message):
                RecursiveHead(solver, lam, forgetting)


Z, Y = torch.ones(4, 3), torch.ones(4, 2)
NAN = torch.tensor([[1.0, 2, math.nan]])


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (([[1.0]], Y), TypeError, "features: expected a torch.Tensor, NumPy array or DLPack array, got list"),
            ((Z.long(), Y), TypeError, "features: expected float32, float64, float16 or bfloat16, got a int64 tensor"),
            ((Z[0], Y), ValueError, r"features: expected shape \[N, p\] with at least one column"),
            ((Z[:, :0], Y), ValueError, r"features: expected shape \[N, p\] with at least one column"),
            ((NAN, Y[:1]), ValueError, r"features: expected finite values, got nan at position \[0, 2\]"),
            ((NAN.repeat(9, 1), Y[:1].repeat(9, 1)), ValueError, r"features: expected finite values, got nan"),
            ((NAN, Y[:1], torch.ones(1)), ValueError, r"features: expected finite values, got nan"),
            ((Z, Y[:3]), ValueError, r"targets: expected shape \[4, c\], one for each row of features"),
            ((Z, Y[:, 0]), ValueError, r"targets: expected shape \[4, c\], one for each row of features"),
            ((Z, Y * math.inf), ValueError, r"targets: expected finite values, got inf at position \[0, 0\]"),
            ((Z, Y[:, :0]), ValueError, "targets: expected at least one output"),
            ((Z, Y[:, 0] > 0), TypeError, r"targets: expected floating point \[N, c\] or integer labels"),
            ((Z, torch.zeros(4, dtype=torch.long)), ValueError, "classes: expected a number of classes, or a prior"),
            ((Z, Y, torch.ones(3)), ValueError, r"weights: expected shape \[4\] on cpu"),
            (
                (Z, Y, torch.tensor([1, 1, -2, 1])),
                ValueError,
                "weights: expected numbers of at least 0, got -2.0 at row 2",
            ),
            ((Z, Y, torch.tensor([1, 1, math.nan, 1])), ValueError, "weights: expected finite values, got nan"),
        ],
    )
    def test_update(self, arguments: Any, error: type[Exception], message: str) -> None:
        solver = HeadSolver()
        with pytest.raises(error, match=message):
            solver.update(*arguments)
        assert solver.samples == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((Z[:, :2], Y), "features: expected 3 features, got 2"),
            ((Z, Y[:, :1]), "targets: expected 2 outputs, got 1"),
            ((Z, torch.tensor([0, 1, 2, 0])), "targets: expected 2 classes 0..1, got 2 at row 2"),
            ((Z, torch.tensor([0, -1, 1, 0])), "targets: expected 2 classes 0..1, got -1 at row 1"),
        ],
    )
    def test_update_against_the_prior(self, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HeadSolver(torch.ones(2, 3)).update(*arguments)

    def test_kinds_of_targets_do_not_mix(self) -> None:
        solver = HeadSolver(torch.ones(2, 3)).update(Z, Y)
        with pytest.raises(ValueError, match=r"targets: expected numbers \[N, c\] as before, got labels \[N\]"):
            solver.update(Z, torch.zeros(4, dtype=torch.long))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prior_bias": Y[0]}, "prior_bias: expected None without prior_weight"),
            ({"prior_weight": Y.mT, "prior_bias": Z[0]}, r"prior_bias: expected shape \[2\]"),
            ({"prior_weight": NAN}, "prior_weight: expected finite values, got nan"),
            ({"classes": 0}, "classes: expected an integer of at least 1, got 0"),
            ({"prior_weight": Y.mT, "classes": 3}, "classes: expected the 2 rows of prior_weight, got 3"),
            ({"keep_rows": -1}, "keep_rows: expected an integer of at least 0, got -1"),
            ({"target_scale": 0.0}, "target_scale: expected 'auto' or a positive number, got 0.0"),
            ({"target_scale": "x"}, "target_scale: expected 'auto' or a positive number, got 'x'"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HeadSolver(**options)

    def test_solve(self) -> None:
        z, y, prior, bias = problem(10, 3, 2)
        with pytest.raises(ValueError, match="features: expected at least one sample before a head is solved for"):
            HeadSolver(prior).update(z[:0], y[:0]).solve(1.0)
        with pytest.raises(ValueError, match="weights: expected a positive sum, got 0"):
            HeadSolver(prior).update(z, y, torch.zeros(10)).solve(1.0)
        with pytest.raises(ValueError, match="lam: expected a number where there is one sample"):
            HeadSolver(prior).update(z[:1], y[:1]).solve()
        with pytest.raises(ValueError, match=r"got 'loo' and no rows \(keep_rows=0\)"):
            HeadSolver(prior, keep_rows=0).update(z, y).solve()
        solver = HeadSolver(prior, bias).update(z, y)
        for lam in (-1.0, math.nan):
            with pytest.raises(ValueError, match=f"lam: expected numbers of at least 0, got {lam}"):
                solver.solve(lam)
        with pytest.raises(ValueError, match="lam: expected 'loo' or a number of at least 0, got 'best'"):
            solver.solve("best")
        with pytest.raises(ValueError, match=r"lam: expected a number or shape \[2\]"):
            solver.solve(torch.ones(3))
        with pytest.raises(ValueError, match="other: expected a HeadSolver with the same prior"):
            solver.merge(HeadSolver(prior))
        with pytest.raises(TypeError, match="other: expected a HeadSolver, got 3"):
            solver.merge(3)
        with pytest.raises(ValueError, match="folds: expected at least two solvers with samples, got 1"):
            k_fold_path([solver, HeadSolver(prior, bias)])
        with pytest.raises(ValueError, match=r"factor: expected a number in \(0, 1\], got 0"):
            solver.discount(0)
        with pytest.raises(ValueError, match="group: expected an initialised"):
            solver.all_reduce()

    def test_callers_tensors_may_change_afterwards(self) -> None:
        z, y, prior, _ = problem(10, 3, 2)
        for keep in (None, 4096):
            solver = HeadSolver(prior, keep_rows=keep).update(z, y)
            for rows in (z[:2].clone(), z[:9].clone()):
                solver.update(rows, y[: len(rows)])
                rows.zero_()
            expected = HeadSolver(prior).update(torch.cat([z, z[:2], z[:9]]), torch.cat([y, y[:2], y[:9]]))
            close((solver.path().held_out,), (expected.path().held_out,))

"""Labels and a pretrained head: margin targets, their fits, and which of them is chosen."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transferops.adapt import HeadSolver, adapt_head
from transferops.adapt.head_margin import MarginFit, margin_targets, shortfall


def problem(n: int, p: int, c: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features with a common offset, labels, prior weight and bias, float64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return draw(n, p) + 1, torch.arange(n) % c, draw(c, p), draw(c)


def reference(z: Tensor, t: Tensor, lam: float, weight: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
    """argmin sum w |t - W z - b|^2 + lam (|W - weight|^2 + |b - bias|^2) as [W b], by least squares."""
    x = torch.cat([z, torch.ones(len(z), 1).double()], 1)
    prior = torch.cat([weight, bias.unsqueeze(1)], 1)
    root = weights.sqrt().unsqueeze(1)
    rows = torch.cat([root * x, math.sqrt(lam) * torch.eye(x.shape[1]).double()])
    return torch.linalg.lstsq(rows, torch.cat([root * t, math.sqrt(lam) * prior.mT]), driver="gelsd").solution.mT


class TestTargets:
    @pytest.mark.parametrize("classes", [1, 2, 3, 7])
    def test_nearest_of_those_right_by_the_margin(self, classes: int) -> None:
        """Over all sets of other classes that could come down with the label, the best feasible candidate."""
        g = torch.Generator().manual_seed(classes)
        outputs = torch.randn(20, classes, generator=g, dtype=torch.float64)
        labels = torch.randint(classes, (20,), generator=g)
        targets = margin_targets(outputs, labels, 0.7)
        for f, y, t in zip(outputs, labels.tolist(), targets):
            others = [k for k in range(classes) if k != y]
            best = math.inf
            for size in range(classes):
                for down in itertools.combinations(others, size):
                    level = (f[y] + (f[list(down)] + 0.7).sum()) / (1 + size)
                    candidate = f.clone()
                    candidate[y] = level
                    candidate[list(down)] = level - 0.7
                    if all(candidate[k] <= level - 0.7 + 1e-12 for k in others):
                        best = min(best, float((candidate - f).square().sum()))
            assert all(t[k] <= t[y] - 0.7 + 1e-12 for k in others)
            assert float((t - f).square().sum()) == pytest.approx(best, abs=1e-12)
        torch.testing.assert_close(margin_targets(targets, labels, 0.7), targets)

    def test_of_nothing_are_one_hot(self) -> None:
        labels = torch.tensor([2, 0])
        expected = 3 * (F.one_hot(labels, 4).double() - 1 / 4)
        torch.testing.assert_close(margin_targets(torch.zeros(2, 4).double(), labels, 3.0), expected)

    def test_ask_nothing_of_what_is_right_by_far(self) -> None:
        outputs = torch.tensor([[5.0, 1.0, -9.0], [0.0, 0.5, 4.0]]).double()
        labels = torch.tensor([0, 2])
        assert margin_targets(outputs, labels, 1.0).equal(outputs)
        z, _, weight, bias = problem(30, 4, 3)
        right = (z @ weight.mT + bias).argmax(1)
        fit = MarginFit(HeadSolver(weight, bias, target_scale=1e-6).update(z, right))
        torch.testing.assert_close(fit.path.head(1e-3)[0], weight, rtol=0, atol=1e-5)


class TestFit:
    @pytest.mark.parametrize(("n", "p"), [(30, 5), (7, 12), (6, 6)])
    @pytest.mark.parametrize("share", [1.0, 0.5])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_equations_and_leave_one_out(self, n: int, p: int, share: float, weighted: bool) -> None:
        z, labels, weight, bias = problem(n, p, 3)
        weights = torch.linspace(0.5, 2, n).double() if weighted else torch.ones(n).double()
        solver = HeadSolver(weight, bias, target_scale=1.5).update(z, labels, weights if weighted else None)
        fit = MarginFit(solver, share)
        targets = margin_targets(share * (z @ weight.mT + bias), labels, 1.5)
        for lam in (1e-2, 1.0, 30.0):
            expected = reference(z, targets, lam, share * weight, share * bias, weights)
            w, b = fit.path.head(lam)
            torch.testing.assert_close(torch.cat([w, b.unsqueeze(1)], 1), expected, rtol=1e-7, atol=1e-8)
            outputs = fit.left_out(lam)
            for i in range(n):
                kept = [j for j in range(n) if j != i]
                head = reference(z[kept], targets[kept], lam, share * weight, share * bias, weights[kept])
                torch.testing.assert_close(outputs[i], head[:, :-1] @ z[i] + head[:, -1], rtol=1e-6, atol=1e-7)
        w, b = fit.path.head(math.inf)
        assert w.equal(share * weight)
        assert b.equal(share * bias)
        torch.testing.assert_close(fit.left_out(math.inf), share * (z @ weight.mT + bias))

    def test_path(self) -> None:
        z, labels, weight, bias = problem(20, 4, 3)
        fit = MarginFit(HeadSolver(weight, bias, target_scale=1.0).update(z, labels))
        targets = margin_targets(z @ weight.mT + bias, labels, 1.0)
        assert fit.path.held_out is not None
        assert fit.path.accuracy is not None
        for row in (20, 40, 50):
            outputs = fit.left_out(float(fit.path.lams[row]))
            torch.testing.assert_close(fit.path.held_out[row], (targets - outputs).square().mean(0))
            assert float(fit.path.accuracy[row]) == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))

    def test_largest_penalty_that_is_right(self) -> None:
        z, labels, weight, bias = problem(6, 9, 3)
        fit = MarginFit(HeadSolver(weight, bias).update(z, labels))
        lam = fit.largest_right()

        def right(lam: float) -> int:
            w, b = fit.path.head(lam)
            return int(((z @ w.mT + b).argmax(1) == labels).sum())

        assert right(lam) == 6  # fewer samples than features: all can be right
        assert all(right(larger) < 6 for larger in fit.path.lams.tolist() if larger > lam)
        prior = (z @ weight.mT + bias).argmax(1)
        assert MarginFit(HeadSolver(weight, bias).update(z, prior)).largest_right() == math.inf

    def test_shortfall(self) -> None:
        z, labels, weight, _ = problem(9, 4, 3)
        weights = torch.linspace(0, 2, 9).double()
        solver = HeadSolver(weight).update(z, labels, weights)
        rows = solver.rows()
        assert rows is not None
        outputs = solver.prior_outputs(rows)
        torch.testing.assert_close(outputs, z @ weight.mT)
        squares = (margin_targets(outputs, labels, 2.0) - outputs).square().sum(1)
        assert shortfall(outputs, rows, 2.0) == pytest.approx(float((weights * squares).sum() / weights.sum()) / 4)


def network(weight: Tensor, bias: Tensor) -> nn.Module:
    layer = nn.Linear(*weight.shape[::-1]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


class TestChoice:
    @pytest.mark.parametrize("each", [1, 2])
    def test_few_samples_move_as_little_as_makes_them_right(self, each: int) -> None:
        z, labels, weight, bias = problem(4 * each, 12, 4)
        weight = weight + 0.7 * F.one_hot(labels, 4).double().mT @ z / each  # a prior that is right on most
        adapted, report = adapt_head(network(weight, bias), [(z, labels)])
        assert "leave-one-out is blind" in report.chosen_by
        fit = MarginFit(HeadSolver(weight, bias).update(z, labels))
        assert (report.prior_share, report.lam) == (1, fit.largest_right())
        w, b = fit.path.head(report.lam)
        torch.testing.assert_close(adapted.weight.detach(), w)
        torch.testing.assert_close(adapted.bias.detach(), b)

    def test_one_sample(self) -> None:
        z, _, weight, bias = problem(1, 5, 3)
        wrong = (z @ weight.mT + bias).argmin(1)
        adapted, report = adapt_head(network(weight, bias), [(z, wrong)])
        assert adapted(z).argmax(1).equal(wrong)
        assert report.prior_share == 1

    def test_more_samples_choose_by_accuracy_left_out(self) -> None:
        for seed in range(4):
            z, _, weight, bias = problem(40, 6, 4, seed)
            noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
            labels = (z @ (weight + 0.4 * noise).mT).argmax(1)
            _, report = adapt_head(network(weight, bias), [(z, labels)])
            solver = HeadSolver(weight, bias).update(z, labels)
            found = {}
            for share in (1.0, 0.5):
                path = MarginFit(solver, share).path
                found[share] = path.accuracy_at(float(path.best()))
            plain = solver.without_prior(report.target_scale).path()
            found[0.0] = plain.accuracy_at(float(plain.best()))
            assert report.accuracy_after == pytest.approx(found[report.prior_share])
            assert report.accuracy_after == pytest.approx(max(found.values()))
            assert report.prior_share == max(found, key=lambda share: found[share])

    def test_prior_no_better_than_chance_is_left(self) -> None:
        """It would be right on some samples left out by luck; ridge regression is right on most."""
        g = torch.Generator().manual_seed(0)
        labels = torch.arange(30) % 5
        z = 3 * F.one_hot(labels, 8).double() + torch.randn(30, 8, generator=g, dtype=torch.float64)
        weight = torch.randn(5, 8, generator=g, dtype=torch.float64)
        assert float(((z @ weight.mT).argmax(1) == labels).double().mean()) < 0.3
        _, report = adapt_head(network(weight, torch.zeros(5).double()), [(z, labels)])
        assert report.prior_share == 0
        assert report.accuracy_after > 0.7

    def test_losses_are_shortfalls(self) -> None:
        z, labels, weight, bias = problem(24, 5, 3)
        model = network(weight, bias)
        for lam in (None, 0.5, math.inf):
            adapted, report = adapt_head(model, [(z, labels)], lam=lam)
            rows = HeadSolver(weight, bias).update(z, labels).rows()
            assert rows is not None
            assert report.loss_before == pytest.approx(shortfall(model(z).detach(), rows, report.target_scale))
            assert report.loss_after == pytest.approx(shortfall(adapted(z).detach(), rows, report.target_scale))
            assert report.accuracy_before == pytest.approx(float((model(z).argmax(1) == labels).double().mean()))
            assert report.held_out_before == report.loss_before
        assert adapted.weight.equal(model.weight)
        assert report.held_out_after == pytest.approx(report.loss_before)

    def test_without_all_rows_targets_are_one_hot(self) -> None:
        z, labels, weight, bias = problem(40, 5, 3)
        adapted, report = adapt_head(network(weight, bias), [(z, labels)], keep_rows=20, lam=0.4)
        w, b = HeadSolver(weight, bias).update(z, labels).solve(0.4)
        torch.testing.assert_close(adapted.weight.detach(), w)
        torch.testing.assert_close(adapted.bias.detach(), b)
        assert report.prior_share == 1

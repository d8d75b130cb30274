"""Adapting whole models: finding the head, its rows, the choice of the penalty, and several layers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transferops.adapt import HeadSolver, adapt_head, adapt_layers
from transferops.adapt.few_shot import compare_heads
from transferops.adapt.head_layer import find_head
from transferops.fisher.batches import Batch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def data(samples: int = 40, outputs: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 4).double(), torch.randn(samples, outputs).double()


def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((y - model(x)).square().sum() / len(x))


CONVOLUTIONS = {
    "1x1": nn.Conv2d(3, 2, 1),
    "3x3": nn.Conv2d(3, 2, 3),
    "strided": nn.Conv2d(3, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "same": nn.Conv2d(3, 2, (3, 5), padding="same"),
    "reflected": nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
    "1x1 padded": nn.Conv2d(3, 2, 1, padding=1, bias=False),
}


class TestLayer:
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_rows_times_weight_is_the_output(self, name: str) -> None:
        layer = CONVOLUTIONS[name].double()
        x = torch.randn(2, 3, 7, 8).double()
        head = find_head(layer, Batch(0, x, None, 2))
        expected = layer(x)
        assert head.positions == expected[0, 0].numel()
        actual = head.rows(x) @ head.weight.mT + head.bias
        torch.testing.assert_close(actual, head.targets(expected.detach(), expected))

    def test_rows_of_conv1d_and_linear_with_positions(self) -> None:
        for layer, x in (
            (nn.Conv1d(3, 2, 3, stride=2, padding=1, dilation=2), torch.randn(2, 3, 9)),
            (nn.Conv1d(3, 2, 3, padding=1, padding_mode="circular"), torch.randn(2, 3, 9)),
            (nn.Linear(5, 2), torch.randn(2, 6, 5)),
        ):
            head = find_head(layer, Batch(0, x, None, 2))
            expected = layer(x)
            torch.testing.assert_close(
                head.rows(x) @ head.weight.mT + head.bias, head.targets(expected.detach(), expected)
            )

    def test_found_by_what_it_puts_out(self) -> None:
        class Auxiliary(nn.Module):
            """Its last linear layer to run is not its head."""

            def __init__(self) -> None:
                super().__init__()
                self.body, self.out, self.extra = nn.Linear(4, 5), nn.Conv1d(1, 2, 5), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                result = self.out(torch.relu(self.body(x)).unsqueeze(1)).flatten(1)
                self.extra(x)
                return result

        head = find_head(Auxiliary(), Batch(0, torch.randn(3, 4), None, 3))
        assert (head.name, head.positions) == ("out", 1)

    @pytest.mark.parametrize(
        ("model", "name", "message"),
        [
            (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), None, "head: expected a .* that puts out what the model"),
            (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), "0", "head: expected a .* that puts out what the model"),
            (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), "fc", r"layer of the model \('0', '1'\), got 'fc'"),
            (nn.ReLU(), None, "last such layer: 'none'"),
            (
                nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1, groups=2)),
                None,
                "a convolution without groups",
            ),
        ],
    )
    def test_not_found(self, model: nn.Module, name: str | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_head(model, Batch(0, torch.randn(3, 4), None, 3), name)

    def test_called_twice(self) -> None:
        layer = nn.Linear(4, 4)
        with pytest.raises(ValueError, match="head: expected '0' to be called once in a forward pass, got 2 calls"):
            find_head(nn.Sequential(layer, layer), Batch(0, torch.randn(3, 4), None, 3))


class TestAdaptHead:
    @pytest.mark.parametrize("bias", [True, False])
    def test_is_the_solver_on_the_captured_input(self, bias: bool) -> None:
        model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3, bias=bias)).double()
        x, y = data()
        before = copy.deepcopy(model.state_dict())
        adapted, report = adapt_head(model, [(x[:17], y[:17]), (x[17:], y[17:])], lam=0.3)
        for name, value in model.state_dict().items():
            assert value.equal(before[name])
        assert model.training
        assert adapted.training
        adapted.eval()
        features = adapted[:3](x)
        prior = model[3].bias if bias else torch.zeros(3)
        weight, offset = HeadSolver(model[3].weight, prior).update(features, y).solve(0.3)
        torch.testing.assert_close(adapted[3].weight, weight)
        torch.testing.assert_close(adapted[3].bias, offset)
        assert report.layer == "3"
        assert report.loss_before == pytest.approx(loss(copy.deepcopy(model).eval(), x, y))
        assert report.loss_after == pytest.approx(loss(adapted, x, y))
        assert report.captured == pytest.approx(1 - report.loss_after / report.loss_before)

    def test_numbers_of_the_report(self) -> None:
        model, (x, y) = mlp(), data()
        adapted, report = adapt_head(model, [(x, y)], lam=0.3)
        z = model[:2](x).detach()
        z = z - z.mean(0)
        values = torch.linalg.eigvalsh(z.mT @ z)
        change = (adapted[2].weight - model[2].weight).detach()
        residual = y - y.mean(0) - z @ model[2].weight.detach().mT
        assert report.degrees_of_freedom == pytest.approx(float((values / (values + 0.3)).sum()))
        assert report.condition == pytest.approx(float((values[-1] + 0.3) / (values[0] + 0.3)))
        assert report.change == pytest.approx(float(change.norm()))
        assert report.relative_change == pytest.approx(float(change.norm() / model[2].weight.detach().norm()))
        assert report.change_bound == pytest.approx(float(residual.norm()) / (2 * math.sqrt(0.3)))
        assert report.change <= report.change_bound

    def test_never_worse_on_samples_left_out(self) -> None:
        for seed in range(5):
            torch.manual_seed(seed)
            model, (x, _) = mlp(), data(12)
            noise = torch.randn(12, 3).double()
            for y in (model(x).detach() + 0.1 * noise, model(x).detach(), noise):
                adapted, report = adapt_head(model, [(x, y)])
                assert report.held_out_after <= report.held_out_before
                assert report.held_out_before == pytest.approx(loss(model, x, y))
            assert torch.isfinite(adapted(x)).all()

    def test_keeps_a_head_that_is_right_and_forgets_one_that_misleads(self) -> None:
        model, (x, _) = mlp(), data(30)
        kept, report = adapt_head(model, [(x, model(x).detach())])
        assert (report.prior_share, report.lam) == (1, math.inf)
        torch.testing.assert_close(kept(x), model(x))
        truth = torch.randn(16, 3).double()
        misleading = copy.deepcopy(model)
        with torch.no_grad():
            misleading[2].weight.copy_(-30 * truth.mT)
        y = (model[:2](x) @ truth + 0.1 * torch.randn(30, 3).double()).detach()
        _, report = adapt_head(misleading, [(x, y)])
        assert report.prior_share == 0
        assert "the pretrained head does not help" in str(report)

    def test_convolution_leaves_out_whole_samples(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)).double()
        x = torch.randn(6, 1, 5, 5).double()
        y = (1.5 * model(x) + 0.1 * torch.randn(6, 2, 5, 5)).detach()
        adapted, report = adapt_head(model, [(x[:4], y[:4]), (x[4:], y[4:])], folds=3)
        assert (report.positions, report.features, report.chosen_by) == (25, 36, "exact 3-fold cross-validation")
        assert loss(adapted, x, y) < 0.6 * loss(model, x, y)  # most of the rest is noise
        # Fold 0 holds samples 0 and 3.
        hidden = torch.nn.functional.unfold(model[:2](x), 3, padding=1).mT
        weight, bias = model[2].weight.flatten(1), model[2].bias
        total = 0.0
        for fold in range(3):
            out = torch.arange(6) % 3 == fold
            rows, right = hidden[~out].reshape(-1, 36), y[~out].movedim(1, -1).reshape(-1, 2)
            w, b = HeadSolver(weight, bias).update(rows, right).solve(report.lam)
            held = y[out].movedim(1, -1).reshape(-1, 2) - hidden[out].reshape(-1, 36) @ w.mT - b
            total += float(held.detach().square().sum())
        assert report.held_out_after == pytest.approx(total / 150, rel=1e-6)

    def test_labels(self) -> None:
        model, (x, _) = mlp(), data(60)
        labels = (2 * model(x)).argmax(1)
        adapted, report = adapt_head(model, [{"input": x, "labels": labels}])
        assert report.target_scale != 1
        assert (adapted(x).argmax(1) == labels).double().mean() > 0.9
        tokens = nn.Linear(4, 3).double()
        sequences, tags = torch.randn(8, 5, 4).double(), torch.randint(3, (8, 5))
        assert adapt_head(tokens, [(sequences, tags)])[1].positions == 5

    def test_perturb(self) -> None:
        model = mlp()
        source, _ = data()
        target = source + 0.1 * torch.randn_like(source)
        y_source, y = model(source).detach() + 0.05, model(target).detach() ** 2
        adapted, report = adapt_head(model, [(source, y_source, target, y)], lam=0.2, mode="perturb")
        moved = torch.func.jvp(lambda x: model(x), (source,), (target - source,))[1].detach()
        linear = model(source).detach() + moved
        z = model[:2](target)
        weight, _ = HeadSolver(model[2].weight, model[2].bias).update(z, model(target) + y - linear).solve(0.2)
        torch.testing.assert_close(adapted[2].weight, weight)

        def rms(values: Tensor) -> float:
            return float(values.detach().square().sum(1).mean().sqrt())

        bound = report.shift_bound
        assert bound is not None
        assert bound.source == pytest.approx(rms(y_source - model(source)))
        assert bound.first_order == pytest.approx(rms(y - y_source - moved))
        assert bound.remainder == pytest.approx(rms(model(target) - linear))
        assert bound.residual == pytest.approx(rms(y - model(target)))
        assert bound.residual <= bound.bound
        half = bound.curvature / 2 * (target - source).square().sum(1)
        assert bool(((model(target) - linear).norm(dim=1) <= half * (1 + 1e-9)).all())
        assert "remainder" in str(report)

    def test_report_is_fit_for_json_and_draws(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        model, (x, y) = mlp(), data()
        for lam in (None, 0.0, math.inf):
            _, report = adapt_head(model, [(x, y)], lam=lam)
            document = report.as_dict()
            assert "path" not in document
            assert all(not isinstance(v, float) or math.isfinite(v) for v in document.values())
            report.plot(tmp_path / "path.png")
            assert (tmp_path / "path.png").stat().st_size > 1000
            assert "held-out loss" in str(report)

    @pytest.mark.parametrize(
        ("batches", "options", "message"),
        [
            ([], {}, "batches: expected at least one batch, got none"),
            ([torch.ones(3, 4).double()], {}, "batches: expected a tensor of targets beside the inputs, got None"),
            ([(torch.ones(3, 4).double(), torch.ones(3, 2))], {}, "targets: expected numbers in the shape of the"),
            ([(torch.ones(3, 4).double(), torch.ones(2).long())], {}, "targets: expected 3 labels, one for each"),
            ([(torch.ones(3, 4).double(), torch.ones(3).long() * 7)], {}, "targets: expected 3 classes 0..2, got 7"),
            ([(torch.ones(1, 4).double(), torch.ones(1, 3))], {}, "lam: expected a number where there is one sample"),
            ([], {"mode": "fast"}, "mode: expected 'exact' or 'perturb', got 'fast'"),
            ([], {"lam": -1}, "lam: expected a number of at least 0, got -1"),
            ([], {"lam": math.nan}, "lam: expected a number of at least 0, got nan"),
            ([], {"folds": 1}, "folds: expected an integer of at least 2, got 1"),
            ([(torch.ones(3, 4), torch.ones(3, 3))], {"mode": "perturb"}, "batches.0.: expected four tensors"),
        ],
    )  # fmt: skip
    def test_bad_input(self, batches: list[Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            adapt_head(mlp(), batches, **options)


class TestAdaptLayers:
    def test_never_worse_on_held_out_samples(self) -> None:
        model, (x, _) = mlp(), data(60)
        shifted = model(1.5 * x + 0.3).detach()
        for y in (shifted, torch.randn(60, 3).double(), model(x).detach()):
            before = copy.deepcopy(model.state_dict())
            adapted, report = adapt_layers(model, [(x[:40], y[:40])], [(x[40:], y[40:])], ["0"], steps=6)
            assert all(value.equal(before[name]) for name, value in model.state_dict().items())
            assert report.held_out_before == pytest.approx(loss(model, x[40:], y[40:]))
            assert report.held_out_after == pytest.approx(loss(adapted, x[40:], y[40:]))
            assert report.held_out_after <= report.held_out_before
            losses = [report.held_out_before] + [step.held_out for step in report.steps if step.kept]
            assert losses == sorted(losses, reverse=True)
            assert report.parameters == ("0.weight", "0.bias")
        adapted, report = adapt_layers(model, [(x[:40], shifted[:40])], [(x[40:], shifted[40:])], ["0"], steps=6)
        assert report.held_out_after < 0.2 * adapt_layers_without_steps(model, x, shifted)

    def test_first_step_solves_the_damped_equations(self) -> None:
        model, (x, y) = mlp(1), data(40, 1)
        y = y + model(x).detach()
        adapted, report = adapt_layers(
            model, [(x[:15], y[:15]), (x[15:30], y[15:30])], [(x[:30], y[:30])], ["0"], steps=1
        )
        mu = report.steps[0].damping
        assert mu is not None
        assert report.steps[0].kept
        jacobian = torch.func.jacrev(
            lambda p: torch.func.functional_call(model, {"0.weight": p[:64].view(16, 4), "0.bias": p[64:]}, (x[:30],))
        )(torch.cat([model[0].weight.flatten(), model[0].bias]).detach())[:, 0]
        right = jacobian.mT @ (y[:30] - model(x[:30]))[:, 0]
        step = torch.linalg.solve(jacobian.mT @ jacobian + mu * torch.eye(80).double(), right)
        moved = torch.cat([(adapted[0].weight - model[0].weight).flatten(), adapted[0].bias - model[0].bias])
        torch.testing.assert_close(moved, step, rtol=1e-2, atol=1e-2 * float(step.detach().norm()))

    @pytest.mark.parametrize(
        ("layers", "options", "message"),
        [
            (["1"], {}, "layers: expected paths of modules with parameters, got '1'"),
            (["x"], {}, "layers: expected paths of modules with parameters, got 'x'"),
            (["0"], {"damping": 0.0}, "damping: expected a positive number, got 0.0"),
            (["0"], {"steps": -1}, "steps: expected an integer of at least 0, got -1"),
        ],
    )
    def test_bad_input(self, layers: list[str], options: dict[str, Any], message: str) -> None:
        x, y = data()
        with pytest.raises(ValueError, match=message):
            adapt_layers(mlp(), [(x, y)], [(x, y)], layers, **options)
        with pytest.raises(TypeError, match="held_out: expected numbers as targets"):
            adapt_layers(mlp(), [(x, y)], [(x, torch.zeros(40).long())], ["0"])
        with pytest.raises(ValueError, match="held_out: expected at least one batch, got none"):
            adapt_layers(mlp(), [(x, y)], [], ["0"])


def adapt_layers_without_steps(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Held-out loss of the last layer's solution alone."""
    return loss(adapt_head(model, [(x[:40], y[:40])])[0], x[40:], y[40:])


class TestFewShot:
    def test_arms(self) -> None:
        model, (x, _) = mlp(), data(200)
        labels = (model(x) + torch.tensor([1.0, 0, 0])).argmax(1)
        result = compare_heads(model, (x[:60], labels[:60]), (x[60:], labels[60:]))
        assert list(result.accuracy) == ["unadapted", "adapted", "ridge", "gradient", "pinv"]
        as_it_is = (model(x[60:]).argmax(1) == labels[60:]).double().mean()
        assert result.accuracy["unadapted"] == pytest.approx(float(as_it_is))
        adapted, _ = adapt_head(model, [(x[:60], labels[:60])])
        share = (adapted(x[60:]).argmax(1) == labels[60:]).double().mean()
        assert result.accuracy["adapted"] == pytest.approx(float(share))
        with pytest.raises(ValueError, match="arms: expected names among unadapted, adapted"):
            compare_heads(model, (x, labels), (x, labels), arms=["best"])

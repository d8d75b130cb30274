"""Every strategy in the one harness, and what the baselines compute against their formulas."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from otqms_tasks import task
from torch import nn
from torch.nn import functional as F

from transferops import _checkpoint as checkpoint
from transferops.fisher import FisherInformation, parameter_differences
from transferops.otqms import (
    OTQMS,
    STRATEGIES,
    Decision,
    FeatureNet,
    Phase,
    Strategy,
    TrainingOptions,
    allocate,
    decisions,
    survey,
)
from transferops.otqms import strategies as registry
from transferops.otqms.akaike import akaike_shares
from transferops.otqms.averaging import WeightAverage, midpoint
from transferops.otqms.baselines import ensembles
from transferops.otqms.baselines.wadn import _simplex_minimum
from transferops.otqms.discrepancy import newton_directions, released_gram
from transferops.otqms.distributed import World
from transferops.otqms.phases import shares, target_alone
from transferops.otqms.semidefinite import shrink

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = TrainingOptions(
    epochs=2,
    early_stopping=True,
    patience=2,
    batch_size=8,
    min_steps=6,
    source_steps=20,
    lr=1e-2,
    schedule="constant",
)


TARGET, VALIDATION = task(0, 5), task(9, 4)
SOURCES = {"near": task(1, 20), "far": task(2, 16, turn=1), "small": task(3, 3)}


def trainer(model: Any = lambda: FeatureNet(4, 3, hidden=6), **changes: Any) -> OTQMS:
    options = dataclasses.replace(FAST, **changes)
    return OTQMS(model, TARGET, SOURCES, validation=VALIDATION, options=options)


@pytest.fixture(scope="module")
def shared() -> OTQMS:
    return trainer()


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_trains(shared: OTQMS, name: str) -> None:
    run = shared.fit(name)
    assert run.strategy == name
    assert 1 <= run.kept_epoch <= len(run.epochs)
    assert all(p.isfinite().all() for p in run.model.parameters())
    for record in run.epochs:
        if not registry.STRATEGIES[name].surveys:  # those draw samples again and again
            assert record.samples == 15 + sum(record.quantities.values())
            assert all(q <= len(SOURCES[source].labels) for source, q in record.quantities.items())
        assert -1e-9 <= sum(record.shares.values()) <= 1
    predicting = {"recommended", "shares", "weights", "budget", "paper"}
    if name in predicting or (name.startswith("quantities") and name != "quantities-anchored"):
        assert run.allocated.predicted_risk is not None
        assert run.gram is not None
        assert run.gram.shape == (3, 3)


def test_all_baselines_stands_for_everything() -> None:
    assert registry.expand(["all-baselines"]) == list(STRATEGIES)
    assert registry.expand(["weights"]) == ["weights"]
    with pytest.raises(ValueError, match=r"^name: expected a name that is not taken, got 'all-baselines'$"):
        registry.add("all-baselines", Strategy())


@pytest.fixture
def only(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Register a strategy for one test."""
    added = []

    def add(*phases: Phase, **arguments: Any) -> str:
        name = f"made-up-{len(added)}"
        registry.add(name, Strategy(phases, **arguments))
        added.append(name)
        return name

    yield add
    for name in added:
        del STRATEGIES[name]


class TestPhases:
    def test_weights_are_those_of_the_loss(self, only: Any) -> None:
        """One step of plain gradient descent on the weighted mean loss, by hand."""
        weights = (3.0, 1.0, 0.0, 0.5)
        name = only(Phase(lambda s: Decision((60, 0, 9), weights=weights)))
        ours = trainer(epochs=1, batch_size=1000, min_steps=1, optimizer=torch.optim.SGD, lr=0.1)
        record = ours.fit(name).epochs[0]
        torch.manual_seed(0)
        model = FeatureNet(4, 3, hidden=6)
        parts = [TARGET, SOURCES["near"], SOURCES["small"]]
        losses = [F.cross_entropy(model(p.inputs), p.labels, reduction="sum") for p in parts]
        mass = 3 * 15 + 60 + 0.5 * 9
        loss = (3 * losses[0] + losses[1] + 0.5 * losses[2]) / mass
        assert record.train_loss == pytest.approx(loss.item(), rel=1e-5)
        assert list(record.shares.values()) == pytest.approx([60 / mass, 0, 4.5 / mass])
        loss.backward()
        trained = ours.fit(name).model
        for p, q in zip(model.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(q.detach(), (p - 0.1 * p.grad).detach(), rtol=1e-4, atol=1e-6)

    def test_weights_by_class(self, only: Any) -> None:
        table = ((1.0, 1.0, 1.0), (2.0, 0.0, 1.0), (0.0,) * 3, (0.0,) * 3)
        ours = trainer(epochs=1, batch_size=1000, min_steps=1)
        record = ours.fit(only(Phase(lambda s: Decision((60, 0, 0), weights=table)))).epochs[0]
        torch.manual_seed(0)
        model = FeatureNet(4, 3, hidden=6)
        near = SOURCES["near"]
        each = F.cross_entropy(model(near.inputs), near.labels, reduction="none")
        factors = torch.tensor([2.0, 0.0, 1.0])[near.labels]
        own = F.cross_entropy(model(TARGET.inputs), TARGET.labels, reduction="sum")
        expected = (own + (factors * each).sum()) / (15 + factors.sum())
        assert record.train_loss == pytest.approx(expected.item(), rel=1e-5)

    def test_target_samples_may_repeat(self, only: Any) -> None:
        record = trainer().fit(only(Phase(lambda s: Decision((0, 0, 0), target=40)))).epochs[0]
        assert record.samples == 40

    @pytest.mark.parametrize("weights", [(0.0,) * 4, (1.0, -1.0, 0.0, 0.0), (1.0, float("nan"), 0.0, 0.0)])
    def test_impossible_weights(self, only: Any, weights: tuple[float, ...]) -> None:
        with pytest.raises(ValueError, match=r"^decision: expected finite weights"):
            trainer().fit(only(Phase(lambda s: Decision((5, 0, 0), weights=weights))))

    def test_phases_follow_each_other(self, only: Any) -> None:
        """The second starts from the kept model of the first, and may keep it."""
        harmful = Phase(lambda s: Decision((0, 48, 0), target=0), start="previous", may_stay=True, name="harm")
        first = Phase(lambda s: Decision((60, 0, 9)), epochs=3, name="first")
        ours = trainer(epochs=5, patience=5, lr=3e-2)
        run = ours.fit(only(first, harmful))
        assert [record.phase for record in run.epochs] == ["first"] * 3 + ["harm"] * 5
        assert [record.epoch for record in run.epochs] == list(range(1, 9))
        alone = ours.fit(only(first))
        assert run.kept_epoch == alone.kept_epoch <= 3
        for p, q in zip(run.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.equal(p, q)

    def test_decisions_are_taken_when_due(self, only: Any) -> None:
        for options, once, expected in (({}, False, 6), ({"resolve_every": 4}, False, 2), ({}, True, 1)):
            seen = []

            def decide(situation: Any, seen: list[int] = seen) -> Decision:
                seen.append(situation.epoch)
                return Decision((1, 1, 1))

            trainer(epochs=6, patience=6, **options).fit(only(Phase(decide, decide_once=once)))
            assert len(seen) == expected

    def test_averaging_keeps_the_mean_of_the_steps(self, only: Any) -> None:
        """Of 4 steps of plain gradient descent by hand: the plain mean, as long as the decay forgets nothing."""
        name = only(Phase(target_alone, epochs=2, averaging=0.9))
        ours = trainer(batch_size=1000, min_steps=2, optimizer=torch.optim.SGD, lr=0.1, early_stopping=False)
        torch.manual_seed(0)
        model = FeatureNet(4, 3, hidden=6)
        inputs, labels = (torch.cat([getattr(p, n) for p in (TARGET, VALIDATION)]) for n in ("inputs", "labels"))
        steps = []
        for _ in range(4):
            gradients = torch.autograd.grad(F.cross_entropy(model(inputs), labels), list(model.parameters()))
            with torch.no_grad():
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    p -= 0.1 * gradient
            steps.append([p.detach().clone() for p in model.parameters()])
        kept = ours.fit(name).model
        for found, *values in zip(kept.parameters(), *steps, strict=True):
            torch.testing.assert_close(found.detach(), torch.stack(values).mean(0), rtol=1e-5, atol=1e-6)

    def test_averaging_forgets_exponentially(self) -> None:
        model = nn.Linear(1, 1, bias=False)
        average = WeightAverage(model, 0.5)
        for value in (1.0, 2.0, 4.0, 8.0):
            nn.init.constant_(model.weight, value)
            average.update(model)
        assert average.applied(model).weight.item() == pytest.approx(((1 + 2) / 2 / 2 + 4 / 2) / 2 + 8 / 2)
        assert model.weight.item() == 8

    def test_halfway(self, only: Any) -> None:
        """The mean of the model before a phase and the one after it."""
        first, second = Phase(target_alone, epochs=1), Phase(target_alone, start="previous", epochs=3)
        ours = trainer(early_stopping=False)
        before, after = ours.fit(only(first)).model, ours.fit(only(first, second)).model
        kept = ours.fit(only(first, dataclasses.replace(second, halfway=True))).model
        for p, q, r in zip(before.parameters(), after.parameters(), kept.parameters(), strict=True):
            torch.testing.assert_close(r, (p + q) / 2)
            assert not torch.equal(p, q)

    def test_buffers_are_not_averaged(self) -> None:
        first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        nn.init.constant_(first.weight, 3.0)
        second.running_mean.fill_(5.0)
        middle = midpoint(first, second)
        assert middle.weight.tolist() == [2.0, 2.0]
        assert middle.running_mean.tolist() == [5.0, 5.0]

    def test_best_source_is_the_nearest(self, only: Any) -> None:
        ours = trainer(source_steps=200)
        name = only(Phase(lambda s: Decision((0, 0, 0)), start="best-source", lr_factor=1e-9, epochs=1))
        model = ours.fit(name).model
        for p, q in zip(model.parameters(), ours.source_models()[0].parameters(), strict=True):
            torch.testing.assert_close(p, q)

    def test_shares(self) -> None:
        assert shares(Decision((10, 30)), 40) == pytest.approx((0.5, 0.125, 0.375))
        assert shares(Decision((10, 30), weights=(1, 2, 0)), 40) == pytest.approx((2 / 3, 1 / 3, 0))


class TestDecisions:
    def test_weights_solve_the_allocation(self, shared: OTQMS) -> None:
        torch.manual_seed(0)
        gram = shared.gram(FeatureNet(4, 3, hidden=6))
        expected = allocate(gram, 15, [60, 48, 9], shared.dimension, mode="weight")
        record = shared.fit("weights").epochs[0]
        assert record.predicted_risk == pytest.approx(expected.risk, rel=1e-9)
        assert list(record.shares.values()) == pytest.approx(expected.masses.tolist(), abs=1e-9)

    def test_a_survey(self) -> None:
        """A and d at the mean of the halves' models, all from the common start; the decision follows from both."""
        ours = trainer(source_steps=5, screen=False)
        found = ours._prepared.survey(all_labels=True)
        assert found.gram.shape == (3, 3)
        assert found.gram[0, 0] < found.gram[1, 1]
        assert found.dimension > 0
        shrunk = shrink(found.gram, [60, 48, 9], 1 / (15 + 12))
        assert not np.allclose(shrunk, found.gram)
        allocation = allocate(shrunk, 15 + 12, [60, 48, 9], found.dimension)
        quantities = allocation.quantities / (15 + 12 + allocation.quantities.sum())
        shares = akaike_shares(found.gram, 15 + 12, [60, 48, 9], found.dimension)
        for name, risk, expected in (
            ("recommended", allocation.risk, quantities),
            ("shares", shares.risk, shares.sources),
        ):
            record = ours.fit(name).epochs[0]
            assert record.samples == (15 + 12 + 60 + 48 + 9) / 2
            assert list(record.shares.values()) == pytest.approx(expected.tolist(), abs=1 / record.samples)
            assert record.predicted_risk == pytest.approx(risk)
            assert record.validation_accuracy is None
        assert set(ours._prepared._surveys) == {True}

    def test_a_survey_measures_at_the_mean_of_the_halves(self, tmp_path: Path) -> None:
        """From the models it leaves behind: A, and d from the halves' distance, by the Fisher information there."""
        options = dataclasses.replace(FAST, early_stopping=False)
        ours = OTQMS(lambda: FeatureNet(4, 3, hidden=6), task(0, 6), SOURCES, options=options, checkpoint=tmp_path)
        found = ours._prepared.survey(all_labels=True)

        def model(name: str) -> nn.Module:
            state = checkpoint.load(tmp_path / "seed-0" / f"survey-{name}-all.ckpt")
            assert state is not None
            made = FeatureNet(4, 3, hidden=6)
            made.load_state_dict(state["stopping"]["state"])
            return made

        halves, sources = [model("first-half"), model("second-half")], [model(f"source-{i}") for i in range(3)]
        middle = midpoint(*halves)
        fisher = FisherInformation(middle)
        batch = [task(0, 6).inputs]
        matrix = fisher.gram(parameter_differences(sources, middle), batch)
        torch.testing.assert_close(found.gram, matrix, rtol=1e-4, atol=1e-7)
        apart = fisher.quadratic(parameter_differences(halves[:1], halves[1])[0], batch)
        assert found.dimension == pytest.approx(18 / 4 * apart, rel=1e-4)

    def test_a_strategy_that_validates_may_survey(self, only: Any) -> None:
        """The survey is then of the training samples alone, and with early stopping off of all, but once."""
        name = only(Phase(decisions.surveyed_shares, start="survey", epochs=1), surveys=True)
        for early, samples in ((True, 15), (False, 27)):
            ours = trainer(early_stopping=early, screen=False)
            assert ours.fit(name).epochs[0].samples == math.ceil((samples + 117) / 2)
            assert set(ours._prepared._surveys) == {not early}

    def test_halves_are_stratified_and_complete(self) -> None:
        ours = trainer()
        first, second = survey.halves(ours.samples, torch.Generator().manual_seed(0))
        assert abs(len(first) - len(second)) <= 1
        counts = torch.bincount(first.labels, minlength=3)
        assert counts.min() >= 2
        assert counts.max() <= 3
        together = torch.cat([first.inputs, second.inputs])
        assert torch.equal(together.sort(0).values, TARGET.inputs.sort(0).values)

    def test_budget_is_kept(self) -> None:
        for name in ("budget", "uniform"):
            run = trainer(budget=31).fit(name)
            assert all(sum(record.quantities.values()) <= 31 for record in run.epochs)
        assert run.epochs[0].quantities == {"near": 16, "far": 13, "small": 2}

    def test_static_decides_once_at_the_target_alone(self) -> None:
        ours = trainer(epochs=3, patience=3)
        gram = ours.gram(ours.fit("target-only").model)
        expected = allocate(gram, 15, [60, 48, 9], ours.dimension)
        for record in ours.fit("quantities-static").epochs:
            assert list(record.quantities.values()) == expected.rounded().tolist()
        under = trainer(epochs=1).fit("target-only").model
        assert torch.equal(ours._prepared.anchor("under")[0][0].weight, under[0].weight)

    def test_released_gram(self, shared: OTQMS) -> None:
        torch.manual_seed(5)
        model = FeatureNet(4, 3, hidden=6)
        states = [m.state_dict() for m in shared.source_models()]
        options = dataclasses.replace(FAST, batch_size=6)
        found = released_gram(model, states, shared.samples, options, World())
        total = np.zeros((3, 3))
        for start in range(0, 15, 6):
            model.zero_grad()
            F.cross_entropy(model(TARGET.inputs[start : start + 6]), TARGET.labels[start : start + 6]).backward()
            scores = np.zeros(3)
            for name, p in model.named_parameters():
                g = p.grad.double()
                g = 2 * (g - g.min()) / (g.max() - g.min()) - 1
                scores += [float((g * (s[name].double() - p.detach().double())).sum()) for s in states]
            total += np.outer(scores, scores) / 3
        np.testing.assert_allclose(found.numpy(), total, rtol=1e-4)


class TestDiscrepancy:
    def test_newton_directions_solve_the_damped_system(self) -> None:
        """Of a linear model, J in full; ten steps of conjugate gradients suffice for its few parameters."""
        ours = trainer(lambda: nn.Linear(4, 3))
        model = copy.deepcopy(ours._prepared.around.initial)
        directions = newton_directions(model, ours.samples, FAST, torch.Generator().manual_seed(0), World())
        x = torch.cat([TARGET.inputs, torch.ones(15, 1)], 1).double()

        def flat(d: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.cat([d["weight"], d["bias"][:, None]], 1).double().flatten()

        with torch.no_grad():
            p = model(TARGET.inputs).double().softmax(1)
            centred = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            fisher = (torch.einsum("nij,na,nb->iajb", centred, x, x) / 15).reshape(15, 15)
        gradients = []
        for source in SOURCES.values():
            model.zero_grad()
            F.cross_entropy(model(source.inputs), source.labels).backward()
            gradients.append(flat({"weight": model.weight.grad, "bias": model.bias.grad}))
        mean = torch.stack(gradients).mean(0)
        damping = 0.1 * (mean @ fisher @ mean) / (mean @ mean)
        for direction, gradient in zip(directions, gradients, strict=True):
            expected = -torch.linalg.solve(fisher + damping * torch.eye(15), gradient)
            found = flat(direction)
            # Ten steps leave a residual; it is far below the solution.
            assert (found - expected).norm() < 0.02 * expected.norm()

    def test_without_source_models(self) -> None:
        ours = trainer(directions="gradients")
        run = ours.fit("quantities-dynamic")
        assert run.source_model_seconds == 0
        assert "sources" not in vars(ours._prepared)
        assert run.gram is not None
        assert torch.linalg.eigvalsh(run.gram).min() > -1e-8

    def test_head_only(self) -> None:
        ours = trainer(parameters="head", dimension="parameters")
        assert ours.dimension == 6 * 3 + 3
        torch.manual_seed(1)
        model = FeatureNet(4, 3, hidden=6)
        moved = copy.deepcopy(model)
        nn.init.normal_(moved[0].weight)
        torch.testing.assert_close(ours.gram(model), ours.gram(moved), rtol=10.0, atol=10.0)
        named = trainer(parameters=["2.weight", "2.bias"])
        torch.testing.assert_close(ours.gram(model), named.gram(model))

    def test_empirical(self) -> None:
        torch.manual_seed(1)
        model = FeatureNet(4, 3, hidden=6)
        exact, empirical = trainer(), trainer(fisher="empirical")
        directions = [
            {n: p.detach() - model.get_parameter(n).detach() for n, p in m.named_parameters()}
            for m in exact.source_models()
        ]
        total = np.zeros((3, 3))
        for x, y in zip(TARGET.inputs, TARGET.labels, strict=True):
            model.zero_grad()
            F.cross_entropy(model(x[None]), y[None]).backward()
            s = np.array([sum(float((p.grad * d[n]).sum()) for n, p in model.named_parameters()) for d in directions])
            total += np.outer(s, s) / 15
        np.testing.assert_allclose(empirical.gram(model).numpy(), total, rtol=1e-4)

    def test_supplied_source_models(self) -> None:
        trained = trainer()
        models = dict(zip(SOURCES, trained.source_models(), strict=True))
        options = dataclasses.replace(FAST, early_stopping=False)
        ours = OTQMS(lambda: FeatureNet(4, 3, hidden=6), TARGET, SOURCES, options=options, source_models=models)
        model = trained._prepared.around.initial
        same = OTQMS(
            lambda: FeatureNet(4, 3, hidden=6),
            TARGET,
            SOURCES,
            options=FAST,
            validation=VALIDATION,
            source_models=models,
        )
        torch.testing.assert_close(same.gram(model), trained.gram(model), rtol=0, atol=0)
        assert ours.fit("quantities-dynamic").source_model_seconds == 0
        with pytest.raises(ValueError, match=r"^source_models: expected a model for every source, 'far' included"):
            OTQMS(lambda: FeatureNet(4, 3), TARGET, SOURCES, source_models={"near": models["near"]})


class TestEnsembles:
    def test_mcw_by_its_formula(self, shared: OTQMS) -> None:
        """Sum over sources and features of sigma f(x) g(y), g and f of unit variance."""
        model = shared.fit("mcw").model
        prior = torch.bincount(TARGET.labels).double() / 15
        score = torch.zeros(12, 3, dtype=torch.float64)
        for source in shared.source_models():
            hidden = nn.Sequential(*list(source)[:-1])
            with torch.no_grad():
                own, new = hidden(TARGET.inputs).double(), hidden(VALIDATION.inputs).double()
            scale = own.std(0, correction=0)
            f, x = (own - own.mean(0)) / scale, (new - own.mean(0)) / scale
            for j in range(6):
                if scale[j] == 0:  # a dead unit
                    continue
                g = torch.stack([f[TARGET.labels == c, j].mean() for c in range(3)])
                spread = (prior * g**2).sum().sqrt()
                sigma = (prior * g * g / spread).sum()
                score += sigma * x[:, j, None] * (g / spread)
        expected = (prior * (1 + score)).clamp_min(1e-6).log()
        with torch.no_grad():
            torch.testing.assert_close(model(VALIDATION.inputs).double(), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("objective", [ensembles._h_score, ensembles._variance_ratio])
    def test_the_combination_is_at_least_as_good_as_a_grid(self, shared: OTQMS, objective: Any) -> None:
        _, found, labels, classes = ensembles._target_features(shared)
        stacked = torch.stack(found)
        grid = [torch.tensor([a, b, 1 - a - b]) for a in np.linspace(0, 1, 11) for b in np.linspace(0, 1 - a, 6)]
        best = max(float(objective(torch.einsum("k,knd->nd", w.double(), stacked), labels, classes)) for w in grid)
        build = {ensembles._h_score: "h-ensemble", ensembles._variance_ratio: "h-ensemble-released"}[objective]
        model = shared.fit(build).model
        combined = model._combine(found)
        assert float(objective(combined, labels, classes)) >= 0.97 * best

    def test_shrinkage_is_that_of_scikit_learn(self) -> None:
        covariance = pytest.importorskip("sklearn.covariance")
        x = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ torch.diag(
            torch.arange(1.0, 8, dtype=torch.float64)
        )
        x = x - x.mean(0)
        expected, _ = covariance.ledoit_wolf(x.numpy(), assume_centered=True)
        np.testing.assert_allclose(ensembles._shrunk_covariance(x).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_wadn_weights_minimise_their_objective() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(0)
    for _ in range(5):
        costs, sizes = generator.uniform(0, 2, 5), generator.dirichlet(np.ones(5))

        def value(x: np.ndarray, costs: np.ndarray = costs, sizes: np.ndarray = sizes) -> float:
            return float(costs @ x + np.sqrt((x**2 / sizes).sum()))

        found = _simplex_minimum(costs, sizes)
        assert found.min() >= 0
        assert found.sum() == pytest.approx(1)
        reference = optimize.minimize(
            value,
            np.full(5, 0.2),
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            options={"ftol": 1e-12},
        )
        assert value(found) <= reference.fun + 1e-7

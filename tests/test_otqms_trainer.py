"""The trainer: strategies, seeds, options, and the networks that it makes itself."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from otqms_tasks import AVAILABLE, CLASSES, FAST, FEATURES, SOURCES, TARGET, network, timeless
from torch import nn

from transferops.data import Domain, few_shot_split
from transferops.fisher import FisherInformation
from transferops.otqms import (
    OTQMS,
    STRATEGIES,
    ConvNet,
    Decision,
    EpochRecord,
    FeatureNet,
    Situation,
    TrainingOptions,
    allocate,
    discrepancy,
    network_for,
    register,
)
from transferops.otqms.options import resolve_dimension
from transferops.otqms.pool import TensorSamples

pytestmark = pytest.mark.usefixtures("one_thread")


def exactly(message: str) -> str:
    """The pattern of this message and no other."""
    return f"^{re.escape(message)}$"


def trainer(seed: int = 0, options: TrainingOptions = FAST, **arguments: Any) -> OTQMS:
    split = few_shot_split(TARGET, 5, seed=seed)
    return OTQMS(
        network,
        split.train,
        SOURCES,
        **{"validation": split.validation, **arguments},
        options=options,
        seed=seed,
    )


class TestStrategies:
    def test_a_model_that_trains_on_is_checked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made, information = [], discrepancy.information

        def counted(*arguments: Any) -> FisherInformation:
            made.append(information(*arguments))
            return made[-1]

        monkeypatch.setattr(discrepancy, "information", counted)
        ours = trainer()
        run = ours.fit("quantities-dynamic")
        assert len(run.epochs) > len(made) == 1
        assert torch.equal(ours.gram(run.model), trainer().gram(run.model))

    def test_samples_used(self) -> None:
        ours = trainer()
        only, everything, chosen = (ours.fit(name) for name in ("target-only", "all-sources", "quantities-dynamic"))
        assert [record.samples for record in only.epochs] == [12] * 4
        assert [record.samples for record in everything.epochs] == [12 + 108] * 4
        assert everything.kept.quantities == AVAILABLE
        assert only.samples_per_epoch == 12
        for record in chosen.epochs:
            assert record.samples == 12 + sum(record.quantities.values())
            assert all(0 <= record.quantities[name] <= AVAILABLE[name] for name in AVAILABLE)
            assert record.predicted_risk is not None
            assert 0 < record.predicted_risk <= ours.dimension / (2 * 12)

    def test_quantities_solve_the_allocation_at_the_current_model(self) -> None:
        """In the first epoch that is the initial network, made under the seed."""
        ours = trainer(seed=3)
        torch.manual_seed(3)
        expected = allocate(ours.gram(network()), 12, [60, 48], ours.dimension)
        record = ours.fit("quantities-dynamic").epochs[0]
        assert list(record.quantities.values()) == expected.rounded().tolist()
        assert record.predicted_risk == pytest.approx(expected.risk, rel=1e-9)

    @pytest.mark.parametrize("seed", range(4))
    def test_the_related_source_is_nearer_and_preferred(self, seed: int) -> None:
        """At the target's own model; in the mixture with a source, that source looks near too."""
        ours = trainer(seed)
        gram = ours.gram(ours.fit("target-only").model)
        assert gram[0, 0] < gram[1, 1] / 3
        near, far = allocate(gram, 12, [60, 48], dimension=4).quantities
        assert near > 1.5 * far

    def test_a_registered_function_is_a_strategy(self) -> None:
        @register("half-of-the-first")
        def half(situation: Situation) -> Decision:
            return Decision((situation.source_samples[0] // 2, 0))

        try:
            record = trainer().fit("half-of-the-first").epochs[0]
        finally:
            del STRATEGIES["half-of-the-first"]
        assert record.quantities == {"near": 30, "far": 0}
        assert record.predicted_risk is None

    def test_names_are_taken_once(self) -> None:
        with pytest.raises(ValueError, match=exactly("name: expected a name that is not taken, got 'quantities'")):
            register("quantities")

    def test_source_models_cost_only_who_uses_them(self) -> None:
        ours = trainer()
        assert ours.fit("all-sources").source_model_seconds == 0
        chosen = ours.fit("quantities-dynamic")
        assert chosen.source_model_seconds > 0
        assert chosen.source_model_seconds == ours.fit("quantities-dynamic").source_model_seconds
        assert 0 < chosen.allocation_seconds < chosen.seconds


class TestTrainer:
    @pytest.mark.parametrize("strategy", ["target-only", "all-sources", "quantities-dynamic"])
    def test_a_seed_decides_everything(self, strategy: str) -> None:
        first, again, other = trainer(0).fit(strategy), trainer(0).fit(strategy), trainer(1).fit(strategy)
        assert timeless(first) == timeless(again) != timeless(other)
        for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_strategies_do_not_disturb_each_other(self) -> None:
        """Nor does the random state outside matter, or change."""
        ours = trainer()
        ours.fit("quantities-dynamic")
        torch.manual_seed(99)
        before = torch.get_rng_state()
        second = ours.fit("all-sources")
        assert torch.equal(before, torch.get_rng_state())
        assert timeless(second) == timeless(trainer().fit("all-sources"))

    def test_the_kept_model_is_the_one_of_the_kept_epoch(self) -> None:
        ours = trainer(options=dataclasses.replace(FAST, epochs=12, lr=5e-2))
        run = ours.fit("all-sources")
        split = few_shot_split(TARGET, 5)
        assert split.validation is not None
        right = run.model(split.validation.inputs).argmax(1) == split.validation.labels
        assert right.float().mean().item() == pytest.approx(run.kept.validation_accuracy)
        assert run.kept.validation_accuracy == max(record.validation_accuracy or 0 for record in run.epochs)

    def test_patience_ends_the_training(self) -> None:
        """Learning rate 0 would tie for ever; labels that training unlearns do not."""
        split = few_shot_split(TARGET, 5)
        assert split.validation is not None
        against = Domain("against", split.validation.inputs, (split.validation.labels + 1) % CLASSES)
        options = dataclasses.replace(FAST, epochs=60, patience=3, lr=3e-2)
        run = trainer(options=options, validation=against).fit("all-sources")
        assert len(run.epochs) == run.kept_epoch + 3 < 60

    def test_without_early_stopping_all_labels_are_trained_on(self) -> None:
        """As if the validation samples had been given with the target's; the last epoch is kept."""
        options = dataclasses.replace(FAST, patience=1, early_stopping=False)
        ours = trainer(options=options)
        run = ours.fit("target-only")
        assert run.kept_epoch == len(run.epochs) == 4
        assert run.kept.validation_accuracy is None
        assert run.kept.samples == ours.samples.sizes[0] == 15
        split = few_shot_split(TARGET, 5)
        assert split.validation is not None
        parts = (split.train, split.validation)
        whole = Domain("all", torch.cat([p.inputs for p in parts]), torch.cat([p.labels for p in parts]))
        together = OTQMS(network, whole, SOURCES, options=options)
        assert timeless(together.fit("quantities-dynamic")) == timeless(ours.fit("quantities-dynamic"))
        assert together.dimension == ours.dimension == 15 * 2

    def test_watched_samples_are_noted_and_change_nothing(self) -> None:
        options = dataclasses.replace(FAST, early_stopping=False)
        run = trainer(options=options, watched=TARGET).fit("quantities-dynamic")
        loss = nn.functional.cross_entropy(run.model(TARGET.inputs), TARGET.labels).item()
        assert run.kept.validation_loss == pytest.approx(loss)
        blank = {"validation_loss": None, "validation_accuracy": None}
        without = trainer(options=options).fit("quantities-dynamic")
        assert [{**record, **blank} for record in timeless(run)] == timeless(without)

    def test_early_stopping_needs_validation_samples(self) -> None:
        message = "validation: expected target samples to choose the epoch on, for early stopping, got none"
        with pytest.raises(ValueError, match=exactly(message)):
            trainer(validation=None)

    def test_gram_is_that_of_the_exact_fisher_information(self) -> None:
        """Of a linear model: J = sum_n x_n x_n^T (kron) (diag p_n - p_n p_n^T) / N, in full."""
        options = dataclasses.replace(FAST, early_stopping=False)
        ours = OTQMS(lambda: FeatureNet(FEATURES, CLASSES, hidden=0), TARGET, SOURCES, options=options)
        torch.manual_seed(7)
        model = FeatureNet(FEATURES, CLASSES, hidden=0)

        def flat(m: nn.Module) -> torch.Tensor:
            return torch.cat([m[0].weight, m[0].bias[:, None]], 1).double().flatten()

        sources = ours.source_models()
        with torch.no_grad():
            theta = torch.stack([flat(source) - flat(model) for source in sources], 1)
            p = model(TARGET.inputs).double().softmax(1)
            x = torch.cat([TARGET.inputs, torch.ones(len(TARGET), 1)], 1).double()
            centred = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            fisher = torch.einsum("nij,na,nb->iajb", centred, x, x) / len(x)
            expected = theta.T @ fisher.reshape(len(theta), len(theta)) @ theta
        torch.testing.assert_close(ours.gram(model), expected, rtol=1e-5, atol=1e-8)

    def test_records_are_handed_out(self) -> None:
        seen: list[EpochRecord] = []
        run = trainer().fit("target-only", seen.append)
        assert tuple(seen) == run.epochs

    def test_frozen_parameters_stay_and_do_not_count(self) -> None:
        def half_frozen() -> nn.Module:
            model = FeatureNet(FEATURES, CLASSES, hidden=8)
            for parameter in model[0].parameters():
                parameter.requires_grad_(False)
            return model

        options = dataclasses.replace(FAST, early_stopping=False, dimension="parameters")
        ours = OTQMS(half_frozen, TARGET, SOURCES, options=options)
        assert ours.dimension == 8 * CLASSES + CLASSES
        torch.manual_seed(0)
        initial = half_frozen()
        trained = ours.fit("quantities-dynamic").model
        assert torch.equal(initial.get_parameter("0.weight"), trained.get_parameter("0.weight"))
        assert not torch.equal(initial.get_parameter("2.weight"), trained.get_parameter("2.weight"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sources": {}}, "sources: expected at least one source, got none"),
            ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
            (
                {"model": lambda: FeatureNet(FEATURES, 2)},
                "target: expected labels from 0 to 1, one per logit of the model, got labels from 0 to 2",
            ),
            (
                {"sources": {"odd": TensorSamples(torch.zeros(2, FEATURES), torch.tensor([0, 3]))}},
                "sources['odd']: expected labels from 0 to 2, one per logit of the model, got labels from 0 to 3",
            ),
            (
                {"validation": TensorSamples(torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.int64))},
                "validation: expected at least one sample, got none",
            ),
            (
                {"model": lambda: network().requires_grad_(False)},
                "model: expected parameters that require a gradient, got none",
            ),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {"model": network, "target": TARGET, "sources": SOURCES, **change}
        with pytest.raises(ValueError, match=exactly(message)):
            OTQMS(**arguments)

    def test_one_sample_has_no_halves(self) -> None:
        message = "target: expected at least 2 samples for a survey, which compares models of two halves, got 1"
        options = dataclasses.replace(FAST, early_stopping=False)
        with pytest.raises(ValueError, match=exactly(message)):
            OTQMS(network, TARGET.subset(torch.arange(1)), SOURCES, options=options).fit("recommended")

    def test_unknown_strategy(self) -> None:
        message = f"strategy: expected names among {', '.join(STRATEGIES)}, got 'all'"
        with pytest.raises(ValueError, match=exactly(message)):
            trainer().fit("all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
        ({"patience": 1.5}, "patience: expected an integer of at least 1, got 1.5"),
        ({"batch_size": True}, "batch_size: expected an integer of at least 1, got True"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"lr": float("nan")}, "lr: expected a positive number, got nan"),
        ({"dimension": 0}, "dimension: expected an integer of at least 1, got 0"),
        (
            {"dimension": "all"},
            "dimension: expected 'auto', 'parameters' or an integer of at least 1, got 'all'",
        ),
        ({"device": "nowhere"}, "device: expected one that works here, got 'nowhere'"),
    ],
)
def test_options_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        TrainingOptions(**change)


def test_dimension() -> None:
    assert resolve_dimension("parameters", 1000, 12, 3) == 1000
    assert resolve_dimension("auto", 1000, 12, 3) == 24
    assert resolve_dimension("auto", 20, 12, 3) == 20
    assert resolve_dimension(7, 1000, 12, 3) == 7
    assert trainer().dimension == 12 * 2


class TestNetworks:
    @pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 64, 64), (3, 9, 31), (5,), (800,)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        model = network_for(shape, 7)
        assert model(torch.zeros(2, *shape)).shape == (2, 7)

    def test_samples_do_not_influence_each_other(self) -> None:
        model = ConvNet(1, 3).train()
        images = torch.rand(4, 1, 8, 8)
        torch.testing.assert_close(model(images)[:1], model(images[:1]))

    @pytest.mark.parametrize("shape", [(), (8, 8), (3, 7, 8), (1, 1, 8, 8)])
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        message = f"sample_shape: expected (C, H, W) of at least 8 pixels, or (D,), got {shape}"
        with pytest.raises(ValueError, match=exactly(message)):
            network_for(shape, 3)

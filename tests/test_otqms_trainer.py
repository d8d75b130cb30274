"""The trainer and what surrounds it: draws, early stopping, strategies, studies and their results."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from transferops.data import Domain, few_shot_split
from transferops.otqms import (
    OTQMS,
    STRATEGIES,
    ConvNet,
    Decision,
    EpochRecord,
    FeatureNet,
    Situation,
    Study,
    TrainingOptions,
    TrainingRun,
    Trial,
    allocate,
    compare,
    network_for,
    register,
    to_json,
    write_json,
)
from transferops.otqms.distributed import World
from transferops.otqms.early_stopping import EarlyStopping
from transferops.otqms.options import resolve_dimension
from transferops.otqms.plots import plot_accuracy, plot_quantities
from transferops.otqms.pool import Pool, TensorSamples
from transferops.otqms.sampling import Deck, draw
from transferops.otqms.summary import Mean, conclusions, summarize
from transferops.otqms.training import EpochPlan, Evaluation, Stepper

CLASSES, FEATURES = 3, 4
FAST = TrainingOptions(
    epochs=4,
    early_stopping=True,
    patience=4,
    batch_size=8,
    min_steps=6,
    source_steps=30,
    lr=1e-2,
    schedule="constant",
)


def exactly(message: str) -> str:
    """The pattern of this message and no other."""
    return f"^{re.escape(message)}$"


def task(name: str, seed: int, per_class: int = 12, turn: int = 0) -> Domain:
    """Three Gaussian classes around fixed centres; ``turn`` exchanges the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES * per_class) % CLASSES
    centres = 2 * torch.eye(CLASSES, FEATURES)
    inputs = centres[labels] + 0.7 * torch.randn(len(labels), FEATURES, generator=generator)
    return Domain(name, inputs, (labels + turn) % CLASSES)


TARGET = task("target", 0, per_class=20)
SOURCES = {"near": task("near", 1, 20), "far": task("far", 2, 16, turn=1)}
AVAILABLE = {"near": 60, "far": 48}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Module:
    return FeatureNet(FEATURES, CLASSES, hidden=8)


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


def timeless(run: TrainingRun) -> list[EpochRecord]:
    """The records of a run without its times."""
    return [dataclasses.replace(record, seconds=0, allocation_seconds=0) for record in run.epochs]


class TestDraw:
    @pytest.mark.parametrize("quantity", [0, 1, 10, 37, 60])
    def test_without_replacement_and_stratified(self, quantity: int) -> None:
        labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 30)
        chosen = draw(labels, quantity, torch.Generator().manual_seed(0))
        assert len(chosen) == len(set(chosen.tolist())) == quantity
        counts = torch.bincount(labels[chosen], minlength=3)
        assert ((counts - quantity * torch.tensor([10, 20, 30]) / 60).abs() < 1.5).all()

    def test_every_sample_is_as_likely(self) -> None:
        labels = torch.tensor([0] * 4 + [1] * 12)
        generator = torch.Generator().manual_seed(0)
        counts = torch.zeros(16)
        for _ in range(4000):
            counts[draw(labels, 6, generator)] += 1
        # 6/16 of 4000 draws; a binomial standard deviation is 31.
        assert (counts - 1500).abs().max() < 125

    def test_generator_decides(self) -> None:
        labels = torch.zeros(50, dtype=torch.int64)
        first, again, other = (draw(labels, 9, torch.Generator().manual_seed(s)).tolist() for s in (1, 1, 2))
        assert first == again != other


@pytest.mark.parametrize(
    ("batch_size", "min_steps", "steps"), [(8, 1, 8), (8, 20, 24), (60, 1, 1), (60, 5, 5), (59, 1, 2)]
)
def test_an_epoch_is_whole_passes_of_at_least_min_steps(batch_size: int, min_steps: int, steps: int) -> None:
    model = network()
    pool = Pool({"target": TARGET}, torch.device("cpu"))
    plan = EpochPlan.shuffled(torch.arange(60), batch_size, min_steps, torch.Generator().manual_seed(0))
    assert all(torch.equal(row.sort().values, torch.arange(60)) for row in plan.order)
    sizes = [len(batch) for batch in plan.batches()]
    assert len(sizes) == plan.total_steps == steps
    assert max(sizes) - min(sizes) <= 1
    stepper = Stepper(model, dataclasses.replace(FAST, optimizer=torch.optim.SGD), 1e-30, World())
    losses = list(stepper.steps(pool, plan, 0, (0, 1)))
    expected = nn.functional.cross_entropy(model(TARGET.inputs), TARGET.labels).item()
    assert sum(losses).item() / plan.order.numel() == pytest.approx(expected, rel=1e-5)


class TestDeck:
    def test_every_sample_before_any_comes_again(self) -> None:
        labels = torch.arange(30) % 3
        deck, generator = Deck(labels), torch.Generator().manual_seed(0)
        counts = torch.zeros(30, dtype=torch.int64)
        for quantity in (7, 0, 13, 25, 30, 4, 61, 29):
            hand = deck.deal(quantity, generator)
            assert len(hand) == quantity
            within = torch.bincount(hand, minlength=30)
            assert within.max() <= 1 or quantity > 30
            counts += within
            assert counts.max() - counts.min() <= 2

    def test_a_hand_is_stratified(self) -> None:
        labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 30)
        deck, generator = Deck(labels), torch.Generator().manual_seed(0)
        for _ in range(5):
            counts = torch.bincount(labels[deck.deal(12, generator)], minlength=3)
            assert ((counts - torch.tensor([2, 4, 6])).abs() <= 2).all()


class TestEarlyStopping:
    @staticmethod
    def follow(accuracies: list[float | None], patience: int) -> tuple[int, int, float]:
        """Kept epoch, last epoch, and the weight that the kept model had."""
        model, stopping = nn.Linear(1, 1), EarlyStopping(patience)
        epoch = 0
        for epoch, accuracy in enumerate(accuracies, start=1):
            nn.init.constant_(model.weight, epoch)
            evaluation = None if accuracy is None else Evaluation(loss=1.0, accuracy=accuracy)
            stopping.update(epoch, evaluation, model)
            if stopping.over(epoch):
                break
        stopping.restore(model)
        return stopping.epoch, epoch, model.weight.item()

    @pytest.mark.parametrize(
        ("accuracies", "patience", "kept", "last"),
        [
            ([0.5, 0.7, 0.6, 0.6, 0.9], 2, 2, 4),
            ([0.5, 0.7, 0.6, 0.6, 0.9], 3, 5, 5),
            ([0.5, 0.7, 0.6, 0.7, 0.6], 2, 4, 5),
            ([0.0, 0.0, 0.0], 1, 3, 3),
            ([None, None, None, None], 1, 4, 4),
        ],
    )
    def test_keeps_the_latest_of_the_best(
        self, accuracies: list[float | None], patience: int, kept: int, last: int
    ) -> None:
        assert self.follow(accuracies, patience) == (kept, last, float(kept))


class TestStrategies:
    def test_samples_used(self) -> None:
        ours = trainer()
        only, everything, chosen = (ours.fit(name) for name in ("target-only", "all-sources", "quantities"))
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
        record = ours.fit("quantities").epochs[0]
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
        chosen = ours.fit("quantities")
        assert chosen.source_model_seconds > 0
        assert chosen.source_model_seconds == ours.fit("quantities").source_model_seconds
        assert 0 < chosen.allocation_seconds < chosen.seconds


class TestTrainer:
    @pytest.mark.parametrize("strategy", ["target-only", "all-sources", "quantities"])
    def test_a_seed_decides_everything(self, strategy: str) -> None:
        first, again, other = trainer(0).fit(strategy), trainer(0).fit(strategy), trainer(1).fit(strategy)
        assert timeless(first) == timeless(again) != timeless(other)
        for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_strategies_do_not_disturb_each_other(self) -> None:
        """Nor does the random state outside matter, or change."""
        ours = trainer()
        ours.fit("quantities")
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
        assert timeless(together.fit("quantities")) == timeless(ours.fit("quantities"))
        assert together.dimension == ours.dimension == 15 * 2

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
            return torch.cat([m[0].weight, m[0].bias[:, None]], 1).double().flatten()  # type: ignore[index]

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
        trained = ours.fit("quantities").model
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


def study(**arguments: Any) -> Study:
    return compare(
        network,
        lambda seed: few_shot_split(TARGET, 5, seed=seed),
        SOURCES,
        options=FAST,
        **{"seeds": (0, 1), **arguments},
    )


class TestStudy:
    def test_the_test_part_has_no_influence(self) -> None:
        """The same trainings whatever it holds; only the accuracy changes."""

        def spoiled(seed: int) -> Any:
            split = few_shot_split(TARGET, 5, seed=seed)
            test = Domain("test", split.test.inputs, (split.test.labels + 1) % CLASSES)
            return dataclasses.replace(split, test=test)

        honest = study()
        other = compare(network, spoiled, SOURCES, options=FAST, seeds=(0, 1))
        for name in honest.trials:
            for a, b in zip(honest.trials[name], other.trials[name], strict=True):
                assert timeless(a.run) == timeless(b.run)
                assert a.run.kept_epoch == b.run.kept_epoch
                assert a.accuracy > 0.5 > b.accuracy

    def test_seeds_and_callbacks(self) -> None:
        seen: list[tuple[str, int, int]] = []
        result = study(
            strategies=("all-sources", "target-only"),
            seeds=(4, 2),
            on_epoch=lambda strategy, seed, record: seen.append((strategy, seed, record.epoch)),
        )
        assert list(result.trials) == ["all-sources", "target-only"]
        assert [trial.seed for trial in result.trials["target-only"]] == [4, 2]
        assert seen == list(
            itertools.chain(
                *(
                    [(name, seed, epoch) for epoch in (1, 2, 3, 4)]
                    for seed in (4, 2)
                    for name in ("all-sources", "target-only")
                )
            )
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seeds": ()}, "seeds: expected at least one seed, each once, got []"),
            ({"seeds": (1, 1)}, "seeds: expected at least one seed, each once, got [1, 1]"),
            ({"strategies": ()}, "strategy: expected at least one name, each once, got none"),
            (
                {"strategies": ("quantities", "quantities")},
                "strategy: expected at least one name, each once, got quantities, quantities",
            ),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=exactly(message)):
            study(**change)


def made_up_trial(seed: int, accuracy: float, near: list[int], risk: float | None) -> Trial:
    """A trial that took ``near`` samples of the one source by epoch and kept the last epoch."""
    records = tuple(
        EpochRecord(i, {"near": n, "far": 0}, 12 + n, 0.5, 0.4, 0.9, risk, 2.0, 0.5) for i, n in enumerate(near, 1)
    )
    return Trial(seed, TrainingRun("made-up", records, len(records), 3.0, nn.Identity()), accuracy)


def made_up_study(ours: list[float], theirs: list[float]) -> Study:
    deciding = [made_up_trial(seed, a, [60, 30], 1.5) for seed, a in enumerate(ours)]
    other = [made_up_trial(seed, a, [60, 60], None) for seed, a in enumerate(theirs)]
    return Study({"quantities": deciding, "all-sources": other}, AVAILABLE, 24)


class TestSummary:
    def test_numbers(self) -> None:
        ours, theirs = summarize(made_up_study([0.9, 0.8], [0.7, 0.7]))
        assert ours.accuracy == Mean(pytest.approx(0.85), pytest.approx(0.05))
        assert (ours.samples_per_epoch, ours.seconds, ours.allocation_seconds) == (57, 4, 1)
        assert ours.quantities == {"near": 30, "far": 0}
        assert (ours.predicts, theirs.predicts) == (True, False)

    @pytest.mark.parametrize(
        ("ours", "theirs", "sentence"),
        [
            (
                [0.9, 0.8],
                [0.7, 0.6],
                "Its accuracy is 20.0 points (± 0.0) above all-sources, a clear difference.",
            ),
            (
                [0.7, 0.6],
                [0.9, 0.9],
                "Its accuracy is 25.0 points (± 5.0) below all-sources, a clear difference.",
            ),
            (
                [0.9, 0.7],
                [0.7, 0.8],
                "Its accuracy is 5.0 points (± 15.0) above all-sources, no clear difference.",
            ),
            (
                [0.9],
                [0.7],
                "Its accuracy is 20.0 points above all-sources; one seed cannot say how sure that is.",
            ),
        ],
    )
    def test_sentences(self, ours: list[float], theirs: list[float], sentence: str) -> None:
        first = (
            "quantities took 28% of the source samples in the epoch that was kept: "
            "most of near (50%), least of far (0%)."
        )
        assert conclusions(made_up_study(ours, theirs)) == [first, sentence]


class TestResults:
    def test_json(self, tmp_path: Path) -> None:
        path = tmp_path / "result.json"
        result = study()
        write_json(to_json(result, target="target", shots=5), path)
        document = json.loads(path.read_text())
        assert document["sources"] == ["near", "far"]
        assert document["source_samples"] == AVAILABLE
        assert (document["target"], document["shots"], document["seeds"]) == ("target", 5, [0, 1])
        assert document["dimension"] == 24
        assert set(document["versions"]) == {"transferops", "torch", "numpy", "python"}
        assert list(document["strategies"]) == ["target-only", "all-sources", "quantities"]
        for name, entry in document["strategies"].items():
            trials = result.trials[name]
            assert entry["accuracy"] == [trial.accuracy for trial in trials]
            assert entry["samples_per_epoch"] == [trial.run.samples_per_epoch for trial in trials]
            assert entry["seconds"] == [trial.run.seconds for trial in trials]
            assert entry["samples_by_epoch"] == [[r.samples for r in trial.run.epochs] for trial in trials]
            for source in AVAILABLE:
                by_epoch = entry["quantities_by_epoch"][source]
                kept = [series[epoch - 1] for series, epoch in zip(by_epoch, entry["kept_epoch"], strict=True)]
                assert entry["quantities"][source] == kept

    @pytest.mark.parametrize("document", [{"a": float("nan")}, {"a": object()}])
    def test_a_failed_write_leaves_what_was_there(self, tmp_path: Path, document: dict[str, Any]) -> None:
        path = tmp_path / "result.json"
        path.write_text("old")
        with pytest.raises((ValueError, TypeError)):
            write_json(document, path)
        assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
        assert path.read_text() == "old"

    def test_an_interrupted_write_leaves_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "result.json"
        path.write_text("old")

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_json({"a": 1}, path)
        assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
        assert path.read_text() == "old"


class TestPlots:
    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def test_files(self, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        result = made_up_study([0.9, 0.8], [0.7, 0.7])
        assert plot_quantities(result, tmp_path / "quantities.png")
        plot_accuracy(result, tmp_path / "accuracy.png")
        for name in ("quantities.png", "accuracy.png"):
            with image.open(tmp_path / name) as picture:
                assert picture.width > 900
                assert len(picture.convert("RGB").getcolors(10**6)) > 10

    def test_nothing_decided_nothing_drawn(self, tmp_path: Path) -> None:
        result = Study({"target-only": [made_up_trial(0, 0.5, [0], None)]}, AVAILABLE, 24)
        assert not plot_quantities(result, tmp_path / "quantities.png")
        assert not (tmp_path / "quantities.png").exists()
        plot_accuracy(result, tmp_path / "accuracy.png")
        assert (tmp_path / "accuracy.png").exists()

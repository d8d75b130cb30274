"""The Lightning callbacks in a real trainer: what they log and draw is what the library computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
pytest.importorskip("clarabel")

from transferops import scores
from transferops.fisher import FisherInformation
from transferops.integrations.lightning import OtqmsSampling, ScoreCallback
from transferops.otqms import allocate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Classifier(lightning.LightningModule):
    """A small network; notes the inputs that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)
        self.seen: list[list[torch.Tensor]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs))

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        inputs, labels = batch
        self.seen[-1].append(inputs)
        return nn.functional.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Logged(lightning.Callback):
    """Keeps what was logged and a copy of the model at both ends of every epoch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.starts: list[nn.Module] = []
        self.ends: list[nn.Module] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.starts.append(copy.deepcopy(nn.Sequential(pl_module.body, pl_module.head)).eval())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.ends.append(copy.deepcopy(nn.Sequential(pl_module.body, pl_module.head)).eval())
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def domain(samples: int, shift: float, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    inputs = torch.randn(samples, 4, generator=generator) + torch.eye(3, 4)[labels] * 2 + shift
    return TensorDataset(inputs, labels)


def fit(module: Any, loader: Any, callbacks: list[Any], epochs: int = 3) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return trainer


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class TestScores:
    def test_logs_the_scores_of_the_features_after_the_epoch(self) -> None:
        validation = domain(60, 0.0, 1)
        logged = Logged()
        measured = {"h": scores.HScore(), "shrunk": scores.HScore(regularized=True)}
        callbacks = [
            ScoreCallback(DataLoader(validation, 16)),
            ScoreCallback(DataLoader(validation, 60), measured, layer="body.0", prefix="first/"),
            logged,
        ]
        module = Classifier()
        fit(module, DataLoader(domain(40, 0.0, 0), 8), callbacks, epochs=2)
        inputs, labels = validation.tensors
        assert module.training
        for metrics, model in zip(logged.metrics, logged.ends, strict=True):
            with torch.no_grad():
                features, first = model[0](inputs), model[0][0](inputs)
            assert metrics["transfer/h_score"] == pytest.approx(scores.h_score(features, labels), rel=1e-6)
            assert metrics["transfer/log_me"] == pytest.approx(scores.log_me(features, labels), rel=1e-6)
            assert metrics["first/h"] == pytest.approx(scores.h_score(first, labels), rel=1e-6)
            assert metrics["first/shrunk"] == pytest.approx(scores.h_score(first, labels, True), rel=1e-6)
        assert logged.metrics[0]["transfer/h_score"] != logged.metrics[1]["transfer/h_score"]

    def test_every_other_epoch(self) -> None:
        logged = Logged()
        callback = ScoreCallback(DataLoader(domain(60, 0.0, 1), 16), ["h_score"], every=2)
        fit(Classifier(), DataLoader(domain(40, 0.0, 0), 8), [callback, logged])
        assert ["transfer/h_score" in metrics for metrics in logged.metrics] == [False, True, True]

    def test_unknown_scores_are_refused_at_once(self) -> None:
        with pytest.raises(ValueError, match=r"^scores: expected names among h_score"):
            ScoreCallback([], ["h_scor"])
        with pytest.raises(ValueError, match=r"^every: expected an integer of at least 1, got 0"):
            ScoreCallback([], every=0)


class TestOtqmsSampling:
    def setting(self) -> tuple[TensorDataset, dict[str, TensorDataset], dict[str, Any]]:
        """A target of few samples, a source like it, and one unlike it."""
        target = domain(12, 0.0, 2)
        sources = {"near": domain(50, 0.1, 3), "far": domain(70, 4.0, 4)}
        models: dict[str, Any] = {}
        for name, source in sources.items():
            models[name] = Classifier()
            fit(models[name], DataLoader(source, 10), [], epochs=5)
        return target, sources, models

    def test_every_epoch_trains_on_the_samples_of_least_risk(self) -> None:
        target, sources, models = self.setting()
        otqms = OtqmsSampling(target, sources, models, dimension=5.0)
        logged = Logged()
        module = Classifier()
        assert otqms.allocation is None
        fit(module, DataLoader(otqms.dataset, 7, sampler=otqms.sampler), [logged, otqms], epochs=3)

        rows = {name: {tuple(row) for row in part.tensors[0].tolist()} for name, part in sources.items()}
        plain = [nn.Sequential(model.body, model.head) for model in models.values()]
        totals = []
        for epoch, start in enumerate(logged.starts):
            gram = FisherInformation(start).gram(plain, [target.tensors])
            wanted = allocate(gram, 12, [50, 70], 5.0).rounded().tolist()
            seen = [tuple(row) for row in torch.cat(module.seen[epoch]).tolist()]
            assert len(seen) == 12 + sum(wanted)
            assert len(set(seen)) == len(seen)
            assert {tuple(row) for row in target.tensors[0].tolist()} <= set(seen)
            assert [len(rows[name] & set(seen)) for name in sources] == wanted
            metrics = logged.metrics[epoch]
            assert [metrics["otqms/near"], metrics["otqms/far"]] == wanted
            totals.append(sum(wanted))
        assert otqms.allocation is not None
        assert logged.metrics[-1]["otqms/risk"] == pytest.approx(otqms.allocation.risk, rel=1e-6)
        assert min(totals) > 0
        assert len(set(totals)) > 1  # else an epoch's length could be the first one's

    def test_dimension_is_the_number_of_trained_parameters(self) -> None:
        target, sources, models = self.setting()
        otqms = OtqmsSampling(target, sources, models)
        module = Classifier()
        module.body.requires_grad_(False)
        logged = Logged()
        fit(module, DataLoader(otqms.dataset, 7, sampler=otqms.sampler), [logged, otqms], epochs=1)
        assert otqms.allocation is not None
        assert otqms.allocation.target_only_risk == pytest.approx((8 * 3 + 3) / (2 * 12))

    def test_draws_go_on_after_a_checkpoint(self, tmp_path: Path) -> None:
        target, sources, models = self.setting()
        drawn = []
        for parts in ((4,), (2, 4)):
            torch.manual_seed(5)
            module, path = Classifier(), None
            module.body[2].p = 0.0
            for epochs in parts:
                otqms = OtqmsSampling(target, sources, models, dimension=5.0)
                trainer = lightning.Trainer(
                    accelerator="cpu", max_epochs=epochs, callbacks=[otqms], logger=False,
                    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                )  # fmt: skip
                trainer.fit(module, DataLoader(otqms.dataset, 7, sampler=otqms.sampler), ckpt_path=path)
                path = tmp_path / f"{epochs}.ckpt"
                trainer.save_checkpoint(path)
            drawn.append(otqms.sampler.positions)
        np.testing.assert_array_equal(*drawn)

    def test_bad_arguments_are_named(self) -> None:
        target, other = domain(12, 0.0, 2), domain(5, 0.0, 3)
        with pytest.raises(ValueError, match=r"^source_models: expected a model for each source \(a\), got b"):
            OtqmsSampling(target, {"a": other}, {"b": Classifier()})
        with pytest.raises(TypeError, match=r"^sources\['a'\]: expected a map-style data set of \(input, label\), got"):
            OtqmsSampling(target, {"a": iter(())}, {"a": Classifier()})
        with pytest.raises(ValueError, match=r"^dimension: expected a positive number, got 0"):
            OtqmsSampling(target, {"a": other}, {"a": Classifier()}, dimension=0)

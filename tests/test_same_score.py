"""One model, one data set, one number: whichever way a score is asked for, it is the same to 1e-6.

The C++ program of ``examples/cpp_embedder`` is compared by ``scripts/check_cpp_embedder.sh``, which builds it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from transferops import scores
from transferops.compat import logme, tllib, transformer_ranker
from transferops.rank import extract

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SAMPLES, INPUTS, FEATURES, CLASSES = 90, 6, 8, 3
SCORES = ("h_score", "h_score_regularized", "log_me", "trans_rate")


def network() -> nn.Sequential:
    """The model; also what the command line is given to load."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.Tanh(), nn.Dropout(0.5), nn.Linear(FEATURES, CLASSES))


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(SAMPLES) % CLASSES
    inputs = torch.randn(SAMPLES, INPUTS, generator=generator) + 2 * torch.eye(CLASSES, INPUTS)[labels]
    return inputs, labels


@pytest.fixture(scope="module")
def features(data: tuple[Tensor, Tensor]) -> Tensor:
    """What the last layer is given, by hand."""
    with torch.no_grad():
        return network().eval()[:-1](data[0])


@pytest.fixture(scope="module")
def expected(features: Tensor, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Through the functions."""
    labels = data[1]
    return {
        "h_score": scores.h_score(features, labels),
        "h_score_regularized": scores.h_score(features, labels, regularized=True),
        "log_me": scores.log_me(features, labels),
        "trans_rate": scores.trans_rate(features, labels),
    }


@pytest.fixture
def loader(data: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data), batch_size=32)


def agree(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6)


def streaming() -> dict[str, Any]:
    return {
        "h_score": scores.HScore(),
        "h_score_regularized": scores.HScore(regularized=True),
        "log_me": scores.LogMe(),
        "trans_rate": scores.TransRate(),
    }


def test_extracted_features(loader: DataLoader[Any], features: Tensor) -> None:
    torch.testing.assert_close(extract(network(), loader).features["head input"], features, rtol=1e-6, atol=1e-7)


def test_functions_of_arrays(features: Tensor, data: tuple[Tensor, Tensor], expected: dict[str, float]) -> None:
    agree({"h_score": scores.h_score(features.numpy(), data[1].numpy())}, expected)
    agree(scores.score_all(features, data[1], streaming()), expected)


def test_classes_in_batches(loader: DataLoader[Any], features: Tensor, expected: dict[str, float]) -> None:
    for name, score in streaming().items():
        for part, (_, labels) in zip(features.split(32), loader, strict=True):
            score.update(part, labels)
        agree({name: score.compute()}, expected)


def test_other_libraries_names(features: Tensor, data: tuple[Tensor, Tensor], expected: dict[str, float]) -> None:
    given = features.numpy(), data[1].numpy()
    agree({"h_score": tllib.h_score(*given)}, expected)
    agree({"log_me": logme.LogME().fit(*given)}, expected)
    agree({"log_me": transformer_ranker.LogME().fit(*given)}, expected)
    agree({"h_score_regularized": transformer_ranker.HScore().fit(*given)}, expected)


def test_command_line(
    tmp_path: Path, data: tuple[Tensor, Tensor], expected: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    testing = pytest.importorskip("click.testing")
    from transferops.cli import cli

    archive, ranking = tmp_path / "data.npz", tmp_path / "ranking.json"
    np.savez(archive, target_x=data[0].numpy(), target_y=data[1].numpy())
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    arguments = ["--data", str(archive), "--target", "target", "--model", f"{Path(__file__).stem}:network"]
    options = ["--scores", ",".join(SCORES), "--json", str(ranking), "--threads", str(torch.get_num_threads())]
    result = testing.CliRunner().invoke(cli, ["rank", *arguments, *options])
    assert result.exit_code == 0, result.output
    (candidate,) = json.loads(ranking.read_text())["candidates"]
    agree({name: candidate["scores"][name] for name in SCORES}, expected)


def test_lightning(loader: DataLoader[Any], expected: dict[str, float]) -> None:
    lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    from transferops.integrations.lightning import ScoreCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.network(inputs)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)  # the model stays the one that the others score

    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[ScoreCallback(loader, streaming())], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), loader)
    agree({name: float(trainer.callback_metrics[f"transfer/{name}"]) for name in SCORES}, expected)


def test_hugging_face(
    tmp_path: Path, loader: DataLoader[Any], data: tuple[Tensor, Tensor], expected: dict[str, float]
) -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("accelerate")
    from transferops.integrations.transformers import ScoreCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.network(inputs)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)

    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=1, learning_rate=0.0, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    rows = [{"inputs": x, "labels": y} for x, y in zip(*data, strict=True)]
    trainer = transformers.Trainer(
        Model(), arguments, train_dataset=rows, callbacks=[ScoreCallback(loader, streaming())]
    )
    trainer.train()
    (noted,) = [entry for entry in trainer.state.log_history if "transfer_h_score" in entry]
    agree({name: noted[f"transfer_{name}"] for name in SCORES}, expected)


def test_scikit_learn(data: tuple[Tensor, Tensor], expected: dict[str, float]) -> None:
    """As the last step of a pipeline, whose first is the model."""
    pipelines = pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    body = network().eval()[:-1]

    def embed(inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(body(torch.from_numpy(inputs)))

    inputs, labels = (part.numpy() for part in data)
    for name, score in streaming().items():
        pipeline = pipelines.Pipeline([("features", preprocessing.FunctionTransformer(embed)), ("score", score)])
        agree({name: pipeline.fit(inputs, labels)["score"].score_}, expected)

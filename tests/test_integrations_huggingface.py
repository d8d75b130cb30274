"""Hugging Face: scores in the log of a real Trainer, domains from a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from transferops import scores
from transferops.integrations.datasets import from_hugging_face

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_the_trainer_logs_the_scores_of_every_epoch(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("accelerate")
    from transferops.integrations.transformers import ScoreCallback

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
            max_position_embeddings=16,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        data = [{"input_ids": torch.randint(20, (6,)), "labels": i % 3} for i in range(36)]
        loader = DataLoader(data, batch_size=10)
        history = [ScoreCallback(loader), ScoreCallback(loader, ["h_score"], prefix="second_", every=2)]
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=9, learning_rate=1e-3, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=history)
        trainer.train()

    model.eval()
    inputs = torch.stack([row["input_ids"] for row in data])
    labels = torch.tensor([row["labels"] for row in data])
    with torch.no_grad():
        features = model.bert(inputs).pooler_output
    noted = [entry for entry in trainer.state.log_history if "transfer_h_score" in entry]
    assert [(entry["epoch"], entry["step"]) for entry in noted] == [(1.0, 4), (2.0, 8)]
    assert noted[-1]["transfer_h_score"] == pytest.approx(scores.h_score(features, labels), rel=1e-5)
    assert noted[-1]["transfer_log_me"] == pytest.approx(scores.log_me(features, labels), rel=1e-5)
    assert noted[0]["transfer_h_score"] != noted[1]["transfer_h_score"]
    assert [entry["epoch"] for entry in trainer.state.log_history if "second_h_score" in entry] == [2.0]


class TestFromHuggingFace:
    @pytest.fixture
    def datasets(self) -> Any:
        return pytest.importorskip("datasets", exc_type=ImportError)

    def images(self, datasets: Any, arrays: list[np.ndarray]) -> Any:
        image = pytest.importorskip("PIL.Image")
        kinds = datasets.ClassLabel(names=["cat", "dog"])
        features = datasets.Features({"image": datasets.Image(), "label": kinds})
        rows = {"image": [image.fromarray(array) for array in arrays], "label": [i % 2 for i in range(len(arrays))]}
        return datasets.Dataset.from_dict(rows, features=features)

    def test_images_are_scaled_and_made_rgb(self, datasets: Any) -> None:
        random = np.random.default_rng(0)
        colour = random.integers(256, size=(5, 4, 3), dtype=np.uint8)
        grey = random.integers(256, size=(5, 4), dtype=np.uint8)
        dataset = self.images(datasets, [colour, grey])
        for given in (dataset, dataset.with_format("numpy")):
            domain = from_hugging_face(given, "photo")
            assert (domain.name, domain.inputs.shape, domain.labels.tolist()) == ("photo", (2, 3, 5, 4), [0, 1])
            wanted = np.stack([colour, grey[..., None].repeat(3, 2)]).transpose(0, 3, 1, 2) / 127.5 - 1
            np.testing.assert_allclose(domain.inputs, wanted, atol=1e-6)

    def test_images_of_several_sizes_need_a_size(self, datasets: Any) -> None:
        small, large = (np.full((n, n), 200, dtype=np.uint8) for n in (4, 8))
        dataset = self.images(datasets, [small, small, large])
        with pytest.raises(
            ValueError, match=r"^image: expected images of one size, 4x4 as in row 0 .* got 8x8 in row 2$"
        ):
            from_hugging_face(dataset, "photo")
        assert from_hugging_face(dataset, "photo", image_size=6).inputs.shape == (3, 3, 6, 6)

    def test_vectors_are_taken_as_they_are(self, datasets: Any) -> None:
        features = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
        dataset = datasets.Dataset.from_dict({"x": features, "y": [2, 0, 1, 1]})
        domain = from_hugging_face(dataset, "text", inputs="x", labels="y")
        np.testing.assert_array_equal(domain.inputs, features)
        assert domain.labels.tolist() == [2, 0, 1, 1]
        with pytest.raises(ValueError, match=r"^image_size: expected None, column 'x' having no images, got 8"):
            from_hugging_face(dataset, "text", inputs="x", labels="y", image_size=8)

    def test_bad_data_sets_are_named(self, datasets: Any) -> None:
        make = datasets.Dataset.from_dict
        good = make({"x": [[1.0], [2.0]], "label": [0, 1]})
        cases = [
            (TypeError, "dataset: expected a datasets.Dataset of one split, got DatasetDict",
             datasets.DatasetDict(train=good), "x"),
            (ValueError, "inputs: expected a column among x, label, got 'image'", good, "image"),
            (ValueError, "dataset: expected at least one row, got none", good.select([]), "x"),
            (ValueError, "x: expected vectors of one length", make({"x": [[1.0], [2.0, 3.0]], "label": [0, 1]}), "x"),
            (TypeError, "x: expected images or vectors of numbers", make({"x": ["a", "b"], "label": [0, 1]}), "x"),
            (TypeError, "d_y: expected integer labels, got dtype float64", make({"x": [[1.0]], "label": [0.5]}), "x"),
            (ValueError, "d.inputs: expected finite numbers", make({"x": [[float("nan")]], "label": [0]}), "x"),
        ]  # fmt: skip
        for error, message, dataset, inputs in cases:
            with pytest.raises(error, match=f"^{message}"):
                from_hugging_face(dataset, "d", inputs=inputs)

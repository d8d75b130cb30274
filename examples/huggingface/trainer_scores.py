"""Hugging Face: a data set as a domain, and transferability scores in the log of a Trainer.

    python examples/huggingface/trainer_scores.py [--epochs 20]

A small vision transformer learns the digits of a ``datasets.Dataset``. After every second epoch its features are scored
for another domain, digits turned by 15 degrees: does training on the one help with the other?
"""

from __future__ import annotations

import argparse
import tempfile

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from transferops.data import load_digits_domains
from transferops.integrations.datasets import from_hugging_face
from transferops.integrations.transformers import ScoreCallback
from transferops.scores import HScore, LogMe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)

    # A data set with an image column, as load_dataset gives one from the hub or a folder.
    digits = load_digits_domains().domains
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    pictures = ((digits["plain"].inputs[:, 0] + 1) * 127.5).round().numpy().astype(np.uint8)
    dataset = datasets.Dataset.from_dict(
        {"image": list(pictures), "label": digits["plain"].labels.tolist()}, features=features
    )

    source = from_hugging_face(dataset, "plain")
    target = digits["rotated-15"]
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(source.inputs, source.labels)]
    turned = [{"pixel_values": x.expand(3, 8, 8), "labels": y} for x, y in zip(target.inputs, target.labels)]

    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_labels=10,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=3e-3, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        # The last layer norm makes the features linearly dependent: the regularised score.
        measured = {"h_score": HScore(regularized=True), "log_me": LogMe()}
        scores = ScoreCallback(DataLoader(turned, batch_size=64), measured, every=2)
        trainer = Trainer(ViTForImageClassification(config), arguments, train_dataset=rows, callbacks=[scores])
        trainer.train()
    for entry in trainer.state.log_history:
        if "transfer_h_score" in entry:
            print(
                f"epoch {entry['epoch']:.0f}: H-score {entry['transfer_h_score']:.3f}, "
                f"LogME {entry['transfer_log_me']:.3f}"
            )


if __name__ == "__main__":
    main()

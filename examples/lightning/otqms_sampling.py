"""A Lightning module trained on a few target samples and as many of each source as OTQMS finds best.

    python examples/lightning/otqms_sampling.py [--epochs 10] [--dimension 300]

Prints, for every epoch, the samples taken of each source and the H-score of the features for the target's validation
samples, then the accuracy on its test samples. Counted by its parameters, the network is so large for the few target
samples that all samples of all sources are worth taking; with a smaller, effective dimension d some are not.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from transferops.data import few_shot_split, load_digits_domains
from transferops.integrations.lightning import OtqmsSampling, ScoreCallback
from transferops.scores import HScore

SOURCES = ("rotated-15", "mirrored", "rotated-90")


class Digits(pl.LightningModule):
    """A small classifier of 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


class Print(pl.Callback):
    """Prints what the other callbacks log."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logged = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        print(f"epoch {trainer.current_epoch}: " + ", ".join(f"{name} {value:.4g}" for name, value in logged.items()))


def fit(module: Digits, loader: DataLoader[Any], epochs: int, callbacks: list[pl.Callback]) -> Digits:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **quiet)
    trainer.fit(module, loader)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--dimension", type=float, help="d of the predicted risk (default: all parameters)")
    options = parser.parse_args()
    epochs = options.epochs
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # on workers, and a deprecation in torch
    torch.manual_seed(0)

    domains = load_digits_domains().domains
    split = few_shot_split(domains["rotated-30"], 20, validation_fraction=0.3)
    assert split.validation is not None
    target = TensorDataset(split.train.inputs, split.train.labels)
    sources: dict[str, Dataset[Any]] = {
        name: TensorDataset(domains[name].inputs, domains[name].labels) for name in SOURCES
    }
    start = Digits()  # of all models: parameters of different starts do not compare
    models = {
        name: fit(copy.deepcopy(start), DataLoader(source, 32, shuffle=True), epochs, [])
        for name, source in sources.items()
    }

    otqms = OtqmsSampling(target, sources, models, dimension=options.dimension)
    validation = TensorDataset(split.validation.inputs, split.validation.labels)
    # Fewer validation samples than a full covariance needs: the regularised score.
    scores = ScoreCallback(DataLoader(validation, 64), {"h_score": HScore(regularized=True)})
    loader = DataLoader(otqms.dataset, 32, sampler=otqms.sampler)
    module = fit(start, loader, epochs, [otqms, scores, Print()])

    with torch.no_grad():
        accuracy = (module(split.test.inputs).argmax(1) == split.test.labels).double().mean()
    print(f"accuracy on {len(split.test)} test samples: {accuracy:.3f}")


if __name__ == "__main__":
    main()

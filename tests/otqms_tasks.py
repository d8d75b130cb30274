"""Small classification tasks for the OTQMS trainer, and what its runs are compared by."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from transferops.data import Domain
from transferops.otqms import FeatureNet, TrainingOptions, TrainingRun
from transferops.otqms.pool import TensorSamples

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


def task(seed: int, per_class: int, turn: int = 0) -> TensorSamples:
    """Gaussian classes around fixed centres; ``turn`` exchanges the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES * per_class) % CLASSES
    noise = torch.randn(len(labels), FEATURES, generator=generator)
    return TensorSamples(2 * torch.eye(CLASSES, FEATURES)[labels] + 0.7 * noise, (labels + turn) % CLASSES)


def domain(name: str, seed: int, per_class: int, turn: int = 0) -> Domain:
    """The same as a domain."""
    samples = task(seed, per_class, turn)
    return Domain(name, samples.inputs, samples.labels)


TARGET = domain("target", 0, 20)
SOURCES = {"near": domain("near", 1, 20), "far": domain("far", 2, 16, turn=1)}
AVAILABLE = {"near": 60, "far": 48}


def network() -> nn.Module:
    return FeatureNet(FEATURES, CLASSES, hidden=8)


def timeless(run: TrainingRun) -> list[dict[str, Any]]:
    """The records of a run without its times."""
    return [{k: v for k, v in dataclasses.asdict(r).items() if "seconds" not in k} for r in run.epochs]

"""Small domains in files, of both kinds that commands read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def feature_bundle(path: Path, domains: dict[str, tuple[int, float]], samples: int) -> Path:
    """Features [N, 5] of three classes: by domain, how far the classes are permuted and how clear they are."""
    generator = np.random.default_rng(0)
    arrays = {}
    for name, (shift, strength) in domains.items():
        labels = np.arange(samples) % 3
        arrays[f"{name}_x"] = strength * np.eye(3, 5)[(labels + shift) % 3] + generator.normal(size=(samples, 5))
        arrays[f"{name}_y"] = labels
    np.savez(path, **arrays)
    return path


def image_tree(path: Path, classes: dict[str, tuple[str, ...]]) -> Path:
    """A folder domain/class/image with four images of 8x8 pixels for each class of a domain."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for domain, kinds in classes.items():
        for kind in kinds:
            folder = path / domain / kind
            folder.mkdir(parents=True)
            for i in range(4):
                image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return path

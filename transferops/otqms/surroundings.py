"""What the trainings of a trainer share, and where each has its random numbers from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from transferops.otqms.options import TrainingOptions
from transferops.otqms.pool import Pool


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What all trainings of a trainer share.

    Attributes:
        options: How to train.
        samples: Part 0 is the target, part i source i.
        validation: Target samples that choose the epoch.
        watched: Target samples whose loss is noted after every epoch where none is validated; nothing depends on it.
        initial: The common initialisation.
        seed: Of everything random.
        folder: Where checkpoints are kept; ``None``: none are.
    """

    options: TrainingOptions
    samples: Pool
    validation: Pool | None
    initial: nn.Module
    seed: int
    folder: Path | None
    watched: Pool | None = None


def stream_seed(seed: int, stream: str, rank: int = 0) -> int:
    """A seed of its own for each stream of random numbers."""
    digest = hashlib.sha256(f"{seed}/{stream}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

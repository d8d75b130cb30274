"""Is inheriting helping or hurting me? Train with several shares of the upstream parameters, and compare with none."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from transferops._validate import check_positive_int, describe, fail
from transferops.adapt.journal import Journal
from transferops.adapt.verdict import INTERVALS, Effect, Verdict, overall, paired_effects

DEFAULT_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)

Train = Callable[[float, int], float]


@dataclass(frozen=True)
class TransferCheck:
    """The outcome of :func:`transfer_check`.

    Attributes:
        alphas: The grid, 0 included.
        seeds: The repetitions.
        metrics: By alpha, one value per seed.
        effects: For every alpha other than 0.
        confidence: With which all intervals hold at once.
        interval: How they were made.
    """

    alphas: tuple[float, ...]
    seeds: tuple[int, ...]
    metrics: tuple[tuple[float, ...], ...]
    effects: tuple[Effect, ...]
    confidence: float
    interval: str

    @property
    def verdict(self) -> Verdict:
        """Over the grid: "positive" or "negative" if some alpha is and none is the opposite, else "undecided"."""
        return overall(self.effects)

    @property
    def scratch(self) -> float:
        """Mean metric at alpha = 0."""
        row = self.metrics[self.alphas.index(0.0)]
        return math.fsum(row) / len(row)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an unbounded interval has None for its ends."""
        effects = [
            {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in entry.items()}
            for entry in map(asdict, self.effects)
        ]
        return {**asdict(self), "effects": effects, "verdict": self.verdict, "scratch": self.scratch}

    def __str__(self) -> str:
        """A line per alpha, then the verdict in words."""
        lines = ["alpha   metric  difference  interval              verdict", f"{0:<6g} {self.scratch:8.4f}"]
        for e in self.effects:
            interval = f"[{e.low:+.4f}, {e.high:+.4f}]"
            lines.append(f"{e.alpha:<6g} {e.metric:8.4f}  {e.difference:+10.4f}  {interval:20}  {e.verdict}")
        return "\n".join([*lines, self.conclusion()])

    def conclusion(self) -> str:
        """The verdict in a sentence."""
        positive = [f"{e.alpha:g}" for e in self.effects if e.verdict == "positive"]
        negative = [f"{e.alpha:g}" for e in self.effects if e.verdict == "negative"]
        sure = f"{self.confidence:.0%} confidence over all shares, {len(self.seeds)} paired seeds"
        if positive and negative:
            return f"Inheriting helps at alpha {', '.join(positive)} and hurts at {', '.join(negative)} ({sure})."
        if positive:
            return f"Inheriting helps at alpha {', '.join(positive)} ({sure})."
        if negative:
            return f"Inheriting hurts at alpha {', '.join(negative)}: negative transfer ({sure})."
        return f"Undecided: no share differs clearly from starting afresh ({sure}); more seeds may tell."


def transfer_check(
    train: Train,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    seeds: Sequence[int] = tuple(range(10)),
    *,
    confidence: float = 0.95,
    interval: str = "t",
    journal: str | os.PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
    on_result: Callable[[float, int, float], None] | None = None,
) -> TransferCheck:
    """Train with every share and seed, and say for each share whether inheriting it helps, hurts, or neither.

    The differences to alpha = 0 are paired by seed: let the seed fix initialisation, batches and data for all shares
    alike. The intervals hold all at once (:func:`transferops.adapt.verdict.paired_effects`), so a grid of many shares
    does not find an effect by chance. Seeds come in the outer loop: an interrupted check has whole pairs.

    Args:
        train: From alpha and a seed to a metric on held-out data, larger is better; calls :func:`inherit` itself.
        alphas: Shares in [0, 1], 0 among them, each once.
        seeds: At least 2, each once.
        confidence: Of all intervals together.
        interval: "t" or "bootstrap".
        journal: A file for the results as they come; what it holds already is not trained again.
        about: What else the results depend on (data, model, ...), kept in the journal and compared when it is used
            again.
        on_result: Called with alpha, seed and metric for every result, those of the journal included.

    Raises:
        ValueError: An argument is out of range, ``train`` gives something that is not a finite number, or the
            journal is of another check.
        OSError: The journal cannot be read or written.
    """
    shares = _checked_alphas(alphas)
    repetitions = [check_positive_int("seeds", seed, minimum=0) for seed in seeds]
    if len(repetitions) < 2 or len(set(repetitions)) < len(repetitions):
        fail("seeds", "at least 2 seeds, each once", str(repetitions))
    if interval not in INTERVALS:
        fail("interval", "'t' or 'bootstrap'", describe(interval))
    if not 0 < confidence < 1:
        fail("confidence", "a number in (0, 1)", describe(confidence))
    book = None if journal is None else Journal(journal, about or {})
    known = {} if book is None else {(r["alpha"], r["seed"]): float(r["metric"]) for r in book.results}
    metrics: dict[tuple[float, int], float] = {}
    for seed in repetitions:
        for alpha in shares:
            key = (alpha, seed)
            if key in known:
                metrics[key] = known[key]
            else:
                metrics[key] = _number(train(alpha, seed), alpha, seed)
                if book is not None:
                    book.add({"alpha": alpha, "seed": seed, "metric": metrics[key]})
            if on_result is not None:
                on_result(alpha, seed, metrics[key])
    table = tuple(tuple(metrics[alpha, seed] for seed in repetitions) for alpha in shares)
    effects = paired_effects(table, shares, confidence=confidence, interval=interval)
    return TransferCheck(tuple(shares), tuple(repetitions), table, effects, confidence, interval)


def _checked_alphas(alphas: Sequence[float]) -> list[float]:
    for alpha in alphas:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            fail("alphas", "numbers in [0, 1]", describe(alpha))
    shares = [float(alpha) for alpha in alphas]
    if 0.0 not in shares or len(shares) < 2 or len(set(shares)) < len(shares):
        fail("alphas", "0 and at least one other share, each once", str(shares))
    return shares


def _number(value: Any, alpha: float, seed: int) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    try:
        metric = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        metric = math.nan
    if not math.isfinite(metric):
        fail("train", "a finite metric", f"{describe(value)} at alpha {alpha:g}, seed {seed}")
    return metric
